"""Checkpoints of a run: written while training goes on, and read back whole or not at all.

last.pt is to continue from, previous.pt is the one before it, best.pt is to use.
"""
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from models.weights import check_archive
from train.distributed import from_rank_0, tensors_from_rank_0
from train.run_folder import replace_atomically
from train.runs import checkpoints

PROGRESS = ("optimizer", "scaler", "step", "losses", "seconds", "waiting")  # what best.pt does not have
NEEDED = {"model", "ema", "optimizer", "scaler", "epoch", "config", "classes", "history"}


class Checkpoints:
    """A context: those of one RunFolder. Rank 0 writes them, one after the other, in a thread; at the end all ranks
    wait until the last one is on the disk.

    A checkpoint is a dict of plain types and tensors, so that torch.load(weights_only=True) reads it: see
    TrainingState.checkpoint. minutes: between two of them, see due().
    """

    def __init__(self, folder, minutes):
        self.folder, self.seconds = folder, 60 * minutes
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.saved_at = time.monotonic()
        self.intact = True  # whether last.pt, if there is one, is worth keeping
        self.held_up = self.held_up_epoch = 0.0  # seconds since costs() and costs_of_epoch() were called

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.writer.shutdown()
        if kind is None or kind is SystemExit:  # all ranks come by
            from_rank_0(self.writing and self.writing.exception())

    def load(self, device):
        """(The checkpoint to continue from, on the CPU; notes): last.pt, or if that is damaged previous.pt.

        Only rank 0 reads, whose machine alone may have them; tensors travel by way of `device`. Raises ValueError,
        naming the files, when neither can be read.
        """
        found = None
        if self.folder.writes:
            try:
                found = self._read()
            except ValueError as error:
                found = error
        return tensors_from_rank_0(found, device)

    def _read(self):
        damaged = []
        for path in checkpoints(self.folder.path):
            try:
                checkpoint = read_whole(path)
            except Exception as error:  # damaged bytes make the reader raise anything
                damaged.append(f"{path} is damaged ({' '.join(str(error).split())})")
                self.intact = False
                continue
            return checkpoint, [f"{text}; continues from {path}, the one before it" for text in damaged]
        best = self.folder.path / "best.pt"
        rest = f"{best} has the weights of the best epoch: --weights {best} starts a new run from them"
        raise ValueError(f"--resume: {', and '.join(damaged)}, so that there is no checkpoint to continue from; "
                         f"{rest if best.exists() else 'start a new run'}")

    def due(self):
        """Whether it is time for the next checkpoint. Raises what went wrong with the last one."""
        if self.writing and self.writing.done():
            self.writing.result()
        return self.folder.writes and time.monotonic() - self.saved_at >= self.seconds \
            and (self.writing is None or self.writing.done())

    def save(self, checkpoint, best=False):
        """Copies a checkpoint to host memory and has it written to last.pt; its weights before that to best.pt, if it
        is the best. Waits for the one before, and raises what went wrong with it."""
        if not self.folder.writes:
            return
        start = time.perf_counter()
        if self.writing:
            self.writing.result()
        self.writing = self.writer.submit(self._write, copy_to_host(checkpoint), best)
        self.saved_at = time.monotonic()
        self.held_up += time.perf_counter() - start
        self.held_up_epoch += time.perf_counter() - start

    def costs(self):
        """{"saving_s": seconds that checkpoints have held up training since the last call}, or {}."""
        held_up, self.held_up = self.held_up, 0.0
        return {"saving_s": round(held_up, 6)} if held_up else {}

    def costs_of_epoch(self):
        """The same, as a number; of rank 0, which alone saves."""
        held_up, self.held_up_epoch = self.held_up_epoch, 0.0
        return round(held_up, 6)

    def _write(self, checkpoint, best):
        self.folder.sync_log()  # the log never lacks steps of a checkpoint
        path = self.folder.path
        if best:
            weights = {name: value for name, value in checkpoint.items() if name not in PROGRESS}
            save_atomically(weights, path / "best.pt")
        save_atomically(checkpoint, path / "last.pt", path / "previous.pt" if self.intact else None)
        self.intact = True


def copy_to_host(value):
    """Dicts, lists and tuples with copies of their tensors, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: copy_to_host(part) for name, part in value.items()}
    return type(value)(map(copy_to_host, value)) if isinstance(value, (list, tuple)) else value


def read_whole(path):
    """A checkpoint of which every byte is as it was written: torch.save makes a zip file, which has checksums.

    Raises anything for one that is damaged.
    """
    check_archive(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    missing = NEEDED - set(checkpoint)
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return checkpoint


def save_atomically(state, path, previous=None):
    """torch.save that leaves either the old file or the whole new one, whenever the machine stops.

    previous: where the old file goes.
    """
    def write(file):
        try:
            torch.save(state, file)
        except RuntimeError as error:  # it hides what the disk said behind an error of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error

    replace_atomically(path, write, previous)
