"""What a run leaves behind beside its checkpoints: config.yaml, log.jsonl, curves.png."""
import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

import yaml

from train.config import task_of, to_dict
from train.curves import Points, curves_of
from train.distributed import from_rank_0
from train.layout import photographs_of
from train.runs import find, has_checkpoint, make


class RunFolder:
    """The folder of one run. Rank 0 writes; on other ranks the writing methods do nothing."""

    def __init__(self, path, writes, metrics, resumes=False):
        """path: None before make(). resumes: whether there is a checkpoint to continue from."""
        self.path, self.writes, self.metrics, self.resumes = path and Path(path), writes, metrics, resumes
        self.file, self.events = None, None  # log.jsonl; TensorBoard's
        self.points = Points()

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
                if (row["step"] < state.step if row["kind"] == "step" else row["epoch"] <= state.epoch)]
        replace_atomically(self.path / "log.jsonl",
                           lambda file: file.write("".join(json.dumps(row) + "\n" for row in kept).encode()))
        for row in kept:
            self.points.add(row)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.events = SummaryWriter(self.path, purge_step=state.step)
        source = f"{config.data}" if config.data else "rendered scenes, because no --data was given"
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        print(f"train {config.model}, attn {config.attn or 'default'}, {parameters:,} parameters, on {source}")
        print(f"  {images} training and {val_images} validation images of {config.num_classes} classes at "
              f"{config.img_size} px, {config.epochs} epochs in batches of {config.batch_size}, {world} x {device}")
        for note in [*notes, *state.notes]:
            print("  " + note)
        if state.epoch >= config.epochs or state.epoch and state.step == config.max_steps:
            print(f"  nothing is left to do: all {state.step:,} steps are made, in {self.path}/")
        elif state.step:
            print(f"  continues after step {state.step:,}, in epoch {state.epoch + 1}, in {self.path}/")
        else:
            print(f"  writes to {self.path}/, all options to config.yaml there")
        if config.verbose:
            print("configuration:\n" + text, end="")
        sys.stdout.flush()

    def log(self, kind, **row):
        """One line of log.jsonl; epochs count from 1, steps from 0.

        kind "step": step, epoch, loss, lr; saving_s, seconds, where checkpoints held it up. "epoch": epoch, train_loss,
        val_loss if the task has one, the metrics, images_per_s, waiting (share of the time that its steps waited for
        data), evaluation_s and saving_s in seconds, memory in bytes.
        """
        if self.writes:
            row = {"kind": kind, **row}
            with naming(self.path / "log.jsonl"):
                if self.file is None:  # stays open: on a network disk opening takes milliseconds
                    self.file = open(self.path / "log.jsonl", "ab", buffering=0)
                self.file.write(json.dumps(row).encode() + b"\n")
            self.points.add(row)
        if self.events:
            for name, value in row.items():
                if name not in ("kind", "step", "epoch") and value is not None:
                    self.events.add_scalar(f"{kind}/{name}", value, row[kind])

    def close(self):
        for writer in (self.file, self.events):
            if writer:
                writer.close()

    def sync_log(self):
        """Puts the log on the disk."""
        with naming(self.path / "log.jsonl"), open(self.path / "log.jsonl", "a") as file:
            os.fsync(file.fileno())

    def plot(self):
        """curves.png: loss of every step and epoch, and the metrics, against epochs."""
        if not self.writes:
            return
        # As UTF-8, whatever the locale takes the name for.
        title = os.fsencode(self.path.name).decode("utf-8", "replace")
        figure = curves_of(self.points, self.metrics, title)
        replace_atomically(self.path / "curves.png", lambda file: figure.savefig(file, format="png", dpi=100))

    def ending(self, config, history):
        """Lines that end a run: what it reached, where that lies, and what to type next."""
        chosen, name = next(iter(self.metrics.items()))
        best, weights = best_row(history, chosen, config.select), self.path / "best.pt"
        which = "the last epoch, as the recipe has it," if config.select == "last" else "the best epoch"
        data = ["--data", config.data] if config.data else []
        shown = ["IMAGE"]
        if config.data and Path(config.data).is_dir():  # no hf: or wds:
            shown = [photographs_of(config.data, task_of(config.model), training=False)[0]]
        script = sys.argv[0] if Path(sys.argv[0]).name == "run.py" else "run.py"
        commands = [["eval", "--weights", str(weights), *data], ["predict", "--weights", str(weights), *shown]]
        return [f"{which} is {best['epoch']} of {len(history)}: {name} {best[chosen]:.2f}, {weights}",
                f"curves: {self.path / 'curves.png'}, log: {self.path / 'log.jsonl'}. Next:",
                *(f"  python {shlex.join([script, *command])}" for command in commands)]


def best_row(history, metric, select):
    """The row of the epoch whose weights best.pt has. select: "best", by the metric, the first of equals, or "last"."""
    best = history[-1]
    for number, row in enumerate(history if select == "best" else ()):
        # NaN, of nothing to find, is taken, too.
        if not row[metric] <= max((earlier[metric] for earlier in history[:number]), default=-1.0):
            best = row
    return best


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
    """The rows of a run's log.jsonl, dicts, see RunFolder.log; none where there is no log. Left out are lines that a
    machine which stopped did not write to their end: halves, and NULs. Older logs have no kinds, and count the epochs
    of steps from 0."""
    path, rows = Path(folder) / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "epoch" in row:
                if "kind" not in row:
                    of_step = "step" in row
                    row = {"kind": "step" if of_step else "epoch", **row, "epoch": row["epoch"] + of_step}
                rows.append(row)
    return rows


@contextlib.contextmanager
def naming(path):
    """An OSError in this block names the file, which the one of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
