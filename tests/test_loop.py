"""The loop: what it computes, what it writes, and how it goes on."""
import contextlib
import math
import os
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval import imagenet
from eval.tasks import task_of
from photographs import ade_folder, coco_folder, image_folder
from train import classification, loop, photographs
from train.classification import mixed_cross_entropy
from train.config import resolve
from train.state import TrainingState
from training import ROOT, TINY, assert_same, checkpoint, detector, repeatable, rows, segmenter, tiny, train


@pytest.mark.parametrize("attn, amp", [("elsa", "none"), ("window", "fp16")])
def test_resumed_run_ends_bit_identical(tmp_path, monkeypatch, attn, amp):
    options = dict(attn=attn, amp=amp, epochs=3, limit=16, drop_path_rate=0.2, mixup=0.8, cutmix=1.0,
                   label_smoothing=0.1, clip_grad=1.0, ema=0.9, accumulate=2)
    train(tiny(out=str(tmp_path / "whole"), **options))

    finished, evaluate = [], imagenet.evaluate

    def power_cut(*arguments):
        finished.append(1)
        if len(finished) == 2:
            raise RuntimeError("power cut")
        return evaluate(*arguments)
    monkeypatch.setattr(imagenet, "evaluate", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny(out=str(tmp_path / "cut"), **options))
    monkeypatch.setattr(imagenet, "evaluate", evaluate)
    train(tiny(out=str(tmp_path / "cut"), **options), resume=True)

    whole, cut = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    for name in ("model", "ema", "optimizer", "scaler", "epoch"):
        assert_same(whole[name], cut[name])
    assert amp != "fp16" or whole["scaler"]["_growth_tracker"] == 6  # steps that did not overflow

    logged = [[repeatable(row) for row in rows(tmp_path / name)] for name in ("whole", "cut")]
    assert logged[0] == logged[1]
    files = {"last.pt", "previous.pt", "best.pt", "log.jsonl", "curves.png", "config.yaml"}
    assert set(os.listdir(tmp_path / "cut")) == files


def test_resume_refuses_another_configuration(tmp_path):
    out = str(tmp_path / "run")
    train(tiny(out=out, epochs=1))
    with pytest.raises(ValueError, match="lr: 0.001 -> 0.002"):
        train(tiny(out=out, epochs=1, lr=2e-3), resume=True)
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(out=out, epochs=1))
    with pytest.raises(FileNotFoundError, match="no last.pt"):
        train(tiny(), resume=str(tmp_path / "absent"))


def test_the_average_moves_with_every_step(tmp_path, monkeypatch):
    states, make = [], TrainingState.checkpoint
    monkeypatch.setattr(TrainingState, "checkpoint", lambda *args: states.append(deepcopy(make(*args))) or states[-1])
    train(tiny(out=str(tmp_path / "run"), limit=8, epochs=2, ema=0.9, warmup_epochs=0))  # one step an epoch
    first, _, second, _ = states  # each before and after its evaluation
    for name, average in second["ema"].items():
        expected = 0.9 * first["ema"][name] + 0.1 * second["model"][name]
        assert torch.allclose(average, expected, atol=1e-6), name
    assert not torch.equal(second["ema"]["head.weight"], second["model"]["head.weight"])


def test_steps_are_made_at_the_scheduled_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", lambda step, *_: 0.0 if step < 3 else 1e-3)
    train(tiny(out=str(tmp_path / "still"), epochs=1))
    config = tiny(out=str(tmp_path / "moved"), epochs=2)
    train(config)
    start = TrainingState(config, 1, torch.device("cpu")).model.state_dict()
    assert_same(dict(start), dict(checkpoint(tmp_path / "still")["model"]))
    assert not torch.equal(start["head.weight"], checkpoint(tmp_path / "moved")["model"]["head.weight"])


def test_a_run_without_the_younger_keys_goes_on_with_their_defaults(tmp_path, capsys):
    out = tmp_path / "run"
    train(tiny(out=str(out), epochs=1))
    saved = checkpoint(out)
    for name in ("cooldown_epochs", "select", "lr_per"):
        del saved["config"][name]
    torch.save(saved, out / "last.pt")
    train(tiny(out=str(out), epochs=1, select="last", verbose=True), resume=True)
    printed = capsys.readouterr().out
    assert "select = 'best', the default: the run is older than this option" in printed and "select: best" in printed


def test_max_steps_ends_in_the_middle_of_an_epoch(tmp_path):
    history = train(tiny(out=str(tmp_path / "run"), epochs=3, max_steps=4))  # 3 steps an epoch
    logged = rows(tmp_path / "run")
    assert len(history) == 2 and [row["step"] for row in logged if "step" in row] == [0, 1, 2, 3]
    assert history[1]["train_loss"] == logged[-2]["loss"]


@pytest.mark.parametrize("epoch, step, losses, fits", [
    (0, 0, 0, True), (0, 3, 3, True), (1, 4, 0, True), (1, 8, 4, True), (1, 6, 2, True), (2, 9, 1, True),
    (3, 10, 0, True),  # ended by max_steps
    (1, 5, 0, False), (1, 6, 1, False), (1, 3, 0, False), (0, 5, 5, False), (1, 10, 5, False)])
def test_a_checkpoint_of_other_training_images_is_refused(epoch, step, losses, fits):
    state = TrainingState(tiny(num_classes=3, max_steps=10), 1, torch.device("cpu"))
    saved = {**state.checkpoint(["a", "b", "c"]), "epoch": epoch, "step": step, "losses": [1.0] * losses}
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="an epoch has 4 steps here"):
        state.load(saved, ["a", "b", "c"], steps=4)
        assert (state.epoch, state.step, len(state.losses)) == (epoch, step, losses)


def test_fill_last_makes_one_more_step_of_what_is_left(tmp_path):
    for fill_last, steps in ((False, 2), (True, 3)):
        out = tmp_path / str(fill_last)
        train(tiny(out=str(out), epochs=1, limit=20, fill_last=fill_last))  # in batches of 8
        assert len([row for row in rows(out) if "step" in row]) == steps


@pytest.mark.parametrize("select, epoch", [("best", 2), ("last", 3)])
def test_best_is_of_the_selected_epoch(tmp_path, monkeypatch, select, epoch):
    scores = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(imagenet, "evaluate", lambda *_: {"top1": next(scores), "top5": 50.0, "loss": 1.0})
    train(tiny(out=str(tmp_path / "run"), epochs=3, limit=8, select=select))
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["epoch"] == epoch


def test_every_pass_of_every_epoch_draws_anew(tmp_path, monkeypatch):
    drawn, loss = [], classification.loss

    def record(model, batch, config, seed):
        drawn.append((np.random.default_rng(seed).random(), torch.rand(()).item(), batch[0].sum().item()))
        return loss(model, batch, config, seed)
    monkeypatch.setattr(classification, "loss", record)
    train(tiny(out=str(tmp_path / "run"), epochs=2, accumulate=2))
    assert len(drawn) == 12 and all(len(set(column)) == 12 for column in zip(*drawn))


def test_the_average_is_what_is_evaluated(tmp_path, monkeypatch):
    evaluated = []

    def evaluate(model, *_):
        evaluated.append(deepcopy(model.state_dict()))
        return {"top1": 0.0, "top5": 0.0, "loss": 1.0}
    monkeypatch.setattr(imagenet, "evaluate", evaluate)
    train(tiny(out=str(tmp_path / "run"), epochs=2, limit=8, ema=0.9))
    saved = checkpoint(tmp_path / "run")
    assert_same(dict(evaluated[-1]), dict(saved["ema"]))
    assert not torch.equal(saved["ema"]["head.weight"], saved["model"]["head.weight"])


def test_accumulation_changes_losses_by_rounding_alone(tmp_path):
    train(tiny(out=str(tmp_path / "one"), epochs=1))
    train(tiny(out=str(tmp_path / "two"), epochs=1, accumulate=2))
    one, two = ([row["loss"] for row in rows(tmp_path / name) if "step" in row] for name in ("one", "two"))
    assert len(one) == 3 and one == pytest.approx(two, rel=1e-5)


def test_non_finite_loss_stops_and_keeps_the_last_epoch(tmp_path, monkeypatch):
    calls = []

    def loss(*arguments):
        calls.append(1)
        return mixed_cross_entropy(*arguments) * (math.nan if len(calls) == 5 else 1)
    monkeypatch.setattr(classification, "mixed_cross_entropy", loss)
    with pytest.raises(FloatingPointError, match=r"step 4 \(epoch 2.*is nan.*last losses: \d.*nan"):
        train(tiny(out=str(tmp_path / "run")))
    assert checkpoint(tmp_path / "run")["epoch"] == 1


@pytest.mark.parametrize("config, folder, pattern", [
    (tiny(), lambda root: image_folder(root, {"train": 3, "val": 1}), "train/(cat|dog)/[012].(png|jpg)"),
    (segmenter(), ade_folder, "images/training/[0-4].jpg"),
    (detector(), coco_folder, "instances_train2017.json, [0-4].png")], ids=["class", "segment", "detect"])
def test_a_loss_that_is_not_finite_names_its_images(tmp_path, config, folder, pattern):
    """Those of the pass in question, one of the two in a step."""
    task, named = task_of(config.model), set()
    for guilty in (1, 2):
        passes = []

        def loss(model, batch, config, seed):
            passes.append(1)
            return sum(parameter.sum() for parameter in model.parameters()) * (math.nan if len(passes) == guilty else 0)
        options = dict(data=str(tmp_path / "data"), out=str(tmp_path / f"run{guilty}"), batch_size=4, accumulate=2,
                       limit=4, workers=0)
        folder(tmp_path / "data") if guilty == 1 else None
        training = SimpleNamespace(datasets=task.training.datasets, loss=loss)
        with pytest.raises(FloatingPointError, match=f"It is of .*{pattern}, .*{pattern}. `--resume`") as error:
            loop.train(replace(config, **options), training, task.evaluation)
        named.add(str(error.value).split("It is of ")[1])
    assert len(named) == 2


def test_images_are_named_by_their_keys(tmp_path, monkeypatch):
    class Named(classification.Scenes):
        def name(self, index):
            return f"scene {index}"

        def __getitem__(self, key):
            image, label = super().__getitem__(key)
            return photographs.to_tensor(image.numpy()) * (math.nan if key == (1, 5) else 1), label
    monkeypatch.setattr(classification, "Scenes", Named)
    with pytest.raises(FloatingPointError, match=r"epoch 2.* is nan.*It is of (scene \d+, ){3}scene \d+\.") as error:
        train(tiny(out=str(tmp_path / "run"), accumulate=2))
    assert re.search(r"scene 5\b", str(error.value))


def test_what_one_image_a_pass_cannot_do_is_said(tmp_path, capsys):
    train(tiny(out=str(tmp_path / "run"), epochs=1, batch_size=2, accumulate=2, limit=2, mixup=0.8, cutmix=1.0))
    assert "without effect: mixup, cutmix; a pass has one image" in capsys.readouterr().out
    with pytest.raises(ValueError, match="one image for each of 2 accumulated passes.*batch norm.*at least 4"):
        train(segmenter(out=str(tmp_path / "none"), batch_size=2, accumulate=2))
    assert not (tmp_path / "none").exists()


def test_gradients_are_clipped_in_their_own_units(tmp_path, monkeypatch):
    """fp16 multiplies the loss, and so the gradients, by 65,536 until the optimiser's step."""
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: norms.append(float(clip(*arguments))))
    for amp in ("none", "fp16"):
        train(tiny(out=str(tmp_path / amp), epochs=1, limit=8, clip_grad=1.0, warmup_epochs=0, amp=amp))
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_the_moving_average_begins_with_its_first_update():
    state = TrainingState(tiny(ema=0.75), 1, torch.device("cpu"))
    start = {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1)
    state.update_ema()
    for name, average in state.ema.named_parameters():
        assert torch.allclose(average, start[name] + 0.25), name


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains(tmp_path, amp):
    history = train(tiny(out=str(tmp_path / "run"), epochs=1, amp=amp))
    assert math.isfinite(history[0]["train_loss"])


def test_batch_must_fit_data_and_split(tmp_path):
    with pytest.raises(ValueError, match="--batch-size 24 or less"):
        train(tiny(batch_size=25))
    with pytest.raises(ValueError, match="multiple of 3"):
        train(tiny(batch_size=8, accumulate=3))


def test_two_processes_give_the_losses_of_one(tmp_path):
    """The same images in a step; 9 images of validation, which 2 does not divide."""
    config, _ = resolve({**TINY, "attn": "elsa", "out": str(tmp_path / "one")})  # as the command line below resolves it
    train(config)
    arguments = [f"--{name}={value}" for name, value in {**TINY, "attn": "elsa"}.items() if name != "model"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "run.py", "train", "swin_t", *arguments, "--out", str(tmp_path / "two")], cwd=ROOT,
                   env=environment, check=True, timeout=170, capture_output=True)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    losses = [[row["loss"] for row in run if "step" in row] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for ours, theirs in zip([row for row in one if "top1" in row], [row for row in two if "top1" in row], strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)  # a doubled or lost image would show
