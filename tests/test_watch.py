"""train/watch.py: all ranks end together, and one message says why. Ranks here are small processes without a model."""
import multiprocessing
import os
import random
import signal
import socket
import threading
import time

import pytest
import torch

from train import watch

HOST = socket.gethostname()
processes = multiprocessing.get_context("forkserver")  # imports torch once, not once a rank
processes.set_forkserver_preload(["train.watch"])


def wait():
    threading.Event().wait()


def kill_me(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def fail(error):
    raise error


def peace(rank, _):
    time.sleep(0.1 * rank)


def error_of_one(rank, _):
    fail(OSError(28, "No space left on device")) if rank == 2 else wait()


def error_of_rank_0(rank, _):
    fail(KeyError("x")) if rank == 0 else wait()


def error_of_all(rank, _):
    fail(ValueError("the batch does not fit"))


def death_of_one(rank, _):
    kill_me() if rank == 1 else wait()


def death_of_rank_0(rank, _):
    kill_me() if rank == 0 else wait()


def death_and_what_follows(rank, _):
    """The collective of a rank may tell it before rank 0 sees that another one died."""
    if rank == 2:
        fail(RuntimeError("connection closed by peer"))
    time.sleep(0.1)
    kill_me() if rank == 1 else wait()


def one_hangs(rank, job):
    job.from_rank_0(wait)


def one_does_not_come(rank, job):
    job.from_rank_0(lambda: [deep(random.randrange(100)) for _ in range(100_000)])


def deep(depth):
    """Hardly ever found at the same place twice."""
    time.sleep(0.002) if depth == 0 else deep(depth - 1)


def one_stopped(rank, _):
    kill_me(signal.SIGSTOP) if rank == 2 else wait()


def rank_0_stopped(rank, _):
    kill_me(signal.SIGSTOP) if rank == 0 else wait()


def works(rank, job):
    """One works for longer than the timeout, others wait for it for a shorter time."""
    for number in range(20 if rank else 5):
        time.sleep(0.15 - number / 1000)
        random.random()


def other_facts(rank, job):
    job.agree("data", {"images": 24, "place": rank} if rank == 1 else {"images": 20})
    wait()


def early_facts(rank, job):
    if rank == 0:
        time.sleep(0.5)
    job.agree("data", {"images": 20 + rank // 2})
    wait()


def same_facts(rank, job):
    job.agree("data", {"images": (20, 24), f"of {rank}": rank})
    assert job.from_rank_0(lambda: [rank, "x"]) == [0, "x"]
    assert job.from_rank_0(lambda: None) is None
    time.sleep(0.3)


def other_code(rank, job):
    wait()


def start(rank, world, port, folder, scenario):
    os.dup2(os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GROUP_RANK="0",
                      MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_ERROR_FILE=f"{folder}/error{rank}")
    watch.PERIOD, watch.ANSWER = 0.1, 2
    if scenario is error_of_rank_0:
        os.environ["ELSA_TRACEBACK"] = "1"
    if scenario is other_code and rank == 2:
        torch.__version__ = "1.0"
    with watch.Watch(str) as job:
        if scenario in (death_of_rank_0, rank_0_stopped):
            time.sleep(0.5)  # until all have come
        job.timeout = (100 if scenario is works else 10) * watch.PERIOD / 60
        scenario(rank, job)


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def outcome(scenario, folder, world=3):
    """(exit codes of the ranks, what each of them said, seconds)"""
    port, begin = free_port(), time.monotonic()
    ranks = [processes.Process(target=start, args=(rank, world, port, folder, scenario)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(40)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes, [(folder / str(rank)).read_text() for rank in range(world)], time.monotonic() - begin


NAME = "error: rank {} of 3 on " + HOST + ": "
DIED = "died: killed, out of memory or its machine lost; the log of that machine may say more"


@pytest.mark.parametrize("scenario, codes, said", [
    (peace, [0, 0, 0], None),
    (works, [0, 0, 0], None),
    (same_facts, [0, 0, 0], None),
    (error_of_one, [2, 2, 2], NAME.format(2) + "[Errno 28] No space left on device"),
    (error_of_rank_0, [2, 2, 2], NAME.format(0) + "'x'"),
    (error_of_all, [2, 2, 2], "error: the batch does not fit"),
    (death_of_one, [2, -9, 2], NAME.format(1) + DIED),
    (death_of_rank_0, [-9, 2, 2], NAME.format(0) + DIED),
    (death_and_what_follows, [2, -9, 2], NAME.format(1) + DIED),
    (one_hangs, [2, 2, 2], NAME.format(0) + "has stood for 1 s at "),
    (one_does_not_come, [2, 2, 2], NAME.format(0) + "moves on, now at tests/test_watch.py:"),
    (one_stopped, [2, 2, -9], NAME.format(2) + "does not answer: stopped, or its machine is; rank 0 has stood for 1 s"),
    (rank_0_stopped, [-9, 2, 2], NAME.format(0) + "does not answer, and rank "),
    (other_facts, [2, 2, 2], NAME.format(1) + "images is 24 here and 20 on rank 0; expected the same on all ranks"),
    (early_facts, [2, 2, 2], NAME.format(2) + "images is 21 here and 20 on rank 0; expected the same on all ranks"),
    (other_code, [2, 2, 2], NAME.format(2) + f"torch is '1.0' here and '{torch.__version__}' on rank 0; expected"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_ranks_end_together(tmp_path, scenario, codes, said):
    ended, texts, seconds = outcome(scenario, tmp_path)
    assert ended == codes and seconds < 20
    lines = [line for text in texts for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == (said is not None) and "".join(lines).startswith(said or ""), texts
    if said is None:
        assert not any(texts)
    else:
        assert any(path.name.startswith("error") and said[7:] in path.read_text() for path in tmp_path.iterdir())
    # Where it happened is shown, where wanted, by the rank that failed.
    assert [("Traceback" in text) for text in texts] == [scenario is error_of_rank_0, False, False]
