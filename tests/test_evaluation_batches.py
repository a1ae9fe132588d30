"""Segmenters and detectors are shown several photographs at a time, and find what they find in each alone."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eval import ade20k, coco, evaluate
from eval.options import load_model
from photographs import ade_folder, coco_folder
from run import main
from training import detector, segmenter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenery(tmp_path_factory):
    """ADE20K's layout with seven photographs of three sizes, two of which give views of one size; noise, so that no two
    are alike."""
    folder, rng = ade_folder(tmp_path_factory.mktemp("data") / "ade"), np.random.default_rng(0)
    for i, (H, W) in enumerate(((40, 50), (80, 100), (50, 40), (40, 50), (80, 100), (40, 50), (50, 40))):
        pixels, labels = rng.integers(0, 255, (H, W, 3), np.uint8), rng.integers(0, 4, (H, W), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "validation" / f"{i}.jpg")
        Image.fromarray(labels).save(folder / "annotations" / "validation" / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """COCO's layout with photographs of odd sizes."""
    return str(coco_folder(tmp_path_factory.mktemp("data") / "coco"))


def fresh(config, classes):
    torch.manual_seed(0)
    config.num_classes = len(classes)
    return load_model(config, None).eval()


@pytest.mark.parametrize("multi_scale", [False, True])
def test_photographs_of_one_size_are_segmented_together_as_alone(scenery, multi_scale):
    config = segmenter(data=scenery, val_limit=None)
    dataset, classes = ade20k.dataset(config, None, multi_scale)
    model, shapes, answers = fresh(config, classes), [], []
    model.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape)))
    matrices, scores = [], ade20k.scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ade20k, "scores", lambda matrix: matrices.append(matrix) or scores(matrix))
        for batch_size in (1, 2, 8):
            answers.append(ade20k.evaluate(model, ade20k.loader(dataset, batch_size, 0, 1, 0), CPU))
            together, views = [shape[0] for shape in shapes], len(ade20k.RATIOS) * 2 if multi_scale else 1
            assert sum(together) == 7 * views and max(together) <= batch_size
            if batch_size == 8:  # five lie across, two upright
                assert len(together) == 2 * (12 if multi_scale else 1) // (1 + (multi_scale and 0)) or multi_scale
            shapes.clear()
    alone = answers[0]
    assert int(matrices[0].sum()) > 10000 and 0 < alone["miou"] < 100
    for matrix, answer in zip(matrices[1:], answers[1:]):
        assert torch.equal(matrix, matrices[0]) and answer["images"] == 7
        assert answer["loss"] == pytest.approx(alone["loss"], abs=1e-5)
