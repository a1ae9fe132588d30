"""eval/ade20k.py: the metric against a loop over pixels, multi-scale, the commands, two processes."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eval import ade20k
from eval.options import load_model
from photographs import ade_folder
from run import main
from train import segmentation
from training import command_line, run_py, segmenter, train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return ade_folder(tmp_path_factory.mktemp("data") / "ade")


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
    means = [100 * np.mean(values) if values else float("nan") for values in (ious, accuracies)]
    return means + [100 * right / counted if counted else float("nan")]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 16), classes=st.integers(1, 6), H=st.integers(1, 9), W=st.integers(1, 9),
       ignored=st.sampled_from([0, 0.3, 1]))
def test_scores_are_those_of_a_loop_over_pixels(seed, classes, H, W, ignored):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, classes, (H, W)), rng.integers(0, classes, (H, W))
    labels[rng.random((H, W)) < ignored] = 255
    matrix = ade20k.confusion(torch.tensor(labels), torch.tensor(predicted), classes)
    assert int(matrix.sum()) == (labels != 255).sum()
    result = ade20k.scores(matrix)
    expected = naive_scores(labels, predicted, classes)
    ours = [result["miou"], result["mean_accuracy"], result["pixel_accuracy"]]
    assert ours == pytest.approx(expected, nan_ok=True)


def test_counts_stay_exact_beyond_float32_and_float64_sums_of_ones():
    matrix = torch.tensor([[2 ** 40 + 1, 1], [0, 3]])
    assert int((matrix + ade20k.confusion(torch.tensor([0]), torch.tensor([0]), 2))[0, 0]) == 2 ** 40 + 2


class Colours(torch.nn.Module):
    """Sees class c where channel c is the largest, the surer the larger `gain` is."""

    def __init__(self, gain=50):
        super().__init__()
        self.gain = gain

    def forward(self, images, coarse):
        assert coarse
        return self.gain * images


def probabilities(*given):
    """Of the whole photograph, (classes, H, W)."""
    strips = list(ade20k.predict(*given))
    assert [rows.start for rows, _ in strips] == [0, *(rows.stop for rows, _ in strips[:-1])]
    return torch.cat([strip for _, strip in strips], 1)


def test_multi_scale_and_flip_of_one_colour_are_that_colour():
    views = segmentation.views(np.full((37, 53, 3), (10, 200, 30), np.uint8), 32, ade20k.RATIOS, flip=True)
    assert len(views) == 12 and [mirrored for _, mirrored in views] == [False, True] * 6
    assert views[0][0].shape == (3, 16, 23) and views[-1][0].shape == (3, 56, 80)
    found = probabilities(Colours(), views, (37, 53))
    assert found.shape == (3, 37, 53) and (found.argmax(0) == 1).all()
    assert torch.allclose(found.sum(0), torch.ones(37, 53))


def test_large_photographs_are_taken_in_strips():
    strips = [strip.shape for _, strip in ade20k.predict(Colours(), [(torch.zeros(3, 4, 40), False)], (100, 60000))]
    assert len(strips) == 3 and max(shape.numel() for shape in strips) <= ade20k.STRIP


def test_mirrored_views_are_mirrored_back():
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0], pixels[:, 16:, 2] = 255, 255
    views = segmentation.views(pixels, 16, (1.0,), flip=True)
    predicted = probabilities(Colours(), views, (16, 32)).argmax(0)
    assert (predicted[:, :15] == 0).all() and (predicted[:, 17:] == 2).all()


def test_loss_is_the_mean_over_labelled_pixels_and_dumps_are_what_was_predicted(photos, tmp_path):
    dataset, _ = ade20k.dataset(segmenter(data=str(photos), val_limit=None), None)
    loader = ade20k.loader(dataset, 1, 0, 1, 0)
    result = ade20k.evaluate(Colours(0.5), loader, torch.device("cpu"), dump=tmp_path / "out")
    total = pixels = right = 0
    for views, labels, name in (dataset[i] for i in range(3)):
        (image, _), = views
        logits = torch.nn.functional.interpolate(image[None] / 2, labels.shape, mode="bilinear")[0]
        chosen, labelled = logits.argmax(0), labels != 255
        total += torch.nn.functional.cross_entropy(logits.flatten(1).T[labelled.flatten()], labels[labelled],
                                                   reduction="sum").item()
        pixels, right = pixels + int(labelled.sum()), right + int((chosen == labels)[labelled].sum())
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}.png")), chosen + 1)
    assert result["loss"] == pytest.approx(total / pixels, rel=1e-5) and result["loss"] > 0.01
    assert result["pixel_accuracy"] == pytest.approx(100 * right / pixels)


def test_many_scales_are_six_and_each_is_mirrored(photos):
    config = segmenter(data=str(photos))
    (image, mirrored), = ade20k.dataset(config, None)[0][0][0]
    views = ade20k.dataset(config, None, multi_scale=True)[0][0][0]
    assert not mirrored and torch.equal(views[4][0], image)  # ratio 1 is the third
    assert [min(shown.shape[1:]) for shown, _ in views[::2]] == [16, 24, 32, 40, 48, 56]
    for (plain, first), (flipped, second) in zip(views[::2], views[1::2]):
        assert not first and second and torch.equal(flipped, plain.flip(2))


# The commands

@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """(a run's last.pt, its history)"""
    out = tmp_path_factory.mktemp("trained") / "run"
    history = train(segmenter(data=str(photos), limit=None, batch_size=5, out=str(out)))
    return str(out / "last.pt"), history


def test_eval_repeats_the_scores_of_training_and_dumps_label_maps(photos, trained, tmp_path, capsys):
    weights, history = trained
    assert {"miou", "mean_accuracy", "pixel_accuracy", "val_loss"} <= history[-1].keys()
    assert main(["eval", "--weights", weights, "--data", str(photos), "--dump", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"mIoU {history[-1]['miou']:.2f}" in printed and "green" in printed
    for i in range(3):
        dumped = np.asarray(Image.open(tmp_path / "out" / f"{i}.png"))
        labels = np.asarray(Image.open(photos / "annotations" / "validation" / f"{i}.png"))
        assert dumped.shape == labels.shape and 1 <= dumped.min() and dumped.max() <= 3


def test_eval_at_many_scales(photos, trained, capsys, monkeypatch):
    seen, strips = [], ade20k.strips
    monkeypatch.setattr(ade20k, "strips", lambda views, *rest: seen.append(len(views)) or strips(views, *rest))
    arguments = ["eval", "upernet_swin_t", "--weights", trained[0], "--data", str(photos), "--multi-scale"]
    assert main(arguments) == 0
    assert "6 scales" in capsys.readouterr().out and seen == [12] * 3


def test_predict_names_the_classes_and_their_shares(photos, trained, tmp_path):
    photograph = str(photos / "images" / "validation" / "0.jpg")
    assert main(["predict", "--weights", trained[0], photograph, "--out", str(tmp_path / "seen")]) == 0
    found = json.loads((tmp_path / "seen" / "0.json").read_text())["classes"]
    assert sum(entry["share"] for entry in found) == pytest.approx(1, abs=0.01)
    assert {entry["class"] for entry in found} <= {"red", "green", "blue"}
    with Image.open(tmp_path / "seen" / "0.png") as drawn:
        assert drawn.width > 256


def test_mistakes_in_the_commands_are_said(trained, capsys):
    for arguments, words in ((["predict", "--weights", trained[0]], "needs images"),
                             (["predict", "upernet_swin_t", "x.jpg"], "needs --weights"),
                             (["predict", "--weights", trained[0], "nowhere.jpg"], "no image at nowhere.jpg"),
                             (["eval", "swin_t", "--multi-scale"], "for segmenters")):
        assert main(arguments) == 2 and words in capsys.readouterr().err


def test_two_processes_count_as_one(photos, tmp_path, capsys):
    """3 photographs on 2 ranks: the last place of the second rank is empty."""
    torch.manual_seed(0)
    config = segmenter(data=str(photos), num_classes=3)
    torch.save(load_model(config, None).state_dict(), tmp_path / "weights.pt")
    arguments = ["eval", config.model, "--weights", str(tmp_path / "weights.pt"),
                 *command_line(config, "attn", "data", "img_size", "patch_size", "window_size", "device", "model_args")]
    assert main(arguments) == 0
    one, two = (text.splitlines()[2:] for text in (capsys.readouterr().out, run_py(*arguments, ranks=2)))
    assert one[:-1] == two[:-1] and len(one) == 5
    assert one[-1].split("  ")[:4] == two[-1].split("  ")[:4] and "3 images" in one[-1]
