"""Segmenters and detectors are shown several photographs at a time, and find what they find in each alone."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eval import ade20k, coco, evaluate
from eval.options import load_model
from photographs import ade_folder, coco_folder
from train.ade_folder import label_map_size
from training import detector, segmenter

CPU = torch.device("cpu")


def fresh(config, classes):
    torch.manual_seed(0)
    config.num_classes = len(classes)
    return load_model(config, None).eval()


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """ADE20K's layout with five photographs: two across of one shape, two upright, one of its own shape."""
    folder, rng = ade_folder(tmp_path_factory.mktemp("data") / "ade"), np.random.default_rng(0)
    for i, (H, W) in enumerate(((20, 25), (25, 20), (40, 50), (25, 20), (20, 20))):
        pixels, labels = rng.integers(0, 255, (H, W, 3), np.uint8), rng.integers(0, 4, (H, W), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "validation" / f"{i}.jpg")
        Image.fromarray(labels).save(folder / "annotations" / "validation" / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize("multi_scale, together", [(False, [1, 2, 2]), (True, [1] * 4 + [2] * 8)])
def test_photographs_of_one_size_are_segmented_together_as_alone(noise, multi_scale, together, monkeypatch):
    monkeypatch.setattr(ade20k, "RATIOS", (1.0, 1.5))
    config = segmenter(data=noise, val_limit=None, img_size=16)
    dataset, classes = ade20k.dataset(config, None, multi_scale)
    model, seen, matrices, answers, scores = fresh(config, classes), [], [], [], ade20k.scores
    model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    monkeypatch.setattr(ade20k, "scores", lambda matrix: matrices.append(matrix) or scores(matrix))
    for batch_size in (1, 3):
        answers.append(ade20k.evaluate(model, ade20k.loader(dataset, batch_size, 0, 1, 0), CPU))
    views = 4 if multi_scale else 1
    assert seen == [1] * 5 * views + together
    assert torch.equal(*matrices) and int(matrices[0].sum()) > 2000 and 0 < answers[0]["miou"] < 100
    assert answers[1]["loss"] == pytest.approx(answers[0]["loss"], abs=1e-5)
    assert [answer["images"] for answer in answers] == [5, 5]


def test_the_size_of_a_label_map_that_cannot_be_read_is_left_to_its_turn(tmp_path):
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"nothing")
    assert [label_map_size(tmp_path / f"{i}.png") for i in range(3)] == [(3, 5), (1, 1), (1, 1)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """COCO's layout with four photographs of sizes of their own, which are padded to two."""
    return str(coco_folder(tmp_path_factory.mktemp("data") / "coco"))


def test_photographs_padded_to_one_size_are_detected_in_together_as_alone(photographs):
    dataset, classes = coco.dataset(detector(data=photographs, img_size=64, val_limit=None), None)
    loader = coco.loader(dataset, 3, 0, 1, 0)
    padded = [[tuple(image.shape) for image, *_ in samples] for samples in loader]
    assert list(map(len, padded)) == [2, 2] and all(len({*shapes}) == 1 for shapes in padded)
    model = fresh(detector(), classes)
    samples = next(iter(loader))
    assert samples[0][1] != samples[1][1]  # sizes before the padding
    with torch.no_grad():
        together = coco.detect(model, samples, CPU)
        alone = [coco.detect(model, [sample], CPU)[0] for sample in samples]
    for ours, expected in zip(together, alone):
        assert len(ours["labels"]) > 20 and torch.equal(ours["labels"], expected["labels"])
        assert torch.equal(ours["masks"], expected["masks"])
        for name in ("boxes", "scores"):
            assert (ours[name] - expected[name]).abs().max() < 1e-5 * max(1, expected[name].abs().max())


def test_more_padding_would_change_what_is_found(photographs):
    """Which is why photographs of different padded sizes are not in one batch."""
    dataset, classes = coco.dataset(detector(data=photographs, img_size=64, val_limit=None), None)
    model, (image, size, original, *_) = fresh(detector(), classes), dataset[0]
    with torch.no_grad():
        plain = model(image[None], [size], [original])[0]["scores"]
        wider = model(torch.nn.functional.pad(image, (0, 32))[None], [size], [original])[0]["scores"]
    assert len(plain) == len(wider) and (plain - wider).abs().max() > 1e-4


@pytest.mark.parametrize("kind, at_a_time", [("cpu", [1] * 4), ("cuda", [2, 2])])
def test_on_a_cpu_detectors_see_one_photograph_at_a_time(photographs, kind, at_a_time, monkeypatch):
    dataset, _ = coco.dataset(detector(data=photographs, img_size=64, val_limit=None), None)
    seen, found = [], {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0),
                       "masks": torch.zeros(0, 2, 2)}
    monkeypatch.setattr(coco, "detect", lambda model, part, *rest: seen.append(len(part)) or [found] * len(part))
    monkeypatch.setattr(coco, "max_over_ranks", lambda number, device: number)
    model = torch.nn.Module()
    model.num_classes = 3
    result = coco.evaluate(model, coco.loader(dataset, 2, 0, 1, 0), SimpleNamespace(type=kind))
    assert seen == at_a_time and result["images"] == 4


@pytest.mark.parametrize("given, per_rank", [(None, 1), (6, 6)])
def test_without_a_batch_size_memory_stays_that_of_one_photograph_on_a_cpu(given, per_rank, monkeypatch):
    seen, loader = [], coco.loader
    monkeypatch.setattr(coco, "loader", lambda dataset, batch_size, *rest: seen.append(batch_size) or loader(
        dataset, batch_size, *rest))
    evaluate.run(detector(val_limit=2, batch_size=given), None, None)
    assert seen == [per_rank]
