"""train/device.py and train/progress.py: precision, transfer, memory, and what a run shows."""
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from train import detection, segmentation
from train.config import Config
from train.device import autocast, peak_memory, precision, to_device
from train.photographs import to_tensor
from train.progress import Progress

CPU = torch.device("cpu")


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("none", torch.float32),
                                        ("auto", torch.float32)])
def test_autocast_computes_in_what_it_is_told(amp, dtype):
    with autocast(CPU, amp):
        assert torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype == dtype
    assert precision(torch.device("cuda"), amp) == ("bf16" if amp == "auto" else amp)


def test_batches_keep_their_structure():
    batch = (torch.zeros(2, 3, 4, 4), [(4, 4), (3, 4)], [{"boxes": torch.ones(1, 4), "name": "a"}])
    images, sizes, targets = to_device(batch, CPU)
    assert images.shape == (2, 3, 4, 4) and sizes == [[4, 4], [3, 4]]
    assert torch.equal(targets[0]["boxes"], torch.ones(1, 4)) and targets[0]["name"] == "a"


@pytest.mark.parametrize("task", [detection, segmentation])
def test_models_see_zeros_where_bytes_were_padded(task):
    pixels = torch.randint(1, 255, (2, 32, 32, 3), dtype=torch.uint8)
    sizes, labels, seen = [(20, 32), (32, 7)], torch.zeros(2, 32, 32, dtype=torch.int64), []
    rest = (labels, sizes) if task is segmentation else (sizes, [])
    logits = torch.zeros(2, 3, 32, 32)

    def model(images, *_, **__):
        seen.append(images)
        return (logits, logits) if task is segmentation else {"loss": images.sum()}

    task.loss(model, to_device((pixels, *rest), CPU), Config(), None)
    for image, plain, (h, w) in zip(seen[0], pixels, sizes):
        assert torch.equal(image[:, :h, :w], to_tensor(plain[:h, :w].numpy()))
        assert not image[:, h:].any() and not image[:, :, w:].any()


def test_memory_is_that_of_the_process(monkeypatch):
    assert 10 ** 8 < peak_memory(CPU) < 10 ** 12
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=1000 + who))
    for platform, expected in (("linux", 1024 * 1000), ("darwin", 1000)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory(CPU) == expected


def test_a_line_now_and_then_without_a_terminal(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock, 30.0))
    quiet = Progress(steps=100, done=10, batch_size=8, rank=1)
    progress = Progress(steps=100, done=10, batch_size=8, rank=0)
    progress.start = progress.last_line = 0.0
    for _ in range(4):
        progress.step(loss=1.25, lr=1e-3)
        quiet.step(loss=1.25, lr=1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 1 and all(line.startswith("step 1") and "loss 1.250" in line for line in lines)
    assert "images/s" in lines[0] and "left" in lines[0]


def test_an_epoch_is_one_line(capsys):
    row = {"epoch": 2, "train_loss": 0.5, "val_loss": 0.25, "top1": 81.234, "images_per_s": 99.6, "waiting": 0.123,
           "evaluation_s": 3.21, "saving_s": 0.06, "memory": 1.26e9}
    Progress(10, 0, 8, rank=0).epoch(row, 3, {"top1": "top-1"})
    assert capsys.readouterr().out == ("epoch 2/3  loss 0.500  val loss 0.250  top-1 81.23  100 images/s, 12% waiting "
                                       "for data  evaluated in 3.2 s, saved in 0.1 s  1.3 GB\n")
    Progress(10, 0, 8, rank=1).epoch(row, 3, {"top1": "top-1"})
    assert not capsys.readouterr().out
