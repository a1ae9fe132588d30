"""Runs that are stopped, by a signal or by their machine, at any moment: they go on bit-identical."""
import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eval import imagenet
from eval.tasks import task_of
from test_tokens import VOLO
from train import checkpoint as module
from train import classification, loop, runs
from train.checkpoint import read_whole
from train.config import KEYS, Config
from train.interruption import STATUS, Interruption
from train.run_folder import read_log
from train.state import TrainingState
from training import (
    ROOT,
    assert_same,
    checkpoint,
    command_line,
    detector,
    over_ranks,
    repeatable,
    rows,
    run_py,
    segmenter,
    tiny,
    train,
)

CPU = torch.device("cpu")
RUNS = {  # and by which signal, in which step, each is stopped
    "classification": (tiny(attn="window", limit=24, accumulate=2, drop_path_rate=0.2, mixup=0.8, ema=0.9, amp="fp16",
                            clip_grad=1.0), "SIGINT", 4),
    "segmentation": (segmenter(limit=12, accumulate=2, ema=0.9), "SIGTERM", 2),
    "detection": (detector(limit=12, accumulate=2), "SIGUSR1", 3)}


def assert_same_run(whole, cut):
    """These two folders hold the same weights, scores and log."""
    for name in ("last.pt", "best.pt"):
        first, second = (torch.load(os.path.join(run, name), weights_only=True) for run in (whole, cut))
        for part in first.keys() & {"model", "ema", "optimizer", "scaler", "epoch", "step", "losses"}:
            assert_same(first[part], second[part])
    first, second = ([repeatable(row) for row in rows(run)] for run in (whole, cut))
    assert first == second


def train_until(config, at, act, **options):
    """Trains, and does `act` in the middle of step `at` of those made here, counted from 1."""
    task, passes = task_of(config.model), []

    def loss(*arguments):
        passes.append(1)
        if len(passes) == config.accumulate * at:
            act()
        return task.training.loss(*arguments)
    training = SimpleNamespace(datasets=task.training.datasets, loss=loss)
    return loop.train(config, training, task.evaluation, **options)


def assert_stopped_run_resumes(config, folder):
    """A run that SIGTERM stops in its second step and that is resumed, in folder/cut, is the one in folder/whole."""
    whole, cut = (replace(config, out=str(folder / name)) for name in ("whole", "cut"))
    train(whole)
    with pytest.raises(SystemExit):
        train_until(replace(cut), 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(cut, resume=True)
    assert_same_run(whole.out, cut.out)


@pytest.mark.parametrize("name", RUNS)
def test_stopped_by_a_signal_and_then_without_power_a_run_ends_as_if_nothing_had_been(name, tmp_path, capfd):
    """Three steps an epoch, two epochs."""
    config, signal_name, at = RUNS[name]
    train(replace(config, out=str(tmp_path / "whole")))
    cut = tmp_path / "cut"
    config, number = replace(config, out=str(cut), save_minutes=0), getattr(signal, signal_name)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train_until(replace(config, save_minutes=15), at, lambda: os.kill(os.getpid(), number))
    assert stop.value.code == STATUS[number] and signal.getsignal(number) == before
    printed = capfd.readouterr()
    assert f"stopped by {number.name} and saved" in printed.out and f"{number.name}: stops when" in printed.err
    saved = checkpoint(cut)
    assert saved["step"] == at and saved["epoch"] == (at - 1) // 3 and len(saved["losses"]) == (at - 1) % 3 + 1

    def fail():
        raise InterruptedError("power cut")
    with pytest.raises(InterruptedError):
        train_until(replace(config), 5 - at, fail, resume=True)
    assert f"continues after step {at}" in capfd.readouterr().out
    assert 3 <= checkpoint(cut)["step"] <= 4
    with open(cut / "log.jsonl", "a") as log:
        log.write('{"step": 4, "epoch": 1, "loss": 9.0}\n{"step": 5, "epo')
    with open(cut / "log.jsonl", "ab") as log:
        log.write(b"\n" + bytes(300) + b"\n[]\n7")
    (cut / "last.pt.1.tmp").touch()
    train(config, resume=True)
    assert_same_run(tmp_path / "whole", cut)
    assert not list(cut.glob("*.tmp"))


def test_an_epoch_survives_its_evaluation(tmp_path, monkeypatch):
    config = tiny(epochs=1)
    train(replace(config, out=str(tmp_path / "whole")))
    for fault in (lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: [][0]):
        def stopped(model, loader, *arguments, fault=fault, evaluate=imagenet.evaluate):
            assert len(loader) == 2
            fault()
            return evaluate(model, loader, *arguments)
        cut = tmp_path / str(len(list(tmp_path.iterdir())))
        with monkeypatch.context() as patch, pytest.raises((SystemExit, IndexError)):
            patch.setattr(imagenet, "evaluate", stopped)
            train(replace(config, out=str(cut)))
        saved = checkpoint(cut)
        assert saved["step"] == len(saved["losses"]) == 3 and saved["epoch"] == 0 and not saved["history"]
        assert not (cut / "best.pt").exists()
        train(replace(config, out=str(cut)), resume=True)
        assert_same_run(tmp_path / "whole", cut)


def test_a_full_disk_ends_the_epoch_that_meets_it(tmp_path, monkeypatch):
    """What the writer's thread meets is said in the next steps, not when the epoch is saved."""
    written, save = [], module.save_atomically

    def full(state, path, *rest):
        written.append(path.name)
        if len(written) > 2:  # last.pt before an evaluation, best.pt after it
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(state, path, *rest)
    monkeypatch.setattr(module, "save_atomically", full)
    with pytest.raises(OSError) as error:
        train_until(tiny(epochs=2, out=str(tmp_path / "run")), 4, lambda: time.sleep(0.5))
    assert error.value.filename == str(tmp_path / "run" / "last.pt") and written == ["last.pt", "best.pt", "last.pt"]
    assert [row["step"] for row in rows(tmp_path / "run") if "step" in row] == [0, 1, 2]


def test_the_rate_of_an_epoch_is_of_both_its_parts(tmp_path, monkeypatch):
    clock, learning_rate = [0], loop.learning_rate
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def tick(*arguments):
        clock[0] += 1
        return learning_rate(*arguments)
    monkeypatch.setattr(loop, "learning_rate", tick)
    config = tiny(out=str(tmp_path / "run"), epochs=1)
    with pytest.raises(SystemExit):
        train_until(replace(config), 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    (epoch,) = train(config, resume=True)
    assert epoch["images_per_s"] == 3 * 8 / 3  # a step of 8 images a second


def test_the_second_ctrl_c_stops_at_once():
    interruption = Interruption(0, 1, CPU)
    signals = [signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt), interruption:
        for number in [*signals, signal.SIGINT]:  # a cluster may send its own again
            os.kill(os.getpid(), number)
    assert interruption.asked == signals


def test_a_signal_to_one_rank_stops_all():
    def step(rank):
        interruption = Interruption(rank, 3, CPU)
        first = interruption.receive(interruption.send(torch.tensor(float(rank)))), interruption.agreed
        interruption.asked += [[], [signal.SIGTERM], [signal.SIGUSR1]][rank]
        mean = interruption.receive(interruption.send(torch.tensor(float("nan") if rank else 0.0)))
        assert mean != mean
        with pytest.raises(SystemExit) as stop:
            interruption.check()
        return first, stop.value.code
    assert over_ranks(3, step) == [((1.0, None), 143)] * 3


def test_an_evaluation_is_left_by_all_ranks_after_the_same_batch():
    class Batches(list):
        dataset = "photographs"

    def evaluate(rank):
        interruption, seen = Interruption(rank, 2, CPU), []
        watched = interruption.watch(Batches(range(5 - rank)))
        assert len(watched) == 5 - rank and watched.dataset == "photographs" and list(watched) == list(range(5 - rank))
        with pytest.raises(SystemExit) as stop:
            for batch in watched:
                seen.append(batch)
                if rank and batch == 2:
                    interruption.asked.append(signal.SIGUSR1)
        return seen, stop.value.code
    assert over_ranks(2, evaluate) == [([0, 1, 2], 0)] * 2


def test_workers_make_the_step_that_a_signal_to_all_processes_lets_end(tmp_path):
    """As a terminal and a cluster send it; the process of the workers ends them afterwards."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_interruption import tiny, train_until
from run import main
import run
run.train = lambda argv: train_until(tiny(out={str(tmp_path / "run")!r}, workers=1, epochs=1), 1,
                                     lambda: os.killpg(0, signal.SIGTERM))
run.COMMANDS["train"] = run.train
sys.exit(main(["train"]))
""")
    done = subprocess.run([sys.executable, script], start_new_session=True, timeout=60, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert checkpoint(tmp_path / "run")["step"] == 1 and "stopped by SIGTERM and saved" in done.stdout


TWO_RANKS = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from dataclasses import replace
from test_interruption import VOLO, Config, train, train_until
config = Config(**{{**VOLO, "ema": 0.5, "accumulate": 2, "batch_size": 8, "epochs": 1}})
rank = int(os.environ["RANK"])
# Each run with a store of its own: in torchrun's the addresses of the one before would still be found.
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
ports = iter({ports})
os.environ["MASTER_PORT"] = next(ports)
train(replace(config, out={out!r} + "/whole"))
os.environ["MASTER_PORT"] = next(ports)
try:
    train_until(replace(config, out={out!r} + "/cut"), 1, lambda: rank and os.kill(os.getpid(), signal.SIGTERM))
    status = 0
except SystemExit as stop:
    status = stop.code
assert status == 143, status
os.environ["MASTER_PORT"] = next(ports)
train(replace(config, out={out!r} + "/cut"), resume=True)
"""


def test_two_ranks_stop_together_and_go_on_and_score_what_they_save(tmp_path):
    """A signal to rank 1 alone; batch norm, whose statistics differ between ranks, under a moving average."""
    script = tmp_path / "script.py"
    with contextlib.ExitStack() as free:
        sockets = [free.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [str(free_port.getsockname()[1]) for free_port in sockets]
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(tmp_path), ports=ports))
    run_py(ranks=2, script=script)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    config = Config(**VOLO)
    best = torch.load(tmp_path / "whole" / "best.pt", weights_only=True)
    state = TrainingState(replace(config, num_classes=len(best["classes"])), 1, CPU)
    state.model.load_state_dict(best["ema"])
    loader = imagenet.loader(classification.Scenes.of(config, validation=True), 4, 0, 1, 0)
    logged = best["history"][-1]["val_loss"]
    assert imagenet.evaluate(state.model, loader, CPU)["loss"] == pytest.approx(logged, abs=1e-6)


def test_ranks_evaluate_with_the_statistics_of_rank_0():
    def share(rank):
        model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
        for buffer in [*model.buffers(), *average.buffers()]:
            buffer.fill_(7 - rank)
        TrainingState.share_buffers(SimpleNamespace(model=model, ema=average))
        return {float(value) for part in (model, average) for buffer in part.buffers() for value in buffer.flatten()}
    assert over_ranks(2, share) == [{7.0}] * 2


@pytest.mark.slow
def test_killed_at_27_moments_a_run_ends_as_if_nothing_had_been(tmp_path):
    """SIGKILL at random moments, every third inside the writing of a checkpoint; prints what became of each."""
    rng, inside = random.Random(0), 0
    print("\n| run | killed | log ends at step | moment | checkpoint of step | steps lost |\n|---|--:|--:|---|--:|--:|")
    for task, ranks in (("classification", 1), ("segmentation", 1), ("detection", 2)):
        config = replace(RUNS[task][0], epochs=12, save_minutes=0, accumulate=1)
        names = [name for name in KEYS if name != "model" and getattr(config, name) != getattr(Config(), name)]
        command = ["train", config.model, *command_line(config, *names)]
        whole, cut = tmp_path / f"{task}-whole", tmp_path / f"{task}-cut"
        run_py(*command, "--out", whole, ranks=ranks)
        for kill in range(1, 10):
            killed_inside = kill_run([*command, "--out", cut, "--resume"], ranks, cut, rng, inside=kill % 3 == 1)
            inside += killed_inside
            logged = max((row["step"] + 1 for row in read_log(cut) if "step" in row), default=0)
            saved = read_whole(runs.checkpoints(cut)[0])["step"]
            moment = "a checkpoint is being written" if killed_inside else "any"
            print(f"| {task}, {ranks} | {kill} | {logged} | {moment} | {saved} | {logged - saved} |", flush=True)
        run_py(*command, "--out", cut, "--resume", ranks=ranks)
        assert_same_run(whole, cut)
        print(f"| {task}, {ranks} | - | 36 | ends bit-identical to the run that nobody killed | 36 | 0 |", flush=True)
    assert inside >= 5


def kill_run(arguments, ranks, folder, rng, inside):
    """Starts run.py, and kills it with all its ranks after one to four checkpoints -> whether one was half written."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    seen, enough = set(), rng.randint(2, 5)

    def saved():
        with contextlib.suppress(FileNotFoundError):  # between two renames
            seen.add((folder / "last.pt").stat().st_mtime_ns)
        return len(seen) >= enough

    def wait_for(condition):
        end = time.monotonic() + 120
        while not condition():
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.001)
    with subprocess.Popen([sys.executable, *torchrun, "run.py", *map(str, arguments)], cwd=ROOT, env=environment,
                          stdout=subprocess.DEVNULL) as run:
        wait_for(saved)
        time.sleep(rng.random() / 5)
        processes = [*map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()), run.pid]
        if inside:
            wait_for(lambda: list(folder.glob("*.pt.*.tmp")))
        for process in processes:
            os.kill(process, signal.SIGKILL)
    while any(Path(f"/proc/{process}/stat").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]
              for process in processes):
        time.sleep(0.01)
    return bool(list(folder.glob("*.pt.*.tmp")))
