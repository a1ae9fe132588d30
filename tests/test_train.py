"""Scenes, data, configuration, schedule and loop."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import create_model
from train import data, scenes
from train.config import Config, cast, parse_train, read_recipe, resolve
from train.loop import decay_groups, learning_rate, train
from train.losses import mixed_cross_entropy
from train.run_folder import save_atomically

ROOT = Path(__file__).parents[1]
TINY = dict(model="swin_t", img_size=16, patch_size=2, window_size=2,
            model_args=dict(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 4]), limit=24, val_limit=9, epochs=2,
            warmup_epochs=0.5, batch_size=8, lr=1e-3, device="cpu")


def tiny(**changes):
    return Config(**{**TINY, "attn": "elsa", **changes})


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def checkpoint(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


@pytest.fixture
def photos(tmp_path):
    """An ImageFolder tree: 2 classes, odd sizes, one PNG with alpha and one greyscale JPEG among them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 255, (20 + i, 31, 3), dtype=np.uint8))
                if i == 0:
                    image.convert("RGBA").save(folder / "0.png")
                else:
                    (image.convert("L") if i == 1 else image).save(folder / f"{i}.jpg")
    return tmp_path / "photos"


# Scenes

@pytest.mark.parametrize("size", [16, 33, 48])
def test_scene_annotations_come_from_one_drawing(size):
    for index in range(64):
        scene = scenes.draw(index, seed=3, size=size, max_objects=6)
        n = len(scene.labels)
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert scene.boxes.shape == (n, 4) and scene.masks.shape == (n, size, size) and 1 <= n <= 6
        area = scene.masks.sum((1, 2))
        assert (scene.masks.sum(0) <= 1).all(), "a pixel belongs to one object"
        assert area.min() > 0 and area.argmax() == 0 and scene.label == scene.labels[0] == index % len(scenes.CLASSES)
        for box, label, mask in zip(scene.boxes, scene.labels, scene.masks):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert (scene.label_map[mask] == label + 1).all()
        assert (scene.label_map[~scene.masks.any(0)] == scenes.BACKGROUND).all()


def test_scene_is_a_function_of_index_and_seed():
    first, again = scenes.draw(5, seed=1), scenes.draw(5, seed=1)
    for name in ("image", "boxes", "labels", "masks", "label_map"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.image, scenes.draw(5, seed=2).image)
    assert not np.array_equal(first.image, scenes.draw(5 + len(scenes.CLASSES), seed=1).image)


def test_scenes_hide_the_class_from_colour():
    """The mean colour of an image, all that is left without shapes, does not tell its class: nearest class mean is near chance."""
    colours = np.array([scenes.draw(i, size=16).image.mean((0, 1)) for i in range(800)])
    labels = np.arange(800) % len(scenes.CLASSES)
    means = np.array([colours[:400][labels[:400] == c].mean(0) for c in range(len(scenes.CLASSES))])
    guess = ((colours[400:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == labels[400:]).mean() < 0.22  # chance is 0.125, its standard deviation 0.017


def test_training_and_held_out_scenes_are_disjoint_and_balanced():
    training, held_out, classes = data.datasets(tiny(limit=16, val_limit=16))
    assert classes == list(scenes.CLASSES)
    seen = {training[epoch, i][0].numpy().tobytes() for epoch in range(2) for i in range(16)}
    held = {held_out[i][0].numpy().tobytes() for i in range(16)}
    assert len(seen) == 32 and len(held) == 16 and not seen & held
    assert np.bincount([held_out[i][1] for i in range(16)]).tolist() == [2] * 8


def test_scene_refuses_a_size_without_room():
    with pytest.raises(ValueError, match="size = 8"):
        scenes.draw(0, size=8)


# Photographs

def test_samples_do_not_depend_on_workers_or_ranks(photos):
    config = tiny(data=str(photos), limit=None, batch_size=4, randaugment=9.0, erasing=0.5, seed=7)
    training, _, _ = data.datasets(config)

    def epoch(rank, world, workers, number=1):
        loader = data.training_loader(training, config, rank, world, workers)
        loader.batch_sampler.epoch = number
        return [images for images, _ in loader]

    alone, workers = epoch(0, 1, 0), epoch(0, 1, 2)
    assert len(alone) == 3 and all(torch.equal(a, b) for a, b in zip(alone, workers))
    halves = [torch.cat(pair) for pair in zip(epoch(0, 2, 0), epoch(1, 2, 0))]
    assert all(torch.equal(a, b) for a, b in zip(alone, halves))
    assert not torch.equal(alone[0], epoch(0, 1, 0, number=2)[0])


def test_sampling_leaves_torch_generator_alone(photos):
    training, _, _ = data.datasets(tiny(data=str(photos), limit=None))
    state = torch.get_rng_state()
    training[0, 3]
    assert torch.equal(state, torch.get_rng_state())


def test_accumulated_passes_see_the_same_images():
    whole = list(data.ShareSampler(20, 8, 1, seed=1, rank=0, world=1))
    parts = list(data.ShareSampler(20, 8, 2, seed=1, rank=0, world=1))
    assert len(whole) == 2 and [a + b for a, b in zip(parts[::2], parts[1::2])] == whole


def test_every_randaugment_operation_keeps_the_image_format():
    torch.manual_seed(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    for operation in data.OPERATIONS:
        for level, signed in ((0.0, 0.0), (0.9, -0.9), (1.0, 1.0)):
            out = operation(image, level, signed)
            assert out.size == image.size and out.mode == "RGB"
    unchanged = [np.array_equal(np.asarray(data.RandAugment()(image)[0]), np.asarray(image)) for _ in range(400)]
    assert 0.18 < np.mean(unchanged) < 0.36  # neither operation applied: 1/4, and a few that change nothing


def test_randaugment_matches_timm_operations():
    timm = pytest.importorskip("timm.data.auto_augment")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)).resize((48, 60))
    bicubic = dict(resample=Image.BICUBIC, fillcolor=tuple(data.FILL))
    level = 0.9
    expected = [timm.auto_contrast(image), timm.equalize(image), timm.invert(image), timm.rotate(image, 27, **bicubic),
                timm.posterize(image, 1), timm.solarize(image, 26), timm.solarize_add(image, 99), timm.color(image, 1.81),
                timm.contrast(image, 1.81), timm.brightness(image, 1.81), timm.sharpness(image, 1.81)]
    for operation, theirs in zip(data.OPERATIONS, expected):
        assert np.array_equal(np.asarray(operation(image, level, level)), np.asarray(theirs))
    shifts = (timm.shear_x, 0.27), (timm.shear_y, 0.27), (timm.translate_x_rel, 0.405), (timm.translate_y_rel, 0.405)
    for operation, (theirs, amount) in zip(data.OPERATIONS[11:], shifts):
        assert np.array_equal(np.asarray(operation(image, level, -level)), np.asarray(theirs(image, -amount, **bicubic)))


def test_mix_weighs_labels_by_pixels():
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    for seed in range(20):
        mixed, own = data.mix(images, 0.0, 1.0, np.random.default_rng(seed))
        assert mixed[0].mean().item() == pytest.approx(1 - own) and mixed[1].mean().item() == pytest.approx(own)
        mixed, own = data.mix(images, 0.8, 0.0, np.random.default_rng(seed))
        assert torch.allclose(mixed[0], torch.full((3, 8, 8), 1 - own))
    assert data.mix(images, 0.0, 0.0, np.random.default_rng(0))[1] == 1


def test_mixed_cross_entropy_is_that_of_soft_targets():
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    hot = torch.nn.functional.one_hot(labels, 5).float()
    targets = 0.9 * (0.3 * hot + 0.7 * hot.flip(0)) + 0.1 / 5
    assert torch.allclose(mixed_cross_entropy(logits, labels, 0.3, 0.1), torch.nn.functional.cross_entropy(logits, targets))


def test_corrupt_image_is_named(photos):
    bad = photos / "val" / "dog" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    _, val, _ = data.datasets(tiny(data=str(photos), limit=None, val_limit=None))
    with pytest.raises(ValueError, match="dog/2.jpg cannot be read as an image"):
        list(val)


def test_folder_errors_say_what_is_missing(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data.datasets(tiny(data=str(tmp_path / "absent")))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="one folder per class"):
        data.datasets(tiny(data=str(tmp_path / "empty")))
    (photos / "val" / "dog").rename(photos / "val" / "wolf")
    with pytest.raises(ValueError, match="dog.*wolf"):
        data.datasets(tiny(data=str(photos)))
    (photos / "val").rename(photos / "valid")
    with pytest.raises(FileNotFoundError, match="no val/ or test/"):
        data.datasets(tiny(data=str(photos)))


def test_limit_takes_classes_in_turn(photos):
    training, val, _ = data.datasets(tiny(data=str(photos), limit=5, val_limit=2))
    assert sorted(training[0, i][1] for i in range(len(training))) == [0, 0, 0, 1, 1]
    assert [label for _, label in val] == [0, 1]


# Configuration

@pytest.mark.parametrize("name, lr_free", [("swin_t", 0.1), ("swin_s", 0.3), ("swin_b", 0.5)])
def test_recipes_are_the_published_ones(name, lr_free):
    config, _ = resolve(dict(model=name, data="photos"))
    assert config.drop_path_rate == lr_free and (config.ema > 0) == (name == "swin_b")
    assert (config.epochs, config.batch_size, config.lr, config.weight_decay, config.warmup_epochs) == (300, 1024, 1e-3, 0.05, 20)
    assert (config.mixup, config.cutmix, config.erasing, config.label_smoothing, config.clip_grad) == (0.8, 1.0, 0.25, 0.1, 5.0)
    assert (config.randaugment, config.randaugment_std, config.warmup_lr, config.min_lr) == (9.0, 0.5, 1e-6, 1e-5)


def test_options_override_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 5\nlr: 2e-3\nwarmup_epochs: 1\n")
    config, resume, _ = parse_train(["swin_s", "--recipe", str(recipe), "--batch_size", "64", "--epochs", "7", "--compile", "--resume",
                                     "--model-args", "{embed_dim: 12}"])
    assert (config.model, config.epochs, config.lr, config.batch_size) == ("swin_s", 7, 2e-3, 64)
    assert config.model_args == {"embed_dim": 12} and config.compile is True and resume is True


def test_unknown_names_suggest_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="--epohcs; did you mean --epochs"):
        parse_train(["swin_t", "--epohcs", "3"])
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("weigth_decay: 0.1\n")
    with pytest.raises(ValueError, match="'weigth_decay'.*did you mean weight_decay"):
        read_recipe(recipe)
    with pytest.raises(ValueError, match="(?i)did you mean 'swin_t'"):
        train(tiny(model="swin_tt"))


@pytest.mark.parametrize("option, value", [("epochs", "many"), ("epochs", "2.5"), ("lr", "fast"), ("compile", "perhaps"), ("betas", "0.9"),
                                           ("model_args", "[1]"), ("img_size", [1])])
def test_values_of_the_wrong_type_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} = .*expected"):
        cast(option, value)


@pytest.mark.parametrize("options", [dict(epochs=0), dict(scale=(0.5, 0.2)), dict(amp="fp8"), dict(ema=1.0),
                                     dict(epochs=3, warmup_epochs=3)])
def test_values_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=f"{list(options)[-1]} = "):
        resolve(options)


def test_short_runs_keep_the_share_of_warm_up():
    config, notes = resolve(dict(model="swin_t", data="photos", epochs=3))
    assert config.warmup_epochs == pytest.approx(0.2) and any("warm-up" in note for note in notes)


# Schedule and optimiser

def test_learning_rate_at_known_steps():
    config = Config(epochs=10, warmup_epochs=2, lr=1e-3, warmup_lr=1e-6, min_lr=1e-5)
    at = [learning_rate(step, 100, config) for step in range(1000)]
    assert at[0] == 1e-6 and at[100] == pytest.approx((1e-3 + 1e-6) / 2) and at[200] == 1e-3 == max(at)
    assert at[-1] == pytest.approx(1e-5) and at[200 + 400] == pytest.approx((1e-3 + 1e-5) / 2, rel=5e-3)
    assert all(a >= b for a, b in zip(at[200:], at[201:]))
    assert [learning_rate(step, 1, Config(epochs=1, warmup_epochs=0)) for step in range(1)] == [1e-3]


@pytest.mark.parametrize("attn", ["elsa", "window"])
def test_decay_spares_norms_biases_and_position_biases(attn):
    model = create_model("swin_t", attn=attn, **TINY["model_args"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = ({names[id(parameter)] for parameter in group["params"]} for group in decay_groups(model, 0.05))
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert all("norm" not in name and not name.endswith(("bias", "bias_table")) for name in decayed)
    assert all("norm" in name or name.endswith(("bias", "bias_table")) for name in spared)
    assert any("ghost_head" in name for name in decayed) == (attn == "elsa")


# Checkpoints and the loop

def test_crash_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_atomically({"epoch": 1}, path)

    def crash(state, file):
        file.write(b"half of it")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        save_atomically({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pt"]


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for pair in zip(first, second):
            assert_same(*pair)
    else:
        assert first == second


@pytest.mark.parametrize("attn", ["elsa", "window"])
def test_resumed_run_ends_bit_identical(tmp_path, monkeypatch, attn):
    options = dict(attn=attn, epochs=3, limit=16, drop_path_rate=0.2, mixup=0.8, cutmix=1.0, label_smoothing=0.1, clip_grad=1.0, ema=0.9,
                   accumulate=2)
    train(tiny(out=str(tmp_path / "whole"), **options))

    from train import classification
    finished, evaluate = [], classification.evaluate

    def power_cut(*arguments):
        finished.append(1)
        if len(finished) == 2:
            raise RuntimeError("power cut")
        return evaluate(*arguments)
    monkeypatch.setattr(classification, "evaluate", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny(out=str(tmp_path / "cut"), **options))
    monkeypatch.setattr(classification, "evaluate", evaluate)
    train(tiny(out=str(tmp_path / "cut"), **options), resume=True)

    whole, cut = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    for name in ("model", "ema", "optimizer", "scaler", "epoch"):
        assert_same(whole[name], cut[name])
    strip = lambda row: {name: value for name, value in row.items() if name not in ("images_per_s", "memory")}  # noqa: E731
    assert [strip(row) for row in rows(tmp_path / "whole")] == [strip(row) for row in rows(tmp_path / "cut")]
    assert {"last.pt", "best.pt", "log.jsonl", "curves.png", "config.yaml"} == set(os.listdir(tmp_path / "cut"))


def test_resume_refuses_another_configuration(tmp_path):
    out = str(tmp_path / "run")
    train(tiny(out=out, epochs=1))
    with pytest.raises(ValueError, match="lr: 0.001 -> 0.002"):
        train(tiny(out=out, epochs=1, lr=2e-3), resume=True)
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(out=out, epochs=1))
    with pytest.raises(FileNotFoundError, match="no last.pt"):
        train(tiny(), resume=str(tmp_path / "absent"))


def test_accumulation_changes_losses_by_rounding_alone(tmp_path):
    train(tiny(out=str(tmp_path / "one"), epochs=1))
    train(tiny(out=str(tmp_path / "two"), epochs=1, accumulate=2))
    one, two = ([row["loss"] for row in rows(tmp_path / name) if "step" in row] for name in ("one", "two"))
    assert len(one) == 3 and one == pytest.approx(two, rel=1e-5)


def test_non_finite_loss_stops_and_keeps_the_last_epoch(tmp_path, monkeypatch):
    from train import classification
    calls = []

    def loss(*arguments):
        calls.append(1)
        return mixed_cross_entropy(*arguments) * (math.nan if len(calls) == 5 else 1)
    monkeypatch.setattr(classification, "mixed_cross_entropy", loss)
    with pytest.raises(FloatingPointError, match=r"step 4 \(epoch 2.*is nan.*last losses: \d.*nan"):
        train(tiny(out=str(tmp_path / "run")))
    assert checkpoint(tmp_path / "run")["epoch"] == 1


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
    """Steps of one process and of two under torchrun, with the same images in a step; 9 held-out images, which 2 does not divide."""
    config, _ = resolve({**TINY, "attn": "elsa", "out": str(tmp_path / "one")})  # as the command line below resolves it
    train(config)
    arguments = [f"--{name}={value}" for name, value in {**TINY, "attn": "elsa"}.items() if name != "model"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "run.py", "train", "swin_t"]
    subprocess.run([*command, *arguments, "--out", str(tmp_path / "two")], cwd=ROOT, env=environment, check=True, timeout=170,
                   capture_output=True)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["loss"] for row in one if "step" in row] == pytest.approx([row["loss"] for row in two if "step" in row], rel=1e-4)
    for ours, theirs in zip([row for row in one if "top1" in row], [row for row in two if "top1" in row], strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)  # a doubled or lost image would show
