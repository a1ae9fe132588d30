"""Signals that end a run early: what one rank is asked, all do together, when the step is made and saved.

What ranks tell each other in a step, its loss, these signals and when to save, stays on the device. On a GPU it is read
AHEAD steps later, so that the host prepares steps while the device computes.
"""
import atexit
import multiprocessing
import os
import signal

import torch

from train.distributed import max_over_ranks, sum_over_ranks

# Signal -> exit status. Ctrl-C; what clusters send before they kill; what Slurm sends ahead of the end, as a warning.
STATUS = {getattr(signal, name): status for name, status in (("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 0))
          if hasattr(signal, name)}


AHEAD = 8  # steps that the host may be ahead of a GPU: a signal, or a loss that is no number, is noticed so much later


class Interruption:
    """A context in which these signals are noted, and answered by SystemExit where check() or watch() comes by.

    A second Ctrl-C is a KeyboardInterrupt at once. A signal may reach one rank alone: the ranks agree in receive().
    """

    def __init__(self, rank, world, device):
        self.rank, self.world, self.device = rank, world, device
        self.ahead = AHEAD if device.type == "cuda" else 0
        self.asked, self.agreed = [], None  # signals that came to this rank; the one on which all ranks agree
        self.due = False  # whether all ranks agree that a checkpoint is due

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

    def send(self, loss, due=False):
        """Tells all ranks the loss of a step, a scalar tensor, which signals came, and whether a checkpoint is due,
        without waiting for the device. -> what receive() takes"""
        flags, total, arrived = [number in self.asked for number in STATUS] + [due], loss[None], None
        if self.world > 1:
            flags = loss.new_tensor(flags) if any(flags) else loss.new_zeros(len(flags))  # zeros need no copy
            total, flags = sum_over_ranks(torch.cat([total, flags])), []
        if total.is_cuda:
            total = torch.empty(total.shape, dtype=total.dtype, pin_memory=True).copy_(total, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return total, arrived, flags

    def receive(self, sent):
        """The mean over all ranks of a step's loss, a float, the same on each. All have to receive the same steps
        between the same two steps, and so stop and save together."""
        total, arrived, flags = sent
        if arrived:
            arrived.synchronize()
        total, *flags, due = [*total.tolist(), *flags]
        self._agree(flags)
        self.due = self.due or bool(due)
        return total / self.world

    @property
    def saves(self):
        """Whether all ranks agree to save here, because it is time or because a signal came."""
        return self.due or self.agreed is not None

    def check(self):
        """Raises SystemExit, with the signal's status, on all ranks or none."""
        if self.agreed is not None:
            raise SystemExit(STATUS[self.agreed])

    def watch(self, loader):
        """The batches of an evaluation, after each of which it may end."""
        return _Watched(loader, self)

    def _agree(self, flags):
        self.agreed = self.agreed or next((number for number, flag in zip(STATUS, flags) if flag), None)


class _Watched:
    def __init__(self, loader, interruption):
        self.loader, self.interruption, self.dataset = loader, interruption, loader.dataset

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        ours = self.interruption
        common = -max_over_ranks(-len(self.loader), ours.device)  # ranks may differ by a batch
        for i, batch in enumerate(self.loader, 1):
            yield batch
            if i <= common and i % (2 * ours.ahead or 1) == 0:  # it waits for a GPU
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
