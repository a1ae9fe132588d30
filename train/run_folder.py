"""What a run leaves behind: config.yaml, log.jsonl, curves.png, last.pt to continue from and best.pt to use."""
import contextlib
import json
import os
from pathlib import Path

import torch
import yaml
from matplotlib.figure import Figure

from train.config import to_dict
from train.distributed import from_rank_0, tensors_from_rank_0
from train.runs import find, has_checkpoint, make


class RunFolder:
    """The folder of one run. Rank 0 writes; on other ranks the writing methods do nothing.

    A checkpoint is a dict of plain types and tensors, so that torch.load(weights_only=True) reads it: model, ema (or
    None), config, classes, epoch (how many are finished) and history; last.pt also has optimizer and scaler.
    """

    def __init__(self, path, writes, metrics, resumes=False):
        """path: None before make(). resumes: whether there is a checkpoint to continue from."""
        self.path, self.writes, self.metrics, self.resumes = path and Path(path), writes, metrics, resumes

    @classmethod
    def open(cls, config, resume, rank, metrics):
        """Finds the folder to continue on rank 0, see runs.find, and tells the others; an error there is raised on
        every rank. Without `resume`, and where there is nothing to resume yet, make() has to follow."""
        found = None, False
        if rank == 0 and resume:
            try:
                path = find(config, resume)
                found = path, path is not None and has_checkpoint(path)
            except (ValueError, OSError) as error:
                found = error
        path, resumes = from_rank_0(found)
        return cls(path, rank == 0, metrics, resumes)

    def make(self, config, resume):
        """Makes a new folder, or takes that of a run without a checkpoint -> notes; an error on rank 0 is raised on
        every rank."""
        path = self.path
        if self.writes and path is None:
            try:
                path = make(config, may_exist=bool(resume))
            except (ValueError, OSError) as error:
                path = error
        self.path = Path(from_rank_0(path))
        return ["nothing to resume yet: a new run"] if resume else []

    def load(self, device):
        """The checkpoint last.pt, which only rank 0 reads: its machine alone may have it. On the CPU; tensors travel by
        way of `device`."""
        checkpoint = None
        if self.writes:
            try:
                checkpoint = torch.load(self.path / "last.pt", map_location="cpu", weights_only=True)
            except Exception as error:  # damaged bytes make the unpickler raise anything
                checkpoint = ValueError(f"--resume: {self.path / 'last.pt'} cannot be read ({error}); start a new run")
        return tensors_from_rank_0(checkpoint, device)

    def announce(self, config, notes, model, images, val_images, world, device, epoch):
        """Prints what is about to happen, writes config.yaml, and drops what the log has beyond `epoch` epochs."""
        text = yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=1000)
        replace_atomically(self.path / "config.yaml", lambda file: file.write(text.encode()))
        self._truncate_log(epoch)
        source = f"{config.data}" if config.data else "rendered scenes, because no --data was given"
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"train {config.model}, attn {config.attn or 'default'}, {parameters:,} parameters, on {source}")
        print(f"  {images} training and {val_images} validation images of {config.num_classes} classes at "
              f"{config.img_size} px, {config.epochs} epochs in batches of {config.batch_size}, {world} x {device}")
        for note in notes:
            print("  " + note)
        print(f"  {'continues after epoch ' + str(epoch) + ' in' if epoch else 'writes to'} {self.path}/")
        print("configuration:\n" + "".join("  " + line + "\n" for line in text.splitlines()), flush=True)

    def _truncate_log(self, epoch):
        log = self.path / "log.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        kept = [row for row in rows if row["epoch"] < epoch or "step" not in row and row["epoch"] == epoch]
        replace_atomically(log, lambda file: file.write("".join(json.dumps(row) + "\n" for row in kept).encode()))

    def log(self, **row):
        """One line of log.jsonl: a step (step, epoch from 0, loss, lr), or an epoch (epoch from 1, train_loss, val_loss
        if the task has one, the metrics, images_per_s, memory in bytes)."""
        if self.writes:
            with naming(self.path / "log.jsonl"), open(self.path / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def save(self, checkpoint, best):
        if self.writes:
            save_atomically(checkpoint, self.path / "last.pt")
            if best:
                weights = {name: value for name, value in checkpoint.items() if name not in ("optimizer", "scaler")}
                save_atomically(weights, self.path / "best.pt")
            self.plot()

    def plot(self):
        """curves.png: loss of every step and epoch, and the metrics, against epochs."""
        rows = [json.loads(line) for line in (self.path / "log.jsonl").read_text().splitlines()]
        steps, epochs = [row for row in rows if "step" in row], [row for row in rows if "step" not in row]
        per_epoch = len(steps) / len(epochs)
        at = [row["epoch"] for row in epochs]
        figure = Figure(figsize=(10, 4), layout="constrained")
        losses, accuracy = figure.subplots(1, 2)
        at_step = [(row["step"] + 1) / per_epoch for row in steps]
        losses.plot(at_step, [row["loss"] for row in steps], color="0.8", label="step")
        losses.plot(at, [row["train_loss"] for row in epochs], "o-", label="training")
        if "val_loss" in epochs[0]:
            losses.plot(at, [row["val_loss"] for row in epochs], "o-", label="validation")
        losses.set(xlabel="epoch", ylabel="loss")
        for metric, name in self.metrics.items():
            accuracy.plot(at, [row[metric] for row in epochs], "o-", label=name)
        chosen, name = next(iter(self.metrics.items()))
        best = max(row[chosen] for row in epochs)
        accuracy.set(xlabel="epoch", ylabel="validation, %", ylim=(0, 101), title=f"best {name} {best:.2f}")
        for axes in (losses, accuracy):
            axes.grid(alpha=0.3)
            axes.legend()
        # As UTF-8, whatever the locale takes the name for; and a $ is a $.
        figure.suptitle(os.fsencode(self.path.name).decode("utf-8", "replace"), parse_math=False)
        replace_atomically(self.path / "curves.png", lambda file: figure.savefig(file, format="png", dpi=100))


def notes_of(split, dataset):
    """What a data set has to say about itself, such as what it leaves out: its attribute `notes`, a list of lines."""
    return [f"{split}: {note}" for note in getattr(dataset, "notes", ())]


def save_atomically(state, path):
    """torch.save that leaves either the old file or the whole new one, whenever the machine stops."""
    def write(file):
        try:
            torch.save(state, file)
        except RuntimeError as error:  # it hides what the disk said behind an error of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error

    replace_atomically(path, write)


def replace_atomically(path, write):
    """write(file) into a binary file that takes the place of `path` when it is whole and on the disk.

    Raises OSError, naming `path`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # beside it: a rename between disks is not atomic
    try:
        with naming(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path):
    """An OSError in this block names the file, which the one of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
