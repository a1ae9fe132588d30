"""What a run leaves behind beside its checkpoints: config.yaml, log.jsonl, curves.png."""
import contextlib
import json
import os
from array import array
from collections import Counter
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from train.config import to_dict
from train.distributed import from_rank_0
from train.runs import find, has_checkpoint, make


class RunFolder:
    """The folder of one run. Rank 0 writes; on other ranks the writing methods do nothing."""

    def __init__(self, path, writes, metrics, resumes=False):
        """path: None before make(). resumes: whether there is a checkpoint to continue from."""
        self.path, self.writes, self.metrics, self.resumes = path and Path(path), writes, metrics, resumes
        self.file = None  # log.jsonl
        # What plot() draws of the log: of every step its number and its loss; of every epoch its steps, and its row.
        self.steps, self.losses, self.per_epoch, self.epochs = array("d"), array("d"), Counter(), []

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

    def announce(self, config, notes, state, images, val_images, world, device):
        """Prints what is about to happen, writes config.yaml, and drops what the log has beyond the steps and epochs of
        `state`, a TrainingState, and files that were half written when the machine stopped."""
        text = yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=1000)
        replace_atomically(self.path / "config.yaml", lambda file: file.write(text.encode()))
        for file in self.path.glob("*.tmp"):
            file.unlink()
        kept = [row for row in read_log(self.path)
                if (row["step"] < state.step if "step" in row else row["epoch"] <= state.epoch)]
        replace_atomically(self.path / "log.jsonl",
                           lambda file: file.write("".join(json.dumps(row) + "\n" for row in kept).encode()))
        for row in kept:
            self._remember(row)
        source = f"{config.data}" if config.data else "rendered scenes, because no --data was given"
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        print(f"train {config.model}, attn {config.attn or 'default'}, {parameters:,} parameters, on {source}")
        print(f"  {images} training and {val_images} validation images of {config.num_classes} classes at "
              f"{config.img_size} px, {config.epochs} epochs in batches of {config.batch_size}, {world} x {device}")
        for note in notes:
            print("  " + note)
        if state.epoch >= config.epochs or state.epoch and state.step == config.max_steps:
            print(f"  nothing is left to do: all {state.step:,} steps are made, in {self.path}/")
        elif state.step:
            print(f"  continues after step {state.step:,}, in epoch {state.epoch + 1}, in {self.path}/")
        else:
            print(f"  writes to {self.path}/")
        print("configuration:\n" + "".join("  " + line + "\n" for line in text.splitlines()), flush=True)

    def log(self, **row):
        """One line of log.jsonl.

        A step: step, epoch from 0, loss, lr; saving_s, seconds, where checkpoints held it up. An epoch: epoch from 1,
        train_loss, val_loss if the task has one, the metrics, images_per_s, waiting (share of the time that its steps
        waited for data), evaluation_s and saving_s in seconds, memory in bytes.
        """
        if self.writes:
            with naming(self.path / "log.jsonl"):
                if self.file is None:  # stays open: on a network disk opening takes milliseconds
                    self.file = open(self.path / "log.jsonl", "ab", buffering=0)
                self.file.write(json.dumps(row).encode() + b"\n")
            self._remember(row)

    def close(self):
        if self.file:
            self.file.close()

    def _remember(self, row):
        """Of a row of the log what plot() draws: in 300 epochs of ImageNet it has 375,000."""
        if "step" in row:
            self.steps.append(row["step"])
            self.losses.append(row["loss"])
            self.per_epoch[row["epoch"]] += 1
        else:
            self.epochs.append(row)

    def sync_log(self):
        """Puts the log on the disk."""
        with naming(self.path / "log.jsonl"), open(self.path / "log.jsonl", "a") as file:
            os.fsync(file.fileno())

    def plot(self):
        """curves.png: loss of every step and epoch, and the metrics, against epochs."""
        if not self.writes:
            return
        epochs, per_epoch = self.epochs, max(self.per_epoch.values(), default=1)
        at = [row["epoch"] for row in epochs]
        figure = Figure(figsize=(10, 4), layout="constrained")
        losses, accuracy = figure.subplots(1, 2)
        losses.plot([(step + 1) / per_epoch for step in self.steps], self.losses, color="0.8", label="step")
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


def replace_atomically(path, write, previous=None):
    """write(file) into a binary file that takes the place of `path` when it is whole and on the disk.

    previous: where the old file goes. Raises OSError, naming `path`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # beside it: a rename between disks is not atomic
    try:
        with naming(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_log(folder):
    """The rows of a run's log.jsonl, dicts; none where there is no log. Left out are lines that a machine which stopped
    did not write to their end: halves, and NULs."""
    path, rows = Path(folder) / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and "epoch" in row else []
    return rows


@contextlib.contextmanager
def naming(path):
    """An OSError in this block names the file, which the one of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
