"""train/segmentation.py: folders and scenes, augmentation, what is minimised, the recipe, training."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photographs import ade_folder
from PIL import Image
from training import assert_resumes_bit_identically, segmenter, train

from train import segmentation
from train.config import Config, resolve
from train.photographs import MEAN, STD, fit_size
from train.schedule import learning_rate


@pytest.fixture
def photos(tmp_path):
    return ade_folder(tmp_path / "ade")


# Data

def test_labels_start_at_the_first_class_and_0_is_ignored(photos):
    _, validation, classes = segmentation.datasets(Config(data=str(photos), img_size=32))
    (image, mirrored), = validation[0][0]
    labels = validation[0][1]
    assert classes == ["red", "green", "blue"] and image.shape == (3, 32, 40) and not mirrored
    assert labels.shape == (40, 50) and (labels[0] == 255).all()
    assert (labels[1:, :25] == 0).all() and (labels[1:, 25:] == 1).all()


@pytest.mark.parametrize("H, W, short, long, expected", [
    (427, 640, 512, 2048, (512, 767)), (100, 1000, 512, 2048, (205, 2048)),
    (427, 640, 250, 1024, (250, 375)), (640, 426, 250, 1024, (376, 250))])
def test_sizes_are_the_published_ones(H, W, short, long, expected):
    assert fit_size(H, W, short, long) == expected


def test_scene_labels_are_those_of_the_drawing():
    training, validation, classes = segmentation.datasets(Config(img_size=32, limit=20, val_limit=10))
    image, labels = training[3, 5]
    assert image.shape == (3, 32, 32) and 0 <= labels.min() and labels.max() < len(classes) == 9
    assert not torch.equal(image, training[4, 5][0])
    views, held_out, _ = validation[5]
    assert views[0][0].shape == (3, 32, 32) and not torch.equal(held_out, labels)


@pytest.mark.parametrize("file, content, words", [
    ("annotations/training/0.png", Image.new("L", (9, 9)), ["0.png", "(9, 9)", "(40, 50)"]),
    ("annotations/training/0.png", Image.new("RGB", (50, 40)), ["0.png", "one channel"]),
    ("annotations/training/0.png", Image.new("L", (50, 40), 4), ["0.png", "label 4", "to 3", "names file"]),
    ("annotations/training/0.png", b"junk", ["0.png", "cannot be read"]),
    ("images/training/0.jpg", b"junk", ["0.jpg", "cannot be read"]),
    ("annotations/training/0.png", None, ["1 images have no label map", "0.png"]),
    ("classes.json", b'{"red": 1}', ["classes.json", "list of names"]),
])
def test_what_is_wrong_with_the_data_is_said(photos, file, content, words):
    path = photos / file
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        content.save(path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        training, _, _ = segmentation.datasets(Config(data=str(photos), img_size=32))
        training[0, 0]
    assert all(word in str(error.value) for word in words), error.value


# Augmentation

def test_augmented_labels_follow_the_pixels(photos):
    config = Config(data=str(photos), img_size=32, resize=(0.5, 2.0))
    training, _, _ = segmentation.datasets(config)
    for epoch in range(8):
        image, labels = training[epoch, 1]
        assert image.shape == (3, 32, 32) and labels.shape == (32, 32) and labels.dtype == torch.int64
        assert torch.equal(image, training[epoch, 1][0]) and set(labels.unique().tolist()) <= {0, 1, 255}
        border = (labels != labels.roll(1, 1)).float()[None, None]
        inner = F.max_pool2d(border, 5, 1, 2)[0, 0] == 0  # away from borders of classes
        redder = image[0] * STD[0] + MEAN[0] > image[1] * STD[1] + MEAN[1]
        seen = inner & (labels != 255)
        hue_moved = (redder[seen] != (labels[seen] == 0)).float().mean()
        # Halves of one image can be told apart, whatever their hue.
        assert hue_moved < 0.05 or hue_moved > 0.95 or seen.sum() < 30


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


# Training

def test_recipe_is_the_published_one():
    config, _ = resolve(dict(model="upernet_swin_s", data="ade"))
    assert (config.lr, config.weight_decay, config.drop_path_rate) == (6e-5, 0.01, 0.3)
    assert (config.img_size, config.batch_size) == (512, 16)
    steps = 20210 // 16
    assert config.epochs * steps == pytest.approx(160_000, rel=0.01)
    assert config.warmup_epochs * steps == pytest.approx(1500, rel=0.001)
    rates = [learning_rate(step, steps, config) for step in range(config.epochs * steps)]
    assert rates[0] == pytest.approx(6e-11)
    assert max(rates) == pytest.approx(6e-5 * (1 - 1500 / len(rates)), rel=1e-3)
    assert rates[80_000] == pytest.approx(6e-5 * (1 - 80_000 / len(rates))) and 0 < rates[-1] < 1e-9


def test_learns_two_colours(tmp_path):
    """In 25 steps, with few epochs, because an epoch ends with an evaluation, a plot and two files."""
    photos = ade_folder(tmp_path / "ade", training=25)
    history = train(segmenter(data=str(photos), limit=None, batch_size=5, epochs=5, lr=3e-3, warmup_epochs=0.2,
                              drop_path_rate=0.0, out=str(tmp_path / "run")))
    assert max(row["miou"] for row in history) > 80  # blue is absent from labels, and soon from predictions


def test_interrupted_run_on_scenes_ends_bit_identical(tmp_path):
    assert_resumes_bit_identically(segmenter(), tmp_path)
