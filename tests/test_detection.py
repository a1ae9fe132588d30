"""train/detection.py: folders and scenes, what is found in an image, augmentation, the recipes, training."""
import json

import numpy as np
import pytest
import torch
from photographs import coco_folder
from PIL import Image
from pycocotools import mask as oracle
from training import assert_resumes_bit_identically, detector

from train import detection
from train.config import Config, resolve
from train.schedule import learning_rate


@pytest.fixture
def photos(tmp_path):
    return coco_folder(tmp_path / "coco")


def bounds(mask):
    """x0, y0, x1, y1 of what is True, x1 and y1 exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


# Data

def test_objects_are_those_of_the_file(photos):
    config = Config(data=str(photos), img_size=64, resize=(1.0, 1.0), crop=0.0, flip=0.0)
    training, validation, classes = detection.datasets(config)
    assert classes == ["green", "red", "blue"] and validation.category_ids == [3, 7, 90]
    # Nothing can be learnt from an image without objects, but that nothing is found in it counts.
    assert len(training) == 4 and len(validation) == 4
    for i in range(4):
        image, boxes, labels, masks = training[0, i]
        assert image.dtype == torch.float32 and boxes.shape == (2, 4)
        assert sorted(labels.tolist()) == [0, 1] and masks.shape == (2, *image.shape[1:])
        for box, label, mask in zip(boxes, labels, masks):
            x0, y0, x1, y1 = bounds(mask)
            assert np.abs(box - [x0, y0, x1, y1]).max() <= 1
            inner = image[:, y0 + 2:y1 - 2, x0 + 2:x1 - 2].mean((1, 2))
            assert inner[1 - label] > inner[label] + 1  # red is class 1, channel 0


def test_exif_orientation_is_not_applied(photos):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(np.full((60, 90, 3), 40, np.uint8)).save(photos / "val2017" / "0.png", exif=exif)
    validation, _ = detection.validation_set(Config(data=str(photos), img_size=60))
    assert validation[len(validation) - 1][2] == (60, 90)


def test_batches_are_padded_to_multiples_of_32(photos):
    training, _, _ = detection.datasets(Config(data=str(photos), img_size=64))
    samples = [training[0, i] for i in range(3)]
    images, sizes, targets = training.collate(samples)
    assert images.shape[2] % 32 == images.shape[3] % 32 == 0
    for i, (image, *_) in enumerate(samples):
        h, w = sizes[i]
        assert torch.equal(images[i, :, :h, :w], image)
        assert images[i, :, h:].abs().sum() == images[i, :, :, w:].abs().sum() == 0
        assert targets[i]["masks"].shape[1:] == images.shape[2:]


def test_polygons_too_short_are_no_pixels():
    for segmentation in ([], [[1, 2, 3]]):
        assert oracle.area(detection.run_lengths(segmentation, 50, 60, "x")) == 0


def test_scenes_have_the_boxes_and_masks_of_the_drawing():
    training, validation, classes = detection.datasets(Config(img_size=48, limit=20, val_limit=10))
    image, boxes, labels, masks = training[3, 5]
    assert image.shape == (3, 48, 48) and len(boxes) == len(labels) == len(masks)
    assert not torch.equal(image, training[4, 5][0])
    shown, size, original, image_id, annotations = validation[5]
    assert shown.shape == (3, 64, 64) and size == original == (48, 48) and image_id == 5 and len(classes) == 8
    for annotation in annotations:
        assert oracle.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]


# What is wrong with the data

@pytest.mark.parametrize("content, words", [
    (None, ["1 of the 5 photographs", "1.png"]),
    (b"junk", ["1.png", "cannot be read"]),
    (Image.new("RGB", (9, 9)), ["1.png", "9 x 9", "67 x 79"]),
])
def test_photographs_that_are_wrong_are_named(photos, content, words):
    path = photos / "train2017" / "1.png"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        content.save(path)
    assert_said(photos, words)


@pytest.mark.parametrize("damage, words", [
    (lambda text: "{", ["instances_train2017.json", "not COCO's"]),
    (lambda text: json.dumps({"images": [], "annotations": []}), ["no 'categories'"]),
    (lambda text: text.replace('"category_id": 7', '"category_id": 8'), ["no 8"]),
    (lambda text: text.replace("1.png", "../../1.png"), ["outside", "../../1.png", "refused"]),
    (lambda text: text.replace("1.png", "/etc/passwd"), ["outside", "/etc/passwd", "refused"]),
    (lambda text: text.replace("green", "yellow"), ["categories of train and val differ"]),
    (lambda text: None, ["instances_train*.json", "found []"]),
])
def test_annotations_that_are_wrong_are_named(photos, damage, words):
    file = photos / "annotations" / "instances_train2017.json"
    text = damage(file.read_text())
    file.unlink()
    if text is not None:
        file.write_text(text)
    assert_said(photos, words)


@pytest.mark.parametrize("damaged", [
    {"size": [5, 5], "counts": [25]}, {"size": [60, 90], "counts": [3]}, {"size": [60, 90], "counts": "abc"},
    {"size": [60, 90]}, [["a", "b", 1, 2, 3, 4]], None])
def test_segmentations_that_are_wrong_are_named(photos, damaged):
    file = photos / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = damaged
    file.write_text(json.dumps(content))
    assert_said(photos, ["instances_train2017.json, 0.png", "a segmentation cannot be read"])


def assert_said(photos, words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        training, _, _ = detection.datasets(Config(data=str(photos), img_size=32))
        [training[0, i] for i in range(4)]
    assert all(word in str(error.value) for word in words), error.value


# Augmentation

def test_augmented_objects_follow_the_pixels(photos):
    config = Config(data=str(photos), img_size=64, resize=(0.6, 1.0), crop=0.5, flip=0.5)
    training, _, _ = detection.datasets(config)
    sizes = set()
    for epoch, i in np.ndindex(12, len(training)):
        image, boxes, labels, masks = training[epoch, i]
        assert torch.equal(image, training[epoch, i][0])
        sizes.add(tuple(image.shape))
        assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min(initial=0) >= 0
        assert max(image.shape[1:]) <= 64 * 5 / 3
        for box, label, mask in zip(boxes, labels, masks):
            if mask[1:-1, 1:-1].sum() > 60:  # the whole of an object is of its colour, but for its border
                inside = image[:, torch.from_numpy(np.ascontiguousarray(mask))]
                assert (inside[1 - label] > inside[label]).float().mean() > 0.7
                assert np.abs(box - bounds(mask)).max() <= 3
    assert len(sizes) > 20


# Training

@pytest.mark.parametrize("model, recipe, drop_path, epochs, milestones", [
    ("mask_rcnn_swin_t", None, 0.1, 12, (8, 11)),
    ("mask_rcnn_swin_t", "mask_rcnn_swin_t_3x", 0.2, 36, (27, 33)),
    ("cascade_mask_rcnn_swin_t", None, 0.0, 12, (8, 11)),
    ("cascade_mask_rcnn_swin_s", "cascade_mask_rcnn_swin_s_3x", 0.75, 36, (27, 33))])
def test_recipes_are_the_published_ones(model, recipe, drop_path, epochs, milestones):
    config, _ = resolve(dict(model=model, data="coco"), recipe)
    assert (config.lr, config.weight_decay, config.resize) == (1e-4, 0.05, (0.6, 1.0))
    assert (config.img_size, config.batch_size) == (800, 16)
    assert (config.drop_path_rate, config.epochs, config.milestones) == (drop_path, epochs, milestones)
    steps = 117266 // 16
    first, second = (milestone * steps for milestone in milestones)
    rates = [learning_rate(step, steps, config) for step in (0, 250, 500, first - 1, first, second)]
    assert rates == pytest.approx([1e-7, 5e-5, 1e-4, 1e-4, 1e-5, 1e-6], rel=2e-3)


@pytest.mark.parametrize("model", ["mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"])
def test_interrupted_run_on_scenes_ends_bit_identical(tmp_path, model):
    assert_resumes_bit_identically(detector(model=model, accumulate=2), tmp_path)
