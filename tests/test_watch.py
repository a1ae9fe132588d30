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


def errors_of_each(rank, _):
    fail(ValueError(f"the batch of {rank} does not fit"))


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
    if scenario in (other_code, peace) and rank == 1:
        connect = socket.create_connection  # comes when the others are about to end
        socket.create_connection = lambda *address, **options: time.sleep(1) or connect(*address, **options)
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
    (errors_of_each, [2, 2, 2], "error: rank "),
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


# The parts

def part(monkeypatch, **state):
    """(a watch that watches nothing, what it is about to end with)"""
    job, ended = watch.Watch.__new__(watch.Watch), []
    vars(job).update({"rank": 0, "world": 3, "timeout": 10.0, "hosts": {}, "processes": {}, "peers": {1: None, 2: None},
                      "answers": {}, "failures": [], "decide_at": None, "asked_at": None, "trace": None, "still": 7,
                      "gone": set(), "ending": False, "lock": threading.RLock(), "token": "right",
                      "parent": os.getppid(), "look_at": float("inf"), **state})
    monkeypatch.setattr(job, "_end", lambda rank, message: ended.append((rank, message)), raising=False)
    return job, ended


def test_who_has_stood_for_longest_and_does_not_wait_is_named(monkeypatch):
    stands = [{"seconds": seconds, "waits": waits, "where": f"line {rank}"}
              for rank, (seconds, waits) in enumerate([(700, True), (610, False), (650, False)])]
    (job, ended), sent = part(monkeypatch), []
    monkeypatch.setattr(job, "_send", lambda to, **message: sent.append((to, message)), raising=False)
    monkeypatch.setattr(job, "_stands", lambda: stands[0], raising=False)
    job._stopped(1, stands[1])
    assert sent == [(1, {"where": True}), (2, {"where": True})] and not ended
    job._stopped(2, stands[2])
    assert ended == [(2, "has stood for 650 s at line 2; rank 1 has stood for 610 s at line 1; rank 0 has waited for "
                         "others for 700 s at line 0. Stopped because one stood for --timeout-minutes 10")]
    assert [job._standing({"seconds": seconds, "waits": False, "where": "x"})[:10] for seconds in (299, 301)] \
        == ["moves on, ", "has stood "]


def test_what_is_certain_is_said_at_once(monkeypatch):
    job, ended = part(monkeypatch)
    job._failed(1, 2, "an error")
    assert not ended and job.decide_at is not None
    job._failed(0, 1, "died")
    assert ended == [(1, "died")]


def test_where_a_rank_stands_is_its_own_line(monkeypatch):
    job, _ = part(monkeypatch)
    found = []
    thread = threading.Thread(target=lambda: time.sleep(0.1) or found.append(job._stands()))
    thread.start()
    thread.join()  # in which the main thread is found
    assert ", called at tests/test_watch.py:" in found[0]["where"] and found[0]["where"].endswith(
        "(test_where_a_rank_stands_is_its_own_line)")
    assert not found[0]["waits"] and found[0]["seconds"] == 7 * watch.PERIOD


def test_only_ranks_of_this_machine_are_killed(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda *call: killed.append(call))
    monkeypatch.setenv("GROUP_RANK", "0")
    job, ended = part(monkeypatch, processes={1: [77, "0"], 2: [78, "1"], 3: [79, None]})
    for rank in (1, 2, 3):
        job._kill(rank)
    assert killed == [(77, signal.SIGKILL)]


def test_the_trace_is_that_of_the_rank_that_is_named(monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    job, _ = part(monkeypatch, rank=2, trace="Traceback")
    for rank, printed in ((1, ""), (2, "Traceback\n"), (None, "Traceback\n")):
        job._say(rank, "an error", False)
        assert capsys.readouterr().err == printed


def test_what_a_late_rank_says_does_not_end_the_job_again(monkeypatch):
    job, _ = part(monkeypatch, peers={})
    said = []
    monkeypatch.setattr(watch.os, "_exit", lambda status: None)
    monkeypatch.setattr(job, "_say", lambda rank, text, speaks: said.append(text), raising=False)
    monkeypatch.setattr(job, "_tell_late", lambda rank, text: job._end_with(1, "again", True), raising=False)
    job._end_with(2, "first", True)
    assert said == ["first"]


@pytest.mark.parametrize("sent, accepted", [
    (b'{"token": "wrong", "rank": 1, "host": "h", "process": [5, "0"]}\n', False), (b"GET / HTTP/1.1\r\n\r\n", False),
    (b'{"token": "right", "rank": 1, "host": "h", "process": [5, "0"]}\n{"le', True)])
def test_strangers_are_not_let_in(monkeypatch, sent, accepted):
    job, _ = part(monkeypatch)
    connected, (ours, theirs) = [], socket.socketpair()
    monkeypatch.setattr(job, "_connected", lambda rank, _, rest: connected.append((rank, rest)), raising=False)
    job.server = type("Server", (), {"accept": lambda: (ours, None)})
    with ours, theirs:
        theirs.sendall(sent)
        job._accept()
        assert connected == [(1, b'{"le')] * accepted and (ours.fileno() < 0) == (not accepted)
    assert job.hosts == ({1: "h"} if accepted else {})


def test_the_death_of_rank_0_may_be_another_ranks_doing(monkeypatch):
    for asked_at, expected in ((None, "died"), (1.0, "does not answer, and rank 1 moves on, now at ")):
        ours, theirs = socket.socketpair()
        theirs.close()
        job, ended = part(monkeypatch, rank=1, peers={0: ours}, asked_at=asked_at, processes={0: [5, None]}, still=0)
        job.selector = type("Selector", (), {"unregister": lambda _: None})
        with ours:
            job._receive(0, bytearray())
        assert len(ended) == 1 and ended[0][0] == 0 and ended[0][1].startswith(expected)


def test_without_its_torchrun_a_rank_ends(monkeypatch):
    job, ended = part(monkeypatch)
    job._look()
    assert not ended
    job.parent += 1
    job._look()
    assert ended == [(0, "the process that started it, torchrun, ended")]


def test_the_code_is_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "ROOT", tmp_path)
    (tmp_path / "train" / "deep").mkdir(parents=True)
    (tmp_path / "run.py").touch()
    seen = {watch._code()}
    for name, text in (("run.py", "a"), ("train/a.py", "a"), ("train/deep/b.py", "b"), ("train/a.py", "b")):
        (tmp_path / name).write_text(text)
        seen.add(watch._code())
    assert len(seen) == 5
    (tmp_path / "train" / "notes.txt").touch()
    assert watch._code() in seen
