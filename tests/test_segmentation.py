"""models/upernet.py against the published numbers; its data, its metric against a loop over pixels, its commands."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eval import ade20k
from models import create_model, load_weights
from models.swin import Backbone
from published import GOLDEN, assert_close, published_state
from run import main
from train import segmentation
from train.config import Config, resolve
from train.data import MEAN, STD
from train.loop import learning_rate, train

ROOT = Path(__file__).parents[1]
TINY = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=2, patch_size=2, kernel_size=3, channels=8,
            auxiliary_channels=6)


def tiny(attn="elsa", **overrides):
    torch.manual_seed(0)
    return create_model("upernet_swin_t", attn=attn, **{**TINY, "num_classes": 5, **overrides}).eval()


# Published numbers

@pytest.fixture(scope="module")
def published():
    model = load_weights(create_model("upernet_swin_t", attn="elsa"), published_state("upernet_elsa_tiny_160k")).eval()
    with np.load(GOLDEN / "seg_inputs.npz") as inputs, np.load(GOLDEN / "seg_upernet_elsa_tiny_160k.npz") as golden:
        return model, dict(inputs), dict(golden)


def subsample(x, step):
    H, W = x.shape[2:]
    return x[0, ::step, ::max(1, H // 8), ::max(1, W // 8)].numpy()


def differing(probabilities, golden, prefix):
    """Pixels whose class is another one than the published, where the published choice was not a matter of rounding."""
    stable = np.unpackbits(golden[f"{prefix}_stable_packed"])[:golden[f"{prefix}_pred"].size].reshape(golden[f"{prefix}_pred"].shape)
    return int((probabilities.argmax(0).numpy() != golden[f"{prefix}_pred"])[stable.astype(bool)].sum())


@pytest.mark.parametrize("image", ["a", "b"])
def test_maps_logits_and_classes_equal_the_published_ones(published, image):
    model, inputs, golden = published
    x, size = torch.tensor(inputs[f"{image}_img"]), [int(n) for n in inputs[f"{image}_ori_shape"][:2]]
    with torch.no_grad():
        maps = model.backbone(x)
        for i, y in enumerate(maps):
            assert np.abs(subsample(y, y.shape[1] // 8) - golden[f"{image}_backbone{i}_grid"]).max() < 3e-5
        logits = model.decode_head(maps)
        assert tuple(logits.shape) == tuple(golden[f"{image}_decode_shape"])
        assert np.abs(subsample(logits, 10) - golden[f"{image}_decode_grid"]).max() < 3e-5
        assert np.abs(subsample(model.auxiliary_head(maps[-2]), 10) - golden[f"{image}_aux_grid"]).max() < 3e-5
        full = F.interpolate(model(x), size, mode="bilinear")
        assert np.abs(full[0, ::10, ::32, ::32].numpy() - golden[f"{image}_full_grid"]).max() < 3e-5
        probabilities = ade20k.predict(model, [(x[0], False)], size)
        assert torch.allclose(probabilities, full.softmax(1)[0])
    assert differing(probabilities, golden, image) == 0


@pytest.mark.parametrize("flip, prefix", [(False, "t_ms"), (True, "t_msflip")])
def test_multi_scale_predictions_equal_the_published_ones(published, flip, prefix):
    model, inputs, golden = published
    views = [(torch.tensor(inputs[f"t_img{i}"])[0], False) for i in range(6)]
    if flip:
        views = [shown for image, _ in views for shown in ((image, False), (image.flip(2), True))]
    with torch.no_grad():
        probabilities = ade20k.predict(model, views, [int(n) for n in inputs["t_ori_shape"][:2]])
    assert np.abs(probabilities[::10, ::32, ::32].numpy() - golden[f"{prefix}_prob_grid"]).max() < 3e-5
    assert np.abs(probabilities.mean((1, 2)).numpy() - golden[f"{prefix}_prob_class_mean"]).max() < 1e-5
    assert differing(probabilities, golden, prefix) == 0


def test_losses_and_gradients_equal_the_published_ones(published):
    model, inputs, _ = published
    expected = json.loads((GOLDEN / "loss_seg_upernet_elsa_tiny_160k.json").read_text())
    x, labels = torch.tensor(inputs["a_img"]), torch.tensor(inputs["a_label"]).long()[None]
    model.training = True  # of the model alone, so that it gives the auxiliary logits: everything in it goes on evaluating
    logits, auxiliary = model(x)
    main_loss, auxiliary_loss = segmentation.pixel_cross_entropy(logits, labels), 0.4 * segmentation.pixel_cross_entropy(auxiliary, labels)
    assert main_loss.item() == pytest.approx(expected["decode.loss_seg"], rel=1e-5)
    assert auxiliary_loss.item() == pytest.approx(expected["aux.loss_seg"], rel=1e-5)
    (main_loss + auxiliary_loss).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.training = False
    model.zero_grad()
    compared = 0
    for name, numbers in expected["grad"].items():
        # The last stage's we keep in another order, which leaves the norm.
        ours = name.replace("attn.rb", "attn.relative_position_bias_table")
        if "layers.3." in name:
            ours = ours.replace("pre_proj", "qkv").replace("post_proj", "proj")
        assert gradients[ours].norm().item() == pytest.approx(numbers["l2"], rel=1e-3), name
        if ours == name:
            assert gradients[name].flatten()[:4].tolist() == pytest.approx(numbers["first"], rel=1e-2, abs=1e-4 * numbers["l2"]), name
        compared += 1
    assert compared >= 10


@pytest.mark.parametrize("attn, name, count", [("elsa", "upernet_swin_t", 60_794_486), ("elsa", "upernet_swin_s", 84_528_134)])
def test_published_parameter_counts(attn, name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, attn=attn).parameters()) == count


# The model

@settings(deadline=None, max_examples=15)
@given(H=st.integers(1, 40), W=st.integers(1, 40), attn=st.sampled_from(["window", "elsa"]))
def test_images_of_any_size(H, W, attn):
    model = tiny(attn)
    images = torch.randn(2, 3, H, W)
    logits = model(images)
    assert logits.shape == (2, 5, H, W) and logits.isfinite().all()
    assert_close("one at a time", logits, torch.cat([model(image[None]) for image in images]), 1e-4)


def test_a_classifiers_file_fills_the_backbone():
    classifier = create_model("swin_t", attn="elsa", **{key: TINY[key] for key in list(TINY)[:6]})
    model = tiny()
    heads = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("backbone.") or ".norm" in name[:14]}
    load_weights(model, classifier.state_dict())
    state = model.state_dict()
    assert torch.equal(state["backbone.layers.2.blocks.0.mlp.fc1.weight"], classifier.layers[2].blocks[0].mlp.fc1.weight)
    for name in heads:
        if "backbone.layers" not in name and "patch_embed" not in name:
            assert torch.equal(state[name], heads[name]), name
    with pytest.raises(ValueError, match="missing: backbone.layers.0"):
        load_weights(model, create_model("swin_t", attn="window", **{key: TINY[key] for key in list(TINY)[:6]}).state_dict())


def test_microsofts_segmenters_keep_their_buffers_to_themselves():
    model = tiny("window")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {"backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
               "backbone.layers.0.blocks.1.attn_mask": torch.zeros(1)}
    load_weights(tiny("window"), {"meta": {"epoch": 1}, "state_dict": {**state, **buffers}})


def test_backbone_shifts_windows_that_fit():
    assert all(block.attn.always_shift for block in Backbone(attn="window", **{key: TINY[key] for key in list(TINY)[:6]}).layers[3].blocks)


# The metric

def naive_scores(labels, predicted, classes):
    ious, accuracies, right, counted = [], [], 0, 0
    for c in range(classes):
        hit = union = labelled = 0
        for truth, guess in zip(labels.flatten().tolist(), predicted.flatten().tolist()):
            if truth != 255:
                hit += truth == c and guess == c
                union += truth == c or guess == c
                labelled += truth == c
        ious += [hit / union] if union else []
        accuracies += [hit / labelled] if labelled else []
        right, counted = right + hit, counted + labelled
    return [100 * np.mean(values) if values else float("nan") for values in (ious, accuracies)] + [100 * right / counted if counted else float("nan")]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 16), classes=st.integers(1, 6), H=st.integers(1, 9), W=st.integers(1, 9), ignored=st.sampled_from([0, 0.3, 1]))
def test_scores_are_those_of_a_loop_over_pixels(seed, classes, H, W, ignored):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, classes, (H, W)), rng.integers(0, classes, (H, W))
    labels[rng.random((H, W)) < ignored] = 255
    matrix = ade20k.confusion(torch.tensor(labels), torch.tensor(predicted), classes)
    assert int(matrix.sum()) == (labels != 255).sum()
    result = ade20k.scores(matrix)
    expected = naive_scores(labels, predicted, classes)
    assert [result["miou"], result["mean_accuracy"], result["pixel_accuracy"]] == pytest.approx(expected, nan_ok=True)


def test_counts_stay_exact_beyond_float32_and_float64_sums_of_ones():
    matrix = torch.tensor([[2 ** 40 + 1, 1], [0, 3]])
    assert int((matrix + ade20k.confusion(torch.tensor([0]), torch.tensor([0]), 2))[0, 0]) == 2 ** 40 + 2


class Colours(torch.nn.Module):
    """Sees class c where channel c is the largest."""

    def forward(self, images):
        return 50 * images


def test_multi_scale_and_flip_of_one_colour_are_that_colour():
    views = segmentation.views(np.full((37, 53, 3), (10, 200, 30), np.uint8), 32, ade20k.RATIOS, flip=True)
    assert len(views) == 12 and [mirrored for _, mirrored in views] == [False, True] * 6
    assert views[0][0].shape == (3, 16, 23) and views[-1][0].shape == (3, 56, 80)
    probabilities = ade20k.predict(Colours(), views, (37, 53))
    assert probabilities.shape == (3, 37, 53) and (probabilities.argmax(0) == 1).all()
    assert torch.allclose(probabilities.sum(0), torch.ones(37, 53))


def test_mirrored_views_are_mirrored_back():
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0], pixels[:, 16:, 2] = 255, 255
    predicted = ade20k.predict(Colours(), segmentation.views(pixels, 16, (1.0,), flip=True), (16, 32)).argmax(0)
    assert (predicted[:, :15] == 0).all() and (predicted[:, 17:] == 2).all()


# Data

@pytest.fixture
def photos(tmp_path):
    """ADE20K's layout with three classes: photographs of odd sizes, whose left half is class 1 (red), right half 2, top row unlabelled."""
    for split, count in (("training", 5), ("validation", 3)):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / split).mkdir(parents=True)
        for i in range(count):
            H, W = 40 + 3 * i, 50 - 5 * i
            pixels, labels = np.zeros((H, W, 3), np.uint8), np.full((H, W), 2, np.uint8)
            pixels[:, :W // 2, 0], pixels[:, W // 2:, 1] = 200, 200
            labels[:, :W // 2], labels[0] = 1, 0
            Image.fromarray(pixels).save(tmp_path / "ade" / "images" / split / f"{i}.jpg", quality=95)
            Image.fromarray(labels).save(tmp_path / "ade" / "annotations" / split / f"{i}.png")
    (tmp_path / "ade" / "classes.json").write_text('["red", "green", "blue"]')
    return tmp_path / "ade"


def test_labels_start_at_the_first_class_and_0_is_ignored(photos):
    _, validation, classes = segmentation.datasets(Config(data=str(photos), img_size=32))
    (image, mirrored), = validation[0][0]
    labels = validation[0][1]
    assert classes == ["red", "green", "blue"] and image.shape == (3, 32, 40) and not mirrored
    assert labels.shape == (40, 50) and (labels[0] == 255).all() and (labels[1:, :25] == 0).all() and (labels[1:, 25:] == 1).all()


def test_augmented_labels_follow_the_pixels(photos):
    config = Config(data=str(photos), img_size=32, resize=(0.5, 2.0))
    training, _, _ = segmentation.datasets(config)
    for epoch in range(8):
        image, labels = training[epoch, 1]
        assert image.shape == (3, 32, 32) and labels.shape == (32, 32) and labels.dtype == torch.int64
        assert torch.equal(image, training[epoch, 1][0]) and set(labels.unique().tolist()) <= {0, 1, 255}
        inner = F.max_pool2d((labels != labels.roll(1, 1)).float()[None, None], 5, 1, 2)[0, 0] == 0  # away from borders of classes
        redder = image[0] * STD[0] + MEAN[0] > image[1] * STD[1] + MEAN[1]
        seen = inner & (labels != 255)
        hue_moved = (redder[seen] != (labels[seen] == 0)).float().mean()
        assert hue_moved < 0.05 or hue_moved > 0.95 or seen.sum() < 30, "halves of one image must be told apart, whatever their hue"


def test_crops_nearly_all_of_one_class_are_drawn_again():
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 40:] = 1
    pixels = np.zeros((64, 64, 3), np.uint8)
    config = Config(img_size=32, resize=(2.0, 2.0))
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        _, crop = segmentation.augment(pixels, labels, config)
        shares.append(max((crop == 0).float().mean().item(), (crop == 1).float().mean().item()))
    assert np.mean([share > 0.75 for share in shares]) < 0.1  # without the rule about half of them are


@pytest.mark.parametrize("H, W, short, long, expected", [(427, 640, 512, 2048, (512, 767)), (100, 1000, 512, 2048, (205, 2048)),
                                                         (427, 640, 250, 1024, (250, 375)), (640, 426, 250, 1024, (376, 250))])
def test_sizes_are_the_published_ones(H, W, short, long, expected):
    assert segmentation.fitted(H, W, short, long) == expected


def test_scene_labels_are_those_of_the_drawing():
    training, validation, classes = segmentation.datasets(Config(img_size=32, limit=20, val_limit=10))
    image, labels = training[3, 5]
    assert image.shape == (3, 32, 32) and 0 <= labels.min() and labels.max() < len(classes) == 9
    assert not torch.equal(image, training[4, 5][0])
    views, held_out, _ = validation[5]
    assert views[0][0].shape == (3, 32, 32) and not torch.equal(held_out, labels)


@pytest.mark.parametrize("damage, words", [
    (lambda root: Image.new("L", (9, 9)).save(root / "annotations" / "training" / "0.png"), ["0.png", "(9, 9)", "(40, 50)"]),
    (lambda root: Image.new("RGB", (50, 40)).save(root / "annotations" / "training" / "0.png"), ["0.png", "one channel"]),
    (lambda root: Image.new("L", (50, 40), 4).save(root / "annotations" / "training" / "0.png"), ["0.png", "label 4", "to 3", "names file"]),
    (lambda root: (root / "annotations" / "training" / "0.png").write_bytes(b"junk"), ["0.png", "cannot be read"]),
    (lambda root: (root / "images" / "training" / "0.jpg").write_bytes(b"junk"), ["0.jpg", "cannot be read"]),
    (lambda root: (root / "annotations" / "training" / "0.png").unlink(), ["1 images have no label map", "0.png"]),
    (lambda root: (root / "classes.json").write_text('{"red": 1}'), ["classes.json", "list of names"]),
])
def test_what_is_wrong_with_the_data_is_said(photos, damage, words):
    damage(photos)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        training, _, _ = segmentation.datasets(Config(data=str(photos), img_size=32))
        training[0, 0]
    assert all(word in str(error.value) for word in words), error.value


# Training and the commands

SMALL = dict(model="upernet_swin_t", attn="elsa", img_size=32, patch_size=2, window_size=2, drop_path_rate=0.1, batch_size=4, epochs=2, lr=1e-3,
             warmup_epochs=0.5, limit=8, val_limit=3, device="cpu", model_args={key: TINY[key] for key in ("embed_dim", "depths", "num_heads",
                                                                                                       "kernel_size", "channels",
                                                                                                       "auxiliary_channels")})


def test_recipe_is_the_published_one():
    config, _ = resolve(dict(model="upernet_swin_s", data="ade"))
    assert (config.lr, config.weight_decay, config.drop_path_rate, config.img_size, config.batch_size) == (6e-5, 0.01, 0.3, 512, 16)
    steps = 20210 // 16
    assert config.epochs * steps == pytest.approx(160_000, rel=0.01) and config.warmup_epochs * steps == pytest.approx(1500, rel=0.001)
    rates = [learning_rate(step, steps, config) for step in range(config.epochs * steps)]
    assert rates[0] == pytest.approx(6e-11) and max(rates) == pytest.approx(6e-5 * (1 - 1500 / len(rates)), rel=1e-3)
    assert rates[80_000] == pytest.approx(6e-5 * (1 - 80_000 / len(rates))) and 0 < rates[-1] < 1e-9


def test_train_eval_dump_and_predict(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = train(Config(**{**SMALL, "data": str(photos), "limit": None, "batch_size": 5, "out": "run"}))
    assert {"miou", "mean_accuracy", "pixel_accuracy", "val_loss"} <= history[-1].keys()
    capsys.readouterr()
    assert main(["eval", "--weights", "run/last.pt", "--data", str(photos), "--dump", "out"]) == 0
    printed = capsys.readouterr().out
    assert f"mIoU {history[-1]['miou']:.2f}" in printed and "green" in printed
    for i in range(3):
        dumped, labels = (np.asarray(Image.open(path)) for path in (f"out/{i}.png", photos / "annotations" / "validation" / f"{i}.png"))
        assert dumped.shape == labels.shape and 1 <= dumped.min() and dumped.max() <= 3
    assert main(["eval", "upernet_swin_t", "--weights", "run/last.pt", "--data", str(photos), "--multi-scale"]) == 0
    assert "6 scales" in capsys.readouterr().out
    assert main(["predict", "--weights", "run/last.pt", str(photos / "images" / "validation" / "0.jpg"), "--out", "seen"]) == 0
    found = json.loads(Path("seen/0.json").read_text())["classes"]
    assert sum(entry["share"] for entry in found) == pytest.approx(1, abs=0.01) and {entry["class"] for entry in found} <= {"red", "green", "blue"}
    assert Image.open("seen/0.png").size[0] > 256
    capsys.readouterr()
    for arguments, words in ((["predict", "--weights", "run/last.pt"], "needs images"), (["predict", "upernet_swin_t", "x.jpg"], "needs --weights"),
                             (["predict", "--weights", "run/last.pt", "nowhere.jpg"], "no image at nowhere.jpg"),
                             (["eval", "swin_t", "--multi-scale"], "for segmenters")):
        assert main(arguments) == 2 and words in capsys.readouterr().err


def test_learns_two_colours(photos, tmp_path):
    history = train(Config(**{**SMALL, "data": str(photos), "limit": None, "batch_size": 5, "epochs": 25, "lr": 3e-3, "warmup_epochs": 1.0,
                              "drop_path_rate": 0.0, "out": str(tmp_path / "run")}))
    assert max(row["miou"] for row in history) > 80  # blue is absent from labels, and soon from predictions


def test_scenes_train_and_resume_bit_identically(tmp_path):
    train(Config(**{**SMALL, "out": str(tmp_path / "whole")}))
    train(Config(**{**SMALL, "out": str(tmp_path / "parts")}))
    first, second = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_processes_count_as_one(photos, tmp_path):
    """3 photographs on 2 ranks: the last place of the second rank is empty."""
    model = tiny(num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    options = ["eval", "upernet_swin_t", "--attn", "elsa", "--weights", str(tmp_path / "weights.pt"), "--data", str(photos), "--img-size", "32",
               "--patch-size", "2", "--window-size", "2", "--device", "cpu", "--model-args", json.dumps(SMALL["model_args"])]
    environment = {**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one, two = (subprocess.run([*command, "run.py", *options], cwd=ROOT, env=environment, check=True, timeout=170, capture_output=True,
                               text=True).stdout.splitlines()[2:] for command in ([sys.executable], launch))
    assert one[:-1] == two[:-1] and one[-1].split("  ")[:4] == two[-1].split("  ")[:4] and "3 images" in one[-1]
