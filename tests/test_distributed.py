"""Ranks under torchrun: how a run ends when one of them fails, and two machines with folders of their own."""
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from photographs import image_folder
from train import watch
from train.distributed import agree, inventory, leave_ranks, tensors_from_rank_0
from training import ROOT, TINY, assert_same, checkpoint, command_line, over_ranks, repeatable, rows, tiny

OPTIONS = command_line(tiny(), *TINY, "attn")[1:]
HOST = socket.gethostname()


def torchrun(folder, *arguments, fault="none:0:0", node=None, port=0, ranks=2):
    """A started torchrun of 2 ranks, or one node of two with one rank; what it prints goes to `folder`/printed."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    where = ["--standalone", "--nproc-per-node", str(ranks)] if node is None else [
        "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", "--master-addr", "localhost",
        "--master-port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "FAULT": fault}
    command = [sys.executable, "-m", "torch.distributed.run", *where, ROOT / "tests" / "faulty.py", "train", "swin_t"]
    with open(Path(folder) / "printed", "w") as printed:
        return subprocess.Popen([*map(str, command), *OPTIONS, *map(str, arguments)], cwd=folder, env=environment,
                                stdout=printed, stderr=subprocess.STDOUT)


def said(folder):
    """Lines that begin with "error: "."""
    return re.findall(r"^error: .*", (Path(folder) / "printed").read_text(), re.MULTILINE)


def survivors(marker):
    """Processes whose command line has `marker` in it."""
    found = subprocess.run(["pgrep", "-f", str(marker)], capture_output=True, text=True).stdout.split()
    return [pid for pid in found if int(pid) != os.getpid()]


def two_nodes(folder, *arguments, faults=("none:0:0", "none:0:0")):
    """Exit statuses of two torchruns, each with a working folder of its own."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    nodes = [torchrun(folder / f"node{node}", *arguments, node=node, port=port, fault=faults[node]) for node in (0, 1)]
    return [node.wait(120) for node in nodes]


def test_a_full_disk_on_one_rank_ends_both_with_its_message(tmp_path):
    start = time.monotonic()
    job = torchrun(tmp_path, "--epochs", "500", fault="disk:1:3")
    assert job.wait(60) and time.monotonic() - start < 40
    assert said(tmp_path) == [f"error: rank 1 of 2 on {HOST}: runs/x/last.pt: No space left on device"]
    printed = (tmp_path / "printed").read_text()
    assert printed.index("error: rank 1") < printed.index("ChildFailedError")
    assert printed.count("Traceback") == 1, "torchrun's own alone"


def test_tensors_of_rank_0_arrive_as_they_were():
    values = {"model": {"w": torch.randn(3, 4), "of no axis": torch.tensor(7), "none": torch.empty(0, 2)},
              "optimizer": [{"lr": 0.1, "betas": (0.9, 0.99)}, torch.arange(6, dtype=torch.bfloat16),
                            torch.tensor([True, False]), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
                            torch.randn(4, 6)[:, ::2]], "epoch": 3, "ema": None}
    received = over_ranks(3, lambda rank: tensors_from_rank_0(values if rank == 0 else None, torch.device("cpu")))
    for value in received:
        assert_same(values, value)
    assert received[1]["optimizer"][3].is_contiguous(memory_format=torch.channels_last)
    assert received[1]["model"]["w"] is not values["model"]["w"]

    def damaged(rank):
        with pytest.raises(ValueError, match="damaged"):
            tensors_from_rank_0(ValueError("damaged") if rank == 0 else None, torch.device("cpu"))
    over_ranks(2, damaged)


def test_the_inventory_names_what_differs(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "photos", {"train": 3, "val": 2}, ("cat", "dog"))
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "train" / ".ipynb_checkpoints").mkdir()
    (other / "train" / ".ipynb_checkpoints" / "0.png").touch()
    (other / ".DS_Store").touch()
    assert inventory(folder) == inventory(other) and len(inventory(folder)) == 4
    walk = os.walk
    with monkeypatch.context() as patch:  # another file system
        patch.setattr(os, "walk", lambda *place, **options: (
            (place, folders, sorted(files)[::-1]) for place, folders, files in walk(*place, **options)))
        turned = inventory(folder)
    assert turned == inventory(folder)
    (folder / "val" / "\udce9.png").touch()  # no UTF-8
    assert len(inventory(folder)) == 5
    (folder / "val" / "\udce9.png").unlink()
    (other / "val" / "dog" / "0.png").rename(other / "val" / "dog" / "7.png")
    (other / "notes").mkdir()
    (other / "notes" / "classes.txt").write_text("a")
    first, second = inventory(folder), inventory(other)
    assert [name for name in first if first[name] != second.get(name)] == ["val/dog"]
    (other / "notes" / "classes.txt").write_text("b")
    assert inventory(other)["notes/classes.txt"] != second["notes/classes.txt"]


def test_ranks_agree_on_all_but_places(tmp_path, monkeypatch):
    folder, told = image_folder(tmp_path / "photos", {"train": 2, "val": 2}), {}
    monkeypatch.setattr(watch, "current", SimpleNamespace(agree=lambda subject, facts: told.update(facts)))
    agree(tiny(data=str(folder), out="mine", workers=3, num_classes=2), range(24), range(9), ["cat", "dog"])
    assert told["class 1"] == "dog" and told["the number of training images"] == 24 and told["batch_size"] == 8
    assert told.keys() > {"train/cat", "val/dog", "seed", "limit", "model_args", "of validation images"}
    assert not told.keys() & {"data", "weights", "token_labels", "out", "workers"}


def test_a_rank_that_failed_does_not_wait_for_the_others_to_leave(monkeypatch):
    left = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(1))
    monkeypatch.setattr(watch, "current", object())
    leave_ranks(ValueError, ValueError(), None)
    assert not left
    leave_ranks()
    leave_ranks(SystemExit, SystemExit(143), None)
    monkeypatch.setattr(watch, "current", None)
    leave_ranks(ValueError, ValueError(), None)
    assert len(left) == 3


@pytest.mark.slow
def test_no_rank_survives_another(tmp_path):
    """Each of two ranks is killed at ten random moments, from its start to the middle of training."""
    draw, times = random.Random(0), []
    for number in range(20):
        folder, rank, moment = tmp_path / str(number), number % 2, draw.uniform(0, 8)
        job = torchrun(folder, "--epochs", "5000", "--out", folder / "run", fault=f"kill:{rank}:{moment:.3f}")
        assert job.wait(90) != 0
        printed = (folder / "printed").read_text()
        times.append(time.time() - float(re.search(r"fault at ([\d.]+)", printed)[1]))
        assert not survivors(folder), (rank, moment)
        assert f"error: rank {rank} of 2 on {HOST}: died" in printed or "Signal 9 (SIGKILL)" in printed
        print(f"rank {rank} killed after {moment:.2f} s: torchrun ended {times[-1]:.1f} s later; {said(folder)}")
    assert max(times) < 30


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_and_says_where(tmp_path):
    for rank in (0, 1):
        job = torchrun(tmp_path / str(rank), "--timeout-minutes", "0.2", fault=f"hang:{rank}:2")
        assert job.wait(90)
        (line,) = said(tmp_path / str(rank))
        assert line.startswith(f"error: rank {rank} of 2 on {HOST}: has stood for ") and "tests/faulty.py" in line
        assert f"rank {1 - rank} has waited for others" in line


@pytest.mark.slow
def test_on_two_machines_rank_0s_folder_counts(tmp_path):
    options = ["--epochs", "3"]
    assert two_nodes(tmp_path / "whole", *options) == [0, 0]
    cut = tmp_path / "cut"
    # 24 images in batches of 8, 3 steps an epoch: in the middle of the second
    assert all(two_nodes(cut, *options, faults=("none:0:0", "disk:1:5")))
    message = f"error: rank 1 of 2 on {HOST}: runs/x/last.pt: No space left on device"
    assert said(cut / "node0") == said(cut / "node1") == [message]
    assert not (cut / "node1" / "runs").exists()
    assert two_nodes(cut, *options, "--resume") == [0, 0]
    assert "continues after step 3" in (cut / "node0" / "printed").read_text()
    runs = [tmp_path / name / "node0" / "runs" / "swin_t-elsa-scenes" for name in ("whole", "cut")]
    assert not (cut / "node1" / "runs").exists() and not (tmp_path / "whole" / "node1" / "runs").exists()
    whole, resumed = map(checkpoint, runs)
    for name in ("model", "ema", "optimizer", "scaler", "epoch"):
        assert_same(whole[name], resumed[name])
    assert [repeatable(row) for row in rows(runs[0])] == [repeatable(row) for row in rows(runs[1])]
    # A folder that only rank 0's machine has
    assert two_nodes(cut, *options, "--resume", "runs/swin_t-elsa-scenes") == [0, 0]


@pytest.mark.slow
def test_machines_with_other_data_or_code_are_refused(tmp_path):
    for node, dogs in ((0, 4), (1, 3)):
        folder = image_folder(tmp_path / f"node{node}" / "photos", {"train": 4, "val": 4}, ("cat", "dog"))
        for number in range(dogs, 4):
            (folder / "train" / "dog" / f"{number}.jpg").rename(folder / "train" / "dog" / f"other{number}.jpg")
    options = ["--data", "photos", "--batch-size", "4", "--workers", "0", "--limit", "null", "--val-limit", "null"]
    assert all(two_nodes(tmp_path, *options))
    (line,) = said(tmp_path / "node0")
    assert re.match(f"error: rank 1 of 2 on {HOST}: train/dog is '4 files, .*' here and '4 files, ", line)
    assert all(two_nodes(tmp_path / "code", faults=("none:0:0", "code:1:0")))
    assert "the project's code is 'other' here and" in said(tmp_path / "code" / "node1")[0]
