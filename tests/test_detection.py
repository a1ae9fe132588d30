"""train/detection.py: folders and scenes, what is found in an image, augmentation, the recipes, training."""
import contextlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as oracle

from photographs import coco_folder
from train import detection
from train.config import Config, resolve
from train.device import clear_padding, to_device
from train.photographs import resize, to_tensor
from train.schedule import learning_rate
from training import assert_resumes_bit_identically, detector


@pytest.fixture
def photos(tmp_path):
    return coco_folder(tmp_path / "coco")


def bounds(mask):
    """x0, y0, x1, y1 of what is True, x1 and y1 exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@contextlib.contextmanager
def changed(photos, split="train"):
    """The content of the annotations' file, to be changed."""
    file = photos / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    yield content
    file.write_text(json.dumps(content))


# Data

def test_objects_are_those_of_the_file(photos):
    config = Config(data=str(photos), img_size=64, resize=(1.0, 1.0), crop=0.0, flip=0.0)
    training, validation, classes = detection.datasets(config)
    assert classes == ["green", "red", "blue"] and validation.category_ids == [3, 7, 90]
    # Nothing can be learnt from an image without objects, but that nothing is found in it counts.
    assert len(training) == 4 and len(validation) == 4
    for i in range(4):
        image, boxes, labels, masks, has_mask = training[0, i]
        assert image.dtype == np.uint8 and boxes.shape == (2, 4) and has_mask.tolist() == [True, True]
        assert sorted(labels.tolist()) == [0, 1] and masks.shape == (2, *image.shape[:2])
        for box, label, mask in zip(boxes, labels, masks):
            x0, y0, x1, y1 = bounds(mask)
            assert np.abs(box - [x0, y0, x1, y1]).max() <= 1
            inner = image[y0 + 2:y1 - 2, x0 + 2:x1 - 2].mean((0, 1))
            assert inner[1 - label] > inner[label] + 1  # red is class 1, channel 0


def test_what_is_trained_on_is_large_enough_and_annotated(photos):
    with changed(photos) as content:
        for image in content["images"]:
            image["width"] = {"0.png": 31, "1.png": 32, "4.png": 9}.get(image["file_name"], image["width"])
        for entry in content["annotations"]:
            entry["iscrowd"] |= entry["image_id"] == 98  # 2.png
            if isinstance(entry["segmentation"], dict):
                entry["segmentation"] = [[3, 4, 9, 4, 9, 10]]
    training, _, _ = detection.datasets(Config(data=str(photos), img_size=64))
    assert [training.folder.file_names[i] for i in training.indices] == ["3.png", "2.png", "1.png"]
    assert training.notes[:-3] == ["left out: photographs: 1 without objects, 1 with a side below 32 pixels, as 0.png "
                                   "of 60 x 31", "left out: objects: 2 crowds"]


def test_objects_that_are_not_trained_on_are_counted(photos):
    training, validation, _ = detection.datasets(Config(data=str(photos), img_size=64))
    assert training.notes[:-3] == ["left out: photographs: 1 without objects", "left out: objects: 1 crowds, 1 outside "
                                   "of their photograph, 1 below one pixel"] and validation.notes == []
    assert training.notes[-3:] == [f"class {name}, too few to learn it well; expected 5 or more" for name in (
        "green has 4 photographs", "red has 4 photographs", "blue has 1 photograph")]
    with changed(photos) as content:
        first, second, *_ = [entry for entry in content["annotations"] if entry["image_id"] == 99]
        first["bbox"][0], second["ignore"] = 79 - 1e-4, 1
    training, _, _ = detection.datasets(Config(data=str(photos), img_size=64))
    assert training.notes[1] == ("left out: objects: 1 crowds, 1 to be ignored, 1 outside of their photograph, 1 below "
                                 "one pixel, 1 with less than 0.1 pixels inside of it")
    for epoch in range(10):
        _, boxes, *_ = training[epoch, 2]  # 1.png
        assert len(boxes) == 0
    with changed(photos) as content:
        first, second, *_ = [entry for entry in content["annotations"] if entry["image_id"] == 99]
        second["ignore"], second["segmentation"] = 0, []
    config = Config(data=str(photos), img_size=64, masks="optional")
    training, _, _ = detection.datasets(config)
    assert training[0, 2][4].tolist() == [False]  # the second's
    with changed(photos) as content:
        first, second, *_ = [entry for entry in content["annotations"] if entry["image_id"] == 99]
        content["images"][1]["width"] = 670  # 67 x 670: a side of 64 makes it 64 * 5 / 3 wide, 0.16 of that
        first["bbox"][0], first["segmentation"] = 670 - 0.61, []
    training, _, _ = detection.datasets(config)
    assert training.notes[1].endswith(", 1 with less than 0.1 pixels inside of it")


def test_what_is_a_box_after_the_last_resize_is_kept(monkeypatch):
    pixels, boxes, labels, masks = sample(40, 50, 3)
    boxes[:, 0], boxes[:, 2] = [10, 49.75, 49.85], [20, 60, 60]  # 0.125 and 0.075 pixels after a resize to the half
    config = detector(img_size=20, resize=(1.0, 1.0), crop=0.0, flip=0.0)
    _, ours, kept, seen = detection.augment(pixels, boxes, labels, masks, config)
    assert kept.tolist() == [0, 1] and len(ours) == len(seen) == 2
    boxes[:, [1, 3]], boxes[:, [0, 2]] = [[39.75, 60]] * 3, [3, 9]
    boxes[1, 1] = 39.85
    _, ours, kept, seen = detection.augment(pixels, boxes, labels, masks, config)
    assert kept.tolist() == [0, 2] and len(ours) == len(seen) == 2
    monkeypatch.setattr(detection, "MIN_BOX", 0.125)  # itself is enough
    assert len(detection.augment(pixels, boxes, labels, masks, config)[1]) == 2


def test_a_limit_keeps_the_first_ids(photos):
    training, validation, _ = detection.datasets(Config(data=str(photos), img_size=64, limit=2, val_limit=3))
    assert [json.loads(training.folder.image_ids[i]) for i in training.indices] == [97, 98] and len(training) == 2
    assert [validation.image_id(validation[i][3]) for i in range(len(validation))] == [97, 98, 99]


def test_photographs_are_grouped_by_their_orientation(photos):
    training, _, _ = detection.datasets(Config(data=str(photos), img_size=64))
    shapes = [training.folder.pixels(i).shape for i in training.indices]
    assert training.groups.tolist() == [int(w > h) for h, w, _ in shapes] and {*training.groups.tolist()} == {0, 1}


@pytest.mark.parametrize("orientation, size, turned", [(6, (60, 90), None), (6, (90, 60), None), (3, (60, 90), True)])
def test_photographs_are_turned_so_that_they_fit_their_annotations(photos, orientation, size, turned):
    stored = np.full((*size, 3), 40, np.uint8)
    stored[:10] = 200
    for split in ("train", "val"):
        Image.fromarray(stored).save(photos / f"{split}2017" / "0.png", exif=exif(orientation))
    for choice in ("apply", "ignore"):
        training, validation, _ = detection.datasets(Config(data=str(photos), img_size=60, exif=choice))
        for dataset, count in ((training, 5), (validation, 4)):
            pixels, notes = dataset.folder.pixels(count - 1), [
                note for note in dataset.notes if "left out" not in note and "too few" not in note]
            assert pixels.shape == (60, 90, 3)
            if turned:  # upside down or not: unclear, and so said
                assert pixels[55].mean() == (200 if choice == "apply" else 40)
                assert len(notes) == 1 and f"EXIF: 1 of the {count}" in notes[0]
            else:
                assert notes == []


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def test_batches_are_padded_to_multiples_of_32(photos):
    training, _, _ = detection.datasets(Config(data=str(photos), img_size=64))
    samples = [training[0, i] for i in range(3)]
    images, sizes, targets = to_device(training.collate(samples), torch.device("cpu"))
    clear_padding(images, sizes)
    assert images.shape[2] % 32 == images.shape[3] % 32 == 0
    for i, (image, *_) in enumerate(samples):
        h, w = sizes[i]
        assert torch.equal(images[i, :, :h, :w], to_tensor(image))
        assert images[i, :, h:].abs().sum() == images[i, :, :, w:].abs().sum() == 0
        masks = targets[i]["masks"]
        assert masks.shape[1:] == images.shape[2:] and not masks[:, h:].any() and not masks[:, :, w:].any()
        assert np.array_equal(masks[:, :h, :w], samples[i][3])
        assert np.array_equal(targets[i]["boxes"], samples[i][1]) and targets[i]["boxes"].dtype == torch.float32
        assert np.array_equal(targets[i]["labels"], samples[i][2])


def test_validation_photographs_are_resized_padded_and_described_as_in_the_file(photos):
    validation, _ = detection.validation_set(Config(data=str(photos), img_size=48))
    image, size, original, index, annotations = validation[2]  # 1.png, 67 x 79
    assert (validation.image_id(index), original, size, tuple(image.shape)) == (99, (67, 79), (48, 57), (3, 64, 64))
    assert torch.equal(image[:, :48, :57], to_tensor(resize(validation.folder.pixels(2), (48, 57))))
    assert not image[:, 48:].any() and not image[:, :, 57:].any()
    assert [(entry["category_id"], entry["bbox"], entry["area"]) for entry in annotations] \
        == [(1, [5, 8, 20, 30], 600), (0, [30, 20, 15, 25], 375)]
    for entry in annotations:
        assert oracle.toBbox(entry["segmentation"]).tolist() == entry["bbox"]
    panorama, size = detection.resize_and_pad(np.zeros((20, 100, 3), np.uint8), 48)
    assert size == (16, 80) and panorama.shape == (3, 32, 96)


def test_scenes_have_the_boxes_and_masks_of_the_drawing():
    training, validation, classes = detection.datasets(Config(img_size=48, limit=20, val_limit=10))
    image, boxes, labels, masks, has_mask = training[3, 5]
    assert image.shape == (48, 48, 3) and len(boxes) == len(labels) == len(masks) == has_mask.sum()
    assert not np.array_equal(image, training[4, 5][0])
    shown, size, original, image_id, annotations = validation[5]
    assert shown.shape == (3, 64, 64) and size == original == (48, 48) and image_id == 5 and len(classes) == 8
    for annotation in annotations:
        code = annotation["segmentation"]
        assert oracle.toBbox(code).tolist() == annotation["bbox"] and oracle.area(code) == annotation["area"]


@pytest.mark.parametrize("change, found", [
    ({}, True), ({"bbox": [2, 3, 1, 1]}, True), ({"bbox": [2, 3, 0.9, 5]}, False), ({"bbox": [2, 3, 5, 0.9]}, False),
    ({"area": 0}, False), ({"area": 1}, True), ({"iscrowd": 1}, False), ({"ignore": 1}, False),
    ({"bbox": [-5, 3, 5, 5]}, False),
    ({"bbox": [-5, 3, 6, 5]}, True), ({"bbox": [30, 3, 5, 5]}, False), ({"bbox": [29, 3, 5, 5]}, True),
    ({"bbox": [2, -5, 5, 5]}, False), ({"bbox": [2, 20, 5, 5]}, False), ({"bbox": [2, 19, 5, 5]}, True)])
def test_crowds_and_what_is_out_of_the_image_or_below_a_pixel_are_not_trained_on(change, found):
    entry = {"bbox": [2, 3, 5, 6], "area": 30, "iscrowd": 0, "ignore": 0, "category_id": 4,
             "segmentation": [[2, 3, 7, 3, 7, 9, 2, 9]], **change}
    boxes, labels, masks, has_mask = detection.objects([entry], 20, 30)
    assert len(boxes) == len(labels) == len(masks) == found
    if found:
        x, y, w, h = entry["bbox"]
        assert boxes.tolist() == [[x, y, x + w, y + h]] and labels.tolist() == [4]
        assert np.argwhere(masks[0]).min(0).tolist() == [3, 2] and np.argwhere(masks[0]).max(0).tolist() == [8, 6]
        assert has_mask.tolist() == [True]


# Augmentation

def test_augmented_objects_follow_the_pixels(photos):
    config = Config(data=str(photos), img_size=64, resize=(0.6, 1.0), crop=0.5, flip=0.5)
    training, _, _ = detection.datasets(config)
    sizes = set()
    for epoch, i in np.ndindex(12, len(training)):
        image, boxes, labels, masks, _ = training[epoch, i]
        assert np.array_equal(image, training[epoch, i][0])
        sizes.add(tuple(image.shape))
        assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min(initial=0) >= 0
        assert max(image.shape[:2]) <= 64 * 5 / 3
        for box, label, mask in zip(boxes, labels, masks):
            if mask[1:-1, 1:-1].sum() > 60:  # the whole of an object is of its colour, but for its border
                inside = image[mask]
                assert (inside[:, 1 - label] > inside[:, label]).mean() > 0.7
                assert np.abs(box - bounds(mask)).max() <= 3
    assert len(sizes) > 20


def sample(H, W, n=6):
    """A photograph whose every pixel says where it is, and objects at random in it."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:H, :W]
    x0, y0 = rng.uniform(0, W - 4, n), rng.uniform(0, H - 4, n)
    boxes = np.stack([x0, y0, rng.uniform(x0 + 2, W), rng.uniform(y0 + 2, H)], 1).astype(np.float32)
    return np.stack([y, x, y + x], 2).astype(np.uint8), boxes, np.arange(n), rng.random((n, H, W)) < 0.5


@pytest.mark.parametrize("H, W, ratio, size", [
    (40, 50, 1.0, (48, 60)), (50, 40, 0.5, (30, 24)), (40, 50, 0.6, (28, 35)),
    (20, 100, 1.0, (16, 80)), (20, 100, 0.5, (16, 80))])
def test_resized_masks_are_those_of_the_pixels_above_left_of_them(H, W, ratio, size):
    """In the last two, the long side is limited, whatever the ratio."""
    pixels, boxes, _, masks = sample(H, W)
    (h, w), (rows, columns) = size, (np.arange(side) * old // side for side, old in zip(size, (H, W)))
    image, ours, seen = detection.rescale(pixels, boxes, masks, detector(img_size=48), ratio)
    assert np.array_equal(image, resize(pixels, size)) and np.array_equal(seen, masks[:, rows][:, :, columns])
    assert ours == pytest.approx(boxes * [w / W, h / H, w / W, h / H], rel=1e-6)
    none = detection.rescale(pixels, boxes[:0], masks[:0], detector(img_size=48), ratio)
    assert none[1].shape == (0, 4) and none[2].shape == (0, h, w)


def test_boxes_beyond_the_image_end_at_its_border():
    pixels, _, _, masks = sample(40, 50, 1)
    boxes = np.float32([[-5, -6, 70, 80]])
    assert detection.rescale(pixels, boxes, masks, detector(img_size=40), 0.5)[1].tolist() == [[0, 0, 25, 20]]


def test_crops_are_one_rectangle_of_pixels_masks_and_boxes():
    pixels, boxes, labels, masks = sample(80, 90)
    config, heights, widths, lost, ends = detector(img_size=100), set(), set(), 0, set()
    for seed in range(300):
        torch.manual_seed(seed)
        crop, ours, kept, seen = detection.random_crop(pixels, boxes, labels, masks, config)
        (top, left), (h, w) = crop[0, 0, :2].tolist(), crop.shape[:2]
        assert np.array_equal(crop, pixels[top:top + h, left:left + w])
        expected = {}
        for label, (x0, y0, x1, y1) in zip(labels, boxes - np.float32([left, top, left, top])):
            box = max(0, x0), max(0, y0), min(w, x1), min(h, y1)
            if box[0] < box[2] and box[1] < box[3]:
                expected[label] = box
        assert kept.tolist() == list(expected) and len(ours) == len(kept)
        assert all(box.tolist() == pytest.approx(expected[label], abs=1e-4) for label, box in zip(kept, ours))
        assert np.array_equal(seen, masks[kept, top:top + h, left:left + w])
        heights.add(h)
        widths.add(w)
        lost += len(kept) < len(labels)
        ends |= {("top", top), ("left", left), ("bottom", top + h), ("right", left + w)}
    assert heights == widths == set(range(48, 76)) and lost > 20
    assert ends >= {("top", 0), ("left", 0), ("bottom", 80), ("right", 90)}


@pytest.mark.parametrize("H, W, heights, widths", [
    (40, 60, {40}, set(range(48, 61))), (60, 40, set(range(48, 61)), {40})])
def test_crops_of_small_photographs_are_as_large_as_those(H, W, heights, widths):
    seen = set()
    for seed in range(200):
        torch.manual_seed(seed)
        seen.add(detection.random_crop(*sample(H, W), detector(img_size=100))[0].shape[:2])
    assert {h for h, _ in seen} == heights and {w for _, w in seen} == widths


def test_all_ratios_are_drawn_and_a_crop_is_from_a_smaller_resize():
    found = sample(100, 100)
    plain, cropped = detector(img_size=100, resize=(0.6, 1.0), crop=0.0), []
    sides = set()
    for seed in range(150):
        torch.manual_seed(seed)
        sides.add(detection.augment(*found, plain)[0].shape[0])
    assert sides == {60, 64, 68, 72, 76, 80, 84, 88, 92, 96, 100}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "random_crop", lambda *inputs: cropped.append(inputs[0].shape[0]) or inputs[:4])
        for seed in range(40):
            torch.manual_seed(seed)
            detection.augment(*found, detector(img_size=200, crop=1.0))
    assert set(cropped) == {100, 125, 150} and len(cropped) == 40


def test_flipped_objects_are_where_their_pixels_are():
    pixels, boxes, labels, masks = sample(40, 50)
    config = detector(img_size=40, resize=(1.0, 1.0), crop=0.0, flip=1.0)
    image, ours, kept, seen = detection.augment(pixels, boxes, labels, masks, config)
    assert np.array_equal(image, pixels[:, ::-1]) and np.array_equal(seen, masks[:, :, ::-1])
    assert ours == pytest.approx(boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [50, 0, 50, 0], abs=1e-4)
    assert np.array_equal(kept, labels)


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
