"""run.py with a fault in one rank: FAULT=kind:rank:step:seconds, as the tests of distributed training start it."""
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import run  # noqa: E402
from train import classification, watch  # noqa: E402


def fail(kind):
    print(f"fault at {time.time()}", flush=True)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "disk":
        raise OSError(28, "No space left on device", "runs/x/last.pt")
    if kind == "hang":
        threading.Event().wait()


def prepare(kind, rank, after):
    """kind: kill, disk or hang, at forward pass number `after`, or where that is a fraction so many seconds from now;
    or code."""
    if rank != int(os.environ["RANK"]):
        return
    loss, calls = classification.loss, []

    def at_step(*arguments):
        calls.append(1)
        if len(calls) == int(after):
            fail(kind)
        return loss(*arguments)

    if kind == "code":
        watch._code = lambda: "other"
    elif "." in after:
        threading.Thread(target=lambda: time.sleep(float(after)) or fail(kind), daemon=True).start()
    else:
        classification.loss = at_step


if __name__ == "__main__":
    kind, rank, after = os.environ["FAULT"].split(":")
    prepare(kind, int(rank), after)
    sys.exit(run.main(sys.argv[1:]))
