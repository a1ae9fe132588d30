"""A step does not wait for the device; what it computed is read some steps later, and none of it is lost."""
import importlib
import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eval.tasks import task_of
from test_interruption import assert_same_run, train_until
from test_tokens import VOLO
from train import loop
from train.bad_images import Replacing
from train.config import Config
from train.data import training_loader
from train.device import to_device
from train.interruption import Interruption
from train.state import TrainingState
from training import checkpoint, over_ranks, rows, segmenter, tiny, train


class Made(TorchFunctionMode):
    """Makes tensors of numbers of the host on the CPU alone: elsewhere that waits."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and out.is_meta:
            raise AssertionError("a copy that waits")
        return out


class Copies(TorchDispatchMode):
    """Notes for each copy from the host to the device whether it is one that nobody waits for."""

    def __init__(self):
        super().__init__()
        self.asynchronous = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.is_meta:
            if str(function).startswith("aten._to_copy") and not args[0].is_meta:
                self.asynchronous.append(kwargs.get("non_blocking", False))
            if str(function).startswith("aten.copy_") and not args[1].is_meta:
                self.asynchronous.append(len(args) > 2 and args[2])
        return out


@pytest.mark.parametrize("config", [
    tiny(mixup=0.8, cutmix=1.0, erasing=0.5, clip_grad=1.0, ema=0.9, accumulate=2, drop_path_rate=0.2),
    Config(**VOLO, ema=0.9), segmenter(ema=0.9)], ids=lambda config: config.model)
def test_no_step_waits_for_the_device(config, monkeypatch):
    """The device is torch's "meta": it has no numbers, so that item(), float() and the like raise."""
    config.num_classes, task = 8, task_of(config.model).training
    training = task.datasets(config)[0]
    loader = training_loader(Replacing(training, 0), config, 0, 1)
    batches = [batch for batch, _ in loader]
    meta = torch.device("meta")
    # torch has neither generators nor a fused AdamW for it, but what the latter computes.
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    state, interruption = TrainingState(config, 1, meta), Interruption(0, 2, meta)  # two ranks, of which one is here
    monkeypatch.setattr(interruption, "receive", lambda sent: float(sent[0].shape == (5,)))
    batches = type("Loader", (list,), {"batch_sampler": SimpleNamespace()})(batches)
    to_device([torch.zeros(1, 1, 1, 3, dtype=torch.uint8)], meta)  # what it keeps on the device
    with Copies() as copies, Made():
        made = list(loop.train_epoch(state, task, batches, 0, 0, interruption))
    assert len(made) == len(batches) // config.accumulate and len(copies.asynchronous) >= 2 * len(batches)
    assert all(copies.asynchronous)


def test_a_copy_that_waits_is_noticed():
    meta = torch.device("meta")
    with Copies() as copies:
        torch.ones(2).to(meta)
        torch.ones(2, device=meta).copy_(torch.ones(2))
        torch.ones(2).to(meta, non_blocking=True)
    assert copies.asynchronous == [False, False, True]
    with pytest.raises(AssertionError), Made():
        torch.ones(2, device=meta).new_tensor([1.0])
    with pytest.raises(RuntimeError):
        torch.ones((), device=meta).item()


@pytest.fixture
def ahead(monkeypatch):
    """As on a GPU: losses are read three steps later."""
    def on(steps=3):
        ahead = property(lambda self: steps, lambda self, steps: None)
        monkeypatch.setattr(Interruption, "ahead", ahead, raising=False)
    return on


def test_a_run_ahead_is_the_same_run(tmp_path, ahead):
    config = tiny(limit=80, ema=0.9)  # ten steps an epoch
    train(replace(config, out=str(tmp_path / "whole")))
    ahead()
    train(replace(config, out=str(tmp_path / "ahead")))
    assert_same_run(tmp_path / "whole", tmp_path / "ahead")
    for name, minutes, saved in (("cut", 15, 7), ("often", 0, 4)):  # all is read wherever a checkpoint is due
        cut = replace(config, out=str(tmp_path / name), save_minutes=minutes)
        with pytest.raises(SystemExit) as stop:
            train_until(cut, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert stop.value.code == 143 and checkpoint(cut.out)["step"] == saved == len(rows(cut.out))
        train(replace(cut), resume=True)
        assert_same_run(tmp_path / "whole", tmp_path / name)


def test_a_loss_that_is_no_number_ends_the_run_before_anything_is_saved(tmp_path, ahead):
    ahead()
    config = tiny(limit=80, epochs=1, save_minutes=0, out=str(tmp_path / "run"))
    model = []

    def lose():
        with torch.no_grad():
            model[0].head.bias.fill_(float("nan"))

    init = TrainingState.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "__init__",
                      lambda self, *rest, **options: init(self, *rest, **options) or model.append(self.model))
        with pytest.raises(FloatingPointError, match=r"the loss of step 4 \(epoch 1"):
            train_until(config, 5, lose)
    assert [row["step"] for row in rows(config.out)] == [0, 1, 2, 3]
    saved = checkpoint(config.out)
    assert saved["step"] == 4 and all(value.isfinite().all() for value in saved["model"].values())


def test_ranks_ahead_stop_and_save_together():
    def run(rank):
        interruption, sent, done = Interruption(rank, 2, torch.device("cpu")), [], []
        for step in range(12):
            if step == 4 and rank == 1:
                interruption.asked.append(signal.SIGUSR1)
            sent.append(interruption.send(torch.tensor(float(step + 2 * rank)), due=rank == 0 and 1 <= step < 3))
            while len(sent) > (0 if interruption.saves else 2):
                done.append((step, interruption.receive(sent.pop(0))))
            if interruption.agreed is not None:
                return done
            if interruption.due:
                done.append("saved")
                interruption.due = False
        return done
    # Step 1 is read in step 3, with all up to it; the signal of step 4 in step 6.
    expected = [(2, 1.0), (3, 2.0), (3, 3.0), (3, 4.0), "saved", (6, 5.0), (6, 6.0), (6, 7.0)]
    assert over_ranks(2, run) == [expected] * 2


def test_the_log_says_what_a_run_spent_its_time_on(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def takes(seconds, function):
        def slow(*arguments, **options):
            clock[0] += seconds
            return function(*arguments, **options)
        return slow
    config = tiny(out=str(tmp_path / "run"), epochs=2)
    task = task_of(config.model)
    monkeypatch.setattr(Replacing, "collate", takes(1, Replacing.collate))
    training = SimpleNamespace(datasets=task.training.datasets, loss=takes(3, task.training.loss))
    evaluation = SimpleNamespace(**{**vars(task.evaluation), "evaluate": takes(7, task.evaluation.evaluate)})
    history = loop.train(config, training, evaluation)
    for epoch in history:
        assert epoch["images_per_s"] == 24 / 12 and epoch["waiting"] == 3 / 12 and epoch["evaluation_s"] == 7
    assert len(history) == 2 and history[0]["saving_s"] >= 0


def test_a_trace_of_steps_names_the_operators(tmp_path, capsys):
    config = tiny(out=str(tmp_path / "run"), limit=40, epochs=1, profile=2)
    train(config)
    with open(tmp_path / "run" / "trace.json") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert f"{tmp_path}/run/trace.json" in capsys.readouterr().out
    assert sum(name == "ProfilerStep#2" for name in names) >= 1 and "ProfilerStep#1" not in names
    assert "elsa::local_attention" in names


def test_the_moving_average_has_the_statistics_of_the_model():
    state = TrainingState(Config(**VOLO, ema=0.75, num_classes=8), 1, torch.device("cpu"))
    for buffer in state.model.buffers():
        buffer.fill_(5)
    state.update_ema()
    assert len([*state.ema.buffers()]) > 3 and all((buffer == 5).all() for buffer in state.ema.buffers())


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("exchange", ["fp32", "bf16"])
def test_the_precision_in_which_ranks_exchange_gradients(group, exchange):
    state = TrainingState(tiny(num_classes=8, grad_exchange=exchange), 2, torch.device("cpu"))
    state.wrap()
    for _ in range(2):  # of a static graph the first pass is a special one
        state.model.zero_grad()
        state.forward(torch.randn(2, 3, 16, 16)).square().mean().backward()
        gradients = [parameter.grad for parameter in state.model.parameters()]
        rounded = [torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients if gradient.any()]
        assert len(rounded) > 50 and all(rounded) == (exchange == "bf16")
    state.unwrap()
