"""Signals that end a run early: what one rank is asked, all do together, when the step is made and saved."""
import atexit
import multiprocessing
import os
import signal

import torch

from train.distributed import max_over_ranks, sum_over_ranks

# Signal -> exit status. Ctrl-C; what clusters send before they kill; what Slurm sends ahead of the end, as a warning.
STATUS = {getattr(signal, name): status for name, status in (("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 0))
          if hasattr(signal, name)}


class Interruption:
    """A context in which these signals are noted, and answered by SystemExit where check() or watch() comes by.

    A second Ctrl-C is a KeyboardInterrupt at once. A signal may reach one rank alone: the ranks agree in mean().
    """

    def __init__(self, rank, world, device):
        self.rank, self.world, self.device = rank, world, device
        self.asked, self.agreed = [], None  # signals that came to this rank; the one on which all ranks agree

    def __enter__(self):
        self.before = {number: signal.signal(number, self._ask) for number in STATUS}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is SystemExit and self.rank == 0:
            print(f"stopped by {self.agreed.name} and saved; `--resume` goes on from there", flush=True)

    def _ask(self, number, frame):
        if number == signal.SIGINT and number in self.asked:
            raise KeyboardInterrupt
        self.asked.append(number)
        if self.rank == 0:  # os.write: the signal may have come in the middle of a print
            again = "; once more: at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: stops when this step is made and saved{again}\n".encode())

    def mean(self, loss):
        """The mean over all ranks of a scalar tensor, a float, the same on each, so that all stop together; on the way
        they tell each other which signals came."""
        flags = [number in self.asked for number in STATUS]
        total, *flags = sum_over_ranks(torch.stack([loss, *loss.new_tensor(flags)])).tolist()
        self._agree(flags)
        return total / self.world

    def check(self):
        """Raises SystemExit, with the signal's status, on all ranks or none."""
        if self.agreed is not None:
            raise SystemExit(STATUS[self.agreed])

    def watch(self, loader):
        """The batches of an evaluation, after each of which it may end."""
        return _Watched(loader, self)

    def _agree(self, flags):
        self.agreed = next((number for number, flag in zip(STATUS, flags) if flag), None)


class _Watched:
    def __init__(self, loader, interruption):
        self.loader, self.interruption, self.dataset = loader, interruption, loader.dataset

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        ours = self.interruption
        common = -max_over_ranks(-len(self.loader), ours.device)  # ranks may differ by a batch
        for i, batch in enumerate(self.loader):
            yield batch
            if i < common:
                flags = sum(1 << bit for bit, number in enumerate(STATUS) if number in ours.asked)
                flags = max_over_ranks(flags, ours.device)
                ours._agree([flags >> bit & 1 for bit in range(len(STATUS))])
                ours.check()


def outlive_signals(worker=None):
    """For processes that read images: signals are often sent to a whole group of processes, and the last step still
    needs them. After a SIGTERM, by which their own process ends them, too, they have half a minute."""
    for number in STATUS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


@atexit.register  # before that of multiprocessing, which sends SIGTERM to what is left, and waits
def _end_workers():
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their end for an error
    for child in children:
        child.kill()
