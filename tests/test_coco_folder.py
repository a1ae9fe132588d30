"""train/coco_folder.py: what is read of COCO's files, and how what is wrong with them is said."""
import copy
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as oracle
from torch.utils.data import DataLoader

from photographs import coco_folder
from test_detection import changed
from train import detection
from train.coco_folder import CocoFolder
from train.config import Config

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


@pytest.fixture
def photos(tmp_path):
    return coco_folder(tmp_path / "coco")


# Reading

def test_annotations_are_those_of_the_file(photos):
    file = photos / "annotations" / "instances_train2017.json"
    content, folder = json.loads(file.read_text()), CocoFolder(photos, "train")
    images = sorted(content["images"], key=lambda image: image["id"])
    assert len(folder) == len(images) == 5
    for i, image in enumerate(images):
        assert json.loads(folder.image_ids[i]) == image["id"] and folder.file_names[i] == image["file_name"]
        assert (folder.heights[i], folder.widths[i]) == (image["height"], image["width"])
        expected = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        ours = folder.annotations(i)
        assert len(ours) == len(expected)
        for entry, other in zip(ours, expected):
            assert folder.category_ids[entry["category_id"]] == other["category_id"] and entry["ignore"] == 0
            assert all(entry[name] == other[name] for name in ("bbox", "area", "iscrowd"))
            if isinstance(other["segmentation"], dict):
                other = oracle.frPyObjects(other["segmentation"], image["height"], image["width"]) \
                    if isinstance(other["segmentation"]["counts"], list) else other["segmentation"]
                assert np.array_equal(oracle.decode(entry["segmentation"]), oracle.decode(other))
            else:
                assert entry["segmentation"] == other["segmentation"]


def test_ids_are_names(photos):
    ids = ["007", "7", -3, 2.5, "photo/1"]
    for split in ("train", "val"):
        with changed(photos, split) as content:
            of = {image["id"]: ids[i] for i, image in enumerate(content["images"])}
            for image in content["images"]:
                image["id"] = of[image["id"]]
            for entry in content["annotations"]:
                entry["image_id"], entry["category_id"] = of[entry["image_id"]], f"c{entry['category_id']}"
            for category in content["categories"]:
                category["id"] = f"c{category['id']}"
    folder = CocoFolder(photos, "train")
    assert [json.loads(folder.image_ids[i]) for i in range(5)] == [-3, 2.5, "007", "7", "photo/1"]
    assert folder.category_ids == ["c3", "c7", "c90"] and folder.starts.diff().tolist() == [2, 2, 5, 2, 0]


# Areas and masks

def test_areas_that_are_missing_are_taken_from_the_mask_or_the_box(photos):
    with changed(photos) as content:
        first, second, third, *_ = [entry for entry in content["annotations"] if entry["image_id"] < 100]
        first["area"], second["area"] = 0, None
        first["segmentation"] = [[5, 8, 25, 8, 25, 38]]  # half of its box
        second["segmentation"] = [[30, 20, 45, 20, 45, 45, 30, 45]]
        del third["area"]
        third["segmentation"] = []
    folder = CocoFolder(photos, "train", "optional")
    entry, = [entry for i in range(5) for entry in folder.annotations(i)
              if entry["segmentation"] == [[5, 8, 25, 8, 25, 38]]]
    assert 250 < entry["area"] < 350
    assert sorted(folder.areas.tolist()) == [10, 10, entry["area"], 375, 375, 375, 375, 400, 600, 600, 600]
    assert folder.notes == ["masks: 1 of the 11 annotations have none: boxes alone, without mask loss and outside of "
                            "mask AP", "areas: 3 of the 11 annotations have none or 0: taken from their masks, or from "
                            "their boxes where there is no mask"]
    training = detection.AugmentedPhotographs(folder, Config(img_size=64))
    assert [len(training[0, i][1]) for i in range(4)] == [2, 2, 2, 2] and training.notes[-5:-3] == folder.notes


NO_MASKS = [[], [[]], [[5, 8, 20, 30]], [[[5, 8], [25, 8], [25, 38], [5, 38], [5, 8], [5, 8]]], [[1, 2, 3, 4, 5, 6, 7]],
            None, "missing"]


@pytest.mark.parametrize("segmentation", NO_MASKS)
def test_boxes_alone_are_refused_or_have_no_mask(photos, segmentation):
    for split in ("train", "val"):
        with changed(photos, split) as content:
            entry = next(entry for entry in content["annotations"] if entry["image_id"] == 98)
            if segmentation == "missing":
                del entry["segmentation"]
            else:
                entry["segmentation"] = segmentation
    with pytest.raises(ValueError) as error:
        CocoFolder(photos, "train")
    assert all(words in str(error.value) for words in (
        "instances_train2017.json", "1 of the 11 annotations", f"id {entry['id']};", "--masks optional"))
    config = Config(data=str(photos), img_size=64, masks="optional", crop=0.0)
    training, validation, _ = detection.datasets(config)
    assert [entry["segmentation"] is None for entry in training.folder.annotations(2)] == [True, False]
    image, boxes, labels, masks, has_mask = training[0, 1]
    assert has_mask.tolist() == [False, True] and masks.any((1, 2)).tolist() == [False, True] and len(boxes) == 2
    assert training.collate([training[0, 1]])[2][0]["has_mask"].tolist() == [False, True]
    assert [entry["segmentation"] is None for entry in validation[1][4]] == [True, False]


def test_of_many_boxes_alone_ten_are_named_and_turned_ones_have_no_area(photos):
    with changed(photos) as content:
        for entry in content["annotations"]:
            entry["segmentation"] = []
        content["annotations"][0].update(bbox=[9, 9, -2, -3], area=0)
        first = ", ".join(f"id {entry['id']}" for entry in content["annotations"][:10])
    with pytest.raises(ValueError, match=rf"11 of the 11 .*: {first}, \.\.\.; expected"):
        CocoFolder(photos, "train")
    assert CocoFolder(photos, "train", "optional").areas.min() == 0


# What is wrong with the data

def photograph_to(content):
    def damage(photos):
        path = photos / "train2017" / "1.png"
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            content.save(path)
    return damage


@pytest.mark.parametrize("content, words", [
    (None, ["1 of the 5 photographs", "1.png"]),
    (b"junk", ["1.png", "cannot be read"]),
    (Image.new("RGB", (9, 9)), ["1.png", "9 x 9", "67 x 79"]),
])
def test_photographs_that_are_wrong_are_named(photos, content, words):
    photograph_to(content)(photos)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        training, _, _ = detection.datasets(Config(data=str(photos), img_size=32))
        [training[0, i] for i in range(4)]
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("damage, words", [
    (lambda text: "{", ["instances_train2017.json", "not JSON"]),
    (lambda text: text.encode("utf-16"), ["instances_train2017.json", "not JSON"]),
    (lambda text: json.dumps({"images": [], "annotations": []}), ["no images and no categories"]),
    (lambda text: json.dumps({**json.loads(text), "images": []}), ["no images;"]),
    (lambda text: text.replace('"category_id": 7', '"category_id": 8'), ["id 1: category_id is 8", "first of 6"]),
    (lambda text: text.replace('"image_id": 99', '"image_id": [99]'), ["id 6: image_id is [99]"]),
    (lambda text: text.replace('"image_id": 99', '"image_id": "99"'), ["id 6: image_id is '99'", "first of 2"]),
    (lambda text: text.replace("1.png", "../../1.png"), ["outside", "../../1.png", "refused"]),
    (lambda text: text.replace("1.png", "/etc/passwd"), ["outside", "/etc/passwd", "refused"]),
    (lambda text: text.replace("green", "yellow"), ["categories of train and val differ"]),
    (lambda text: text.replace('"annotations"', '"labels"'), ["no annotations", "for training"]),
    (lambda text: text.replace("1.png", "0.png"), ["same file_name", "'0.png'"]),
    (lambda text: text.replace("1.png", "./0.png"), ["same file_name", "'0.png'"]),
    (lambda text: text.replace('{"id": 99,', '{"id": 100,'), ["same image id", "100 (1 in all)"]),
    (lambda text: text.replace('{"id": 90,', '{"id": 3,'), ["same category id", ": 3 (1"]),
    (lambda text: text.replace("green", "red"), ["same category name", "'red'"]),
    (lambda text: text.replace("40.5, 30, 40.5, 50", "40.5, 30, 1e7, 50"), ["id 51: segmentation", "first of 1)"]),
    (lambda text: text.replace("1.png", "x/../../1.png"), ["outside", "x/../../1.png", "refused"]),
    (lambda text: None, ["instances_train*.json", "found []"]),
])
def test_annotations_that_are_wrong_are_named(photos, damage, words):
    file = photos / "annotations" / "instances_train2017.json"
    text = damage(file.read_text())
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        detection.datasets(Config(data=str(photos), img_size=32))
    assert all(word in str(error.value) for word in words), error.value


FIELDS = {
    "annotations": {
        "bbox": ["missing", None, [], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, "4"], "1234", [1, 2, 3, float("nan")],
                 [float("-inf"), 2, 3, 4], [1e7, 2, 3, 4], [10 ** 400, 2, 3, 4]],
        "area": ["12", [], float("nan"), float("inf")],
        "iscrowd": [None, "x", []], "ignore": ["x", None], "image_id": ["missing", None, {}],
        "category_id": ["missing", []],
        "segmentation": [
            {"size": [60, 90], "counts": [3]}, {"size": [60, 90], "counts": "abc"}, {"size": [60, 90]},
            {"size": [60, 90], "counts": "a\u00e9"}, {"size": [60, 90], "counts": ""}, {"size": [60], "counts": [5400]},
            {"size": [5, 5], "counts": [25]}, {"size": [90, 60], "counts": [5400]},
            {"size": [60, 91], "counts": [5460]}, {"size": [61, 90], "counts": [5490]},
            {"size": [60, 90], "counts": [5401, -1]}, {"size": [60, 90], "counts": [5400.0]},
            {"size": [10 ** 6, 10 ** 6], "counts": [10 ** 12]}, [["a", "b", 1, 2, 3, 4]], [1, 2, 3, 4, 5, 6], 7,
            [[1, 2, 3, 4, 5, float("nan")]], [[1, 2, 3, 4, 5, 1e9]], [[1, 2, 3, 4, 5, -1e9]],
            "polygon"]},
    "images": {
        "height": ["missing", "480", 0, -5, 6.5, None, float("inf"), float("nan"), True],
        "width": ["missing", "480", 10 ** 12], "file_name": ["missing", 5, "", None, "a\0b", "\ud800"],
        "id": ["missing", None, [], float("nan"), True]},
    "categories": {"id": ["missing", None, []], "name": ["missing", 5, ""]}}


@pytest.mark.parametrize("name, field", [(name, field) for name in FIELDS for field in FIELDS[name]])
def test_entries_that_are_wrong_are_named_with_file_id_and_field(photos, name, field):
    file = photos / "annotations" / "instances_train2017.json"
    text = file.read_text()
    for value in FIELDS[name][field]:
        content = json.loads(text)
        entry = content[name][0]
        which = "number 1" if field == "id" and value == "missing" else \
            f"id {json.loads(json.dumps(value)) if field == 'id' else entry['id']!r}"
        if value == "missing":
            del entry[field]
        else:
            entry[field] = value
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError) as error:
            CocoFolder(photos, "train")
        assert f"instances_train2017.json: {name}, {which}: {field} is " in str(error.value), (value, error.value)
    for value in (None, [], 5):
        content = json.loads(text)
        content[name][1] = value
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"instances_train2017.json: {name}, number 2: it is"):
            CocoFolder(photos, "train")


# Test sets

def test_a_test_set_has_no_annotations_and_its_photographs_in_test2017(photos):
    (photos / "annotations" / "instances_val2017.json").rename(photos / "annotations" / "image_info_test-dev2017.json")
    (photos / "val2017").rename(photos / "test2017")
    file = photos / "annotations" / "image_info_test-dev2017.json"
    content = json.loads(file.read_text())
    del content["annotations"]
    file.write_text(json.dumps(content))
    for data in (photos, file):
        config = Config(data=str(data), img_size=64)
        validation, classes = detection.validation_set(config)
        assert len(validation) == 4 and classes == ["green", "red", "blue"] and not validation.annotated
        assert validation[0][4] == []
        with pytest.raises((ValueError, FileNotFoundError)):
            detection.datasets(config)
    (photos / "annotations" / "instances_train2017.json").rename(photos / "instances_train2017.json")
    with pytest.raises(FileNotFoundError, match=r"instances_train2017.json; found \[\]"):
        CocoFolder(photos, "train")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        CocoFolder(photos / "instances_train2017.json", "train")  # a file is for evaluation
    content["annotations"] = []
    file.write_text(json.dumps(content))
    assert detection.validation_set(config)[0].annotated  # that there is nothing is known
    (photos / "annotations" / "image_info_test2017.json").write_text(file.read_text())
    with pytest.raises(FileNotFoundError, match=r"image_info_test-dev2017.json.*name one of them"):
        detection.validation_set(Config(data=str(photos), img_size=64))


# Workers

def storages(folder):
    """The tensors that hold what a folder knows."""
    values = [value for holder in (folder, folder.image_ids, folder.file_names, folder.codes)
              for value in vars(holder).values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def test_annotations_are_held_in_tensors_alone(photos):
    """Which processes share; nothing else may grow with the file."""
    folder = CocoFolder(photos, "train")
    others = {name: value for name, value in vars(folder).items() if not isinstance(value, torch.Tensor)}
    assert {*others} == {"exif", "file", "root", "notes", "annotated", "category_ids", "classes", "image_ids",
                         "file_names", "codes"}
    assert len(storages(folder)) == 2 * 3 + 12
    training = detection.AugmentedPhotographs(folder, Config(img_size=64))
    assert isinstance(training.indices, torch.Tensor) and isinstance(training.groups, torch.Tensor)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_the_annotations(photos, method):
    training, _, _ = detection.datasets(Config(data=str(photos), img_size=32))
    loader = DataLoader(training, None, sampler=[(0, i) for i in range(4)], num_workers=1,
                        multiprocessing_context=method)
    for sample, key in zip(loader, loader.sampler, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(sample, training[key], strict=True))
    if method == "spawn":  # not pickled, but moved to shared memory
        assert all(tensor.is_shared() for tensor in storages(training.folder) if len(tensor))


# Damaged at random

VALUES = [None, True, 0, -1, 1, 3, 1e300, -7.5, 10 ** 30, float("nan"), "", "x", "7", [], {}, [[]], [1], [1, 2, 3, 4],
          [[1, 2, 3, 4, 5, 6]], {"size": [60, 90], "counts": [5400]}, {"size": [60, 90], "counts": "PP"}]


def mutated(text, rng):
    """JSON with a few values, names or bytes replaced, removed or doubled."""
    content = json.loads(text)
    for _ in range(rng.randint(0, 3)):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = rng.choice(keys)
            if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.15:
                break
            node = node[key]
        action = rng.random()
        if action < 0.7:
            node[key] = copy.deepcopy(rng.choice(VALUES))
        elif action < 0.85:
            del node[key]
        elif isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
    data = bytearray(json.dumps(content).encode())
    for _ in range(rng.choice([0, 0, 1, 2])):
        at = rng.randrange(len(data))
        data[at:at + rng.choice([0, 1, 30])] = rng.choices(b'{}[],:"019-.eEtfn\\u\xff\x00 ', k=rng.choice([0, 1, 3]))
    return bytes(data)


def assert_read_or_refused(photos, count, seed):
    """Every mutated file gives samples or an error that names a file; nothing else is raised, and nothing hangs."""
    file = photos / "annotations" / "instances_train2017.json"
    text, rng, read = file.read_text(), random.Random(seed), 0
    for _ in range(count):
        file.write_bytes(mutated(text, rng))
        try:
            folder = CocoFolder(photos, "train", rng.choice(["required", "optional"]))
            training = detection.AugmentedPhotographs(folder, Config(img_size=32))
            shown = detection.Photographs(folder, 32)
            assert [shown[i][3] for i in range(len(shown))] == [*range(len(folder))]
            for i in range(len(training)):
                image, boxes, labels, masks, has_mask = training[0, i]
                assert np.isfinite(boxes).all() and len(boxes) == len(labels) == len(masks) == len(has_mask)
                assert masks.shape[1:] == image.shape[:2]
            read += 1
        except (ValueError, FileNotFoundError) as error:
            assert str(photos) in str(error) or file.name in str(error), error
    return read


def test_mutated_files_are_read_or_refused(photos):
    assert 10 < assert_read_or_refused(photos, 100, 0) < 90


@pytest.mark.slow
def test_two_thousand_mutated_files_are_read_or_refused(photos):
    assert 200 < assert_read_or_refused(photos, 2000, 1) < 1800
