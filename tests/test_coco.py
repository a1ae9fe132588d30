"""Detection end to end: COCO's folders, augmentation, COCO's twelve numbers against pycocotools, the commands."""
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as oracle_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from eval import coco, options
from models import create_model
from run import main
from test_mask_rcnn import TINY
from train import detection
from train.config import Config, resolve
from train.data import ShareSampler
from train.loop import Run, learning_rate, train

ROOT = Path(__file__).parents[1]
TRAIN_EPOCH = Run.train_epoch
IDS = (7, 3, 90)  # of the categories in the file, with gaps and out of order; in order of their ids: green, red, blue


@pytest.fixture
def photos(tmp_path):
    """COCO's layout: photographs of odd sizes with a red and a green rectangle, a crowd, a run-length code of either kind, an empty image."""
    root = tmp_path / "coco"
    for split, count in (("train", 5), ("val", 4)):
        (root / f"{split}2017").mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(count):
            H, W = 60 + 7 * i, 90 - 11 * i
            pixels = np.full((H, W, 3), 40, np.uint8)
            images.append({"id": 100 - i, "file_name": f"{i}.png", "height": H, "width": W})
            for number, (category, x, y, w, h) in enumerate([(7, 5, 8, 20, 30), (3, 30, 20, 15, 25)] if i < count - 1 else []):
                pixels[y:y + h, x:x + w, number] = 220
                mask = np.zeros((H, W), np.uint8)
                mask[y:y + h, x:x + w] = 1
                code = oracle_mask.encode(np.asfortranarray(mask))
                runs = [len(list(group)) for group in np.split(mask.T.flatten(), np.flatnonzero(np.diff(mask.T.flatten())) + 1)]
                annotations.append({
                    "id": len(annotations) + 1, "image_id": 100 - i, "category_id": category, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                    "segmentation": [[[x, y, x + w, y, x + w, y + h, x, y + h]], {"size": [H, W], "counts": code["counts"].decode()},
                                     {"size": [H, W], "counts": runs}][(i + number) % 3]})
            if i == 0:
                annotations.append({"id": 50, "image_id": 100, "category_id": 7, "bbox": [40, 30, 20, 20], "area": 400, "iscrowd": 1,
                                    "segmentation": {"size": [H, W], "counts": [H * 40, H * 20, H * (W - 60)]}})
                annotations.append({"id": 51, "image_id": 100, "category_id": 7, "bbox": [40, 30, 0.5, 20], "area": 10, "iscrowd": 0,
                                    "segmentation": [[40, 30, 40.5, 30, 40.5, 50]]})
                annotations.append({"id": 52, "image_id": 100, "category_id": 90, "bbox": [-30, 3, 20, 20], "area": 10, "iscrowd": 0,
                                    "segmentation": [[-30, 3, -10, 3, -10, 23]]})
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{i}.png")
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps({
            "images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in zip(IDS, ("red", "green", "blue"))]}))
    return root


# Data

def test_objects_are_those_of_the_file(photos):
    training, validation, classes = detection.datasets(Config(data=str(photos), img_size=64, resize=(1.0, 1.0), crop=0.0, flip=0.0))
    assert classes == ["green", "red", "blue"] and validation.category_ids == [3, 7, 90]
    assert len(training) == 4 and len(validation) == 4  # nothing to learn from an empty image, but to find nothing in it counts
    for i in range(4):
        image, boxes, labels, masks = training[0, i]
        assert image.dtype == torch.float32 and boxes.shape == (2, 4) and sorted(labels.tolist()) == [0, 1] and masks.shape == (2, *image.shape[1:])
        for box, label, mask in zip(boxes, labels, masks):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert np.abs(box - [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).max() <= 1
            inner = image[:, rows[0] + 2:rows[-1] - 1, columns[0] + 2:columns[-1] - 1].mean((1, 2))
            assert inner[1 - label] > inner[label] + 1  # red is class 1, channel 0


def test_augmented_objects_follow_the_pixels(photos):
    config = Config(data=str(photos), img_size=64, resize=(0.6, 1.0), crop=0.5, flip=0.5)
    training, _, _ = detection.datasets(config)
    sizes = set()
    for epoch in range(12):
        for i in range(len(training)):
            image, boxes, labels, masks = training[epoch, i]
            assert torch.equal(image, training[epoch, i][0])
            sizes.add(tuple(image.shape))
            assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min(initial=0) >= 0 and max(image.shape[1:]) <= 64 * 5 / 3
            for box, label, mask in zip(boxes, labels, masks):
                if mask[1:-1, 1:-1].sum() > 60:  # the whole of an object is of its colour, but for its border
                    inside = image[:, torch.from_numpy(np.ascontiguousarray(mask))]
                    assert (inside[1 - label] > inside[label]).float().mean() > 0.7
                    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                    assert np.abs(box - [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).max() <= 3
    assert len(sizes) > 20


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
        assert torch.equal(images[i, :, :h, :w], image) and images[i, :, h:].abs().sum() == images[i, :, :, w:].abs().sum() == 0
        assert targets[i]["masks"].shape[1:] == images.shape[2:]


@settings(deadline=None, max_examples=40)
@given(n=st.integers(4, 60), share=st.integers(1, 4), world=st.integers(1, 3), accumulate=st.integers(1, 2), seed=st.integers(0, 9))
def test_passes_are_of_one_orientation(n, share, world, accumulate, seed):
    groups = np.random.default_rng(seed).integers(0, 2, n)
    passes = [list(ShareSampler(n, share * world * accumulate, accumulate, seed, rank, world, groups)) for rank in range(world)]
    seen = [index for rank in passes for part in rank for _, index in part]
    assert len(seen) == len(set(seen)) == n // (share * world * accumulate) * share * world * accumulate
    mixed = sum(len({groups[index] for _, index in part}) > 1 for rank in passes for part in rank)
    assert mixed <= 1  # the remainders of two groups meet in one pass


def with_segmentation(file, segmentation):
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = segmentation
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("damage, words", [
    (lambda root, file: (root / "train2017" / "1.png").unlink(), ["1 of the 5 photographs", "1.png"]),
    (lambda root, file: (root / "train2017" / "1.png").write_bytes(b"junk"), ["1.png", "cannot be read"]),
    (lambda root, file: Image.new("RGB", (9, 9)).save(root / "train2017" / "1.png"), ["1.png", "9 x 9", "67 x 79"]),
    (lambda root, file: file.write_text("{"), ["instances_train2017.json", "not COCO's"]),
    (lambda root, file: file.write_text(json.dumps({"images": [], "annotations": []})), ["no 'categories'"]),
    (lambda root, file: file.write_text(file.read_text().replace('"category_id": 7', '"category_id": 8')), ["no 8"]),
    (lambda root, file: file.write_text(file.read_text().replace("1.png", "../../1.png")), ["outside", "../../1.png", "refused"]),
    (lambda root, file: file.write_text(file.read_text().replace("1.png", "/etc/passwd")), ["outside", "/etc/passwd", "refused"]),
    (lambda root, file: file.write_text(file.read_text().replace("green", "yellow")), ["categories of train and val differ"]),
    (lambda root, file: file.unlink(), ["instances_train*.json", "found []"]),
    *((lambda root, file, damaged=damaged: with_segmentation(file, damaged), ["instances_train2017.json, 0.png", "a segmentation cannot be read"])
      for damaged in ({"size": [5, 5], "counts": [25]}, {"size": [60, 90], "counts": [3]}, {"size": [60, 90], "counts": "abc"},
                      {"size": [60, 90]}, [["a", "b", 1, 2, 3, 4]], None)),
])
def test_what_is_wrong_with_the_data_is_said(photos, damage, words):
    damage(photos, photos / "annotations" / "instances_train2017.json")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        training, _, _ = detection.datasets(Config(data=str(photos), img_size=32))
        [training[0, i] for i in range(4)]
    assert all(word in str(error.value) for word in words), error.value


def test_scenes_have_the_boxes_and_masks_of_the_drawing():
    training, validation, classes = detection.datasets(Config(img_size=48, limit=20, val_limit=10))
    image, boxes, labels, masks = training[3, 5]
    assert image.shape == (3, 48, 48) and len(boxes) == len(labels) == len(masks) and not torch.equal(image, training[4, 5][0])
    shown, size, original, image_id, annotations = validation[5]
    assert shown.shape == (3, 64, 64) and size == original == (48, 48) and image_id == 5 and len(classes) == 8
    for annotation in annotations:
        assert oracle_mask.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]


# The metric

def shifted(annotation, rng, H, W, classes):
    """A detection of an annotated box, moved a little, sometimes of another class."""
    x, y, w, h = np.array(annotation["bbox"]) + rng.normal(0, 3, 4)
    mask = np.zeros((H, W), np.uint8)
    mask[max(0, round(y)):max(0, round(y + h)), max(0, round(x)):max(0, round(x + w))] = 1
    label = annotation["category_id"] if rng.random() < 0.8 else int(rng.integers(classes))
    return {"image_id": annotation["image_id"], "category_id": label, "bbox": [float(v) for v in (x, y, max(1, w), max(1, h))],
            "score": round(float(rng.random()), 2), "segmentation": oracle_mask.encode(np.asfortranarray(mask))}  # rounded: some are equal


def synthetic(rng, images, objects, classes, extra=1, H=120, W=160):
    """[(image id, size, annotations, results)]: objects of all three sizes, crowds, detections near them and elsewhere."""
    photographs = []
    for image_id in range(images):
        annotations = []
        for _ in range(rng.integers(0, objects + 1)):
            w, h = (float(side) for side in rng.uniform(3, 110, 2))
            x, y = float(rng.uniform(0, W - w)), float(rng.uniform(0, H - min(h, H)))
            crowd = int(rng.random() < 0.1)
            mask = np.zeros((H, W), np.uint8)
            mask[round(y):round(y + h), round(x):round(x + w)] = 1
            annotations.append({"image_id": image_id, "category_id": int(rng.integers(classes)), "bbox": [x, y, w, h], "iscrowd": crowd,
                                "area": float(mask.sum()), "segmentation": oracle_mask.encode(np.asfortranarray(mask))})
        found = [shifted(annotation, rng, H, W, classes) for annotation in annotations for _ in range(rng.integers(0, 2 + extra))]
        photographs.append((image_id, (H, W), annotations, found))
    return photographs


def of_pycocotools(photographs, classes):
    truth = COCO()
    truth.dataset = {"images": [{"id": i, "height": h, "width": w} for i, (h, w), _, _ in photographs],
                     "categories": [{"id": i, "name": str(i)} for i in range(classes)],
                     "annotations": [{**entry, "id": i + 1} for i, entry in enumerate(e for _, _, entries, _ in photographs for e in entries)]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        numbers = []
        for kind in ("bbox", "segm"):
            entries = [{k: v for k, v in e.items() if kind == "bbox" and k != "segmentation" or kind == "segm" and k != "bbox"}
                       for *_, found in photographs for e in found]
            evaluation = COCOeval(truth, truth.loadRes(entries), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            numbers.append([100 * value if value >= 0 else float("nan") for value in evaluation.stats])
    return numbers


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1 << 16), images=st.integers(1, 6), objects=st.integers(1, 9), classes=st.integers(1, 4))
def test_the_twelve_numbers_are_pycocotools(seed, images, objects, classes):
    photographs = synthetic(np.random.default_rng(seed), images, objects, classes)
    if not any(found for *_, found in photographs):
        return  # pycocotools cannot
    result = coco.scores(photographs, classes)
    for ours, expected in zip((result["box"], result["mask"]), of_pycocotools(photographs, classes)):
        assert list(ours.values()) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert result["box_ap"] == pytest.approx(np.nanmean([box for box, _ in result["classes"]] or [np.nan]), nan_ok=True)


def test_polygons_too_short_are_no_pixels():
    for segmentation in ([], [[1, 2, 3]]):
        assert oracle_mask.area(detection.run_lengths(segmentation, 50, 60, "x")) == 0


def test_nothing_detected_is_an_ap_of_zero():
    photographs = [(i, size, annotations, []) for i, size, annotations, _ in synthetic(np.random.default_rng(0), 3, 5, 2)]
    result = coco.scores(photographs, 2)
    assert result["box_ap"] == result["mask_ap"] == 0 and set(result["box"]) == set(coco.METRICS)


class Oracle(torch.nn.Module):
    """Finds exactly what is there."""
    num_classes = 3

    def __init__(self, photographs):
        super().__init__()
        self.answers = iter([photographs[i] for i in range(len(photographs))])

    def forward(self, images, sizes, original_sizes):
        *_, annotations = next(self.answers)
        annotations = [entry for entry in annotations if not entry["iscrowd"]]
        boxes = torch.tensor([entry["bbox"] for entry in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [oracle_mask.decode(entry["segmentation"]) for entry in annotations]
        return [{"boxes": boxes, "scores": torch.ones(len(boxes)), "labels": torch.tensor([entry["category_id"] for entry in annotations]),
                 "masks": torch.from_numpy(np.array(masks, bool).reshape(-1, *original_sizes[0]))}]


def test_what_is_there_scores_100(photos):
    validation, _ = detection.validation_set(Config(data=str(photos), img_size=64))
    validation.folder.annotations = [[entry for entry in entries if entry["area"] > 10] for entries in validation.folder.annotations]
    result = coco.evaluate(Oracle(validation), coco.loader(validation, 0, 1, 0), torch.device("cpu"))
    assert result["box_ap"] == pytest.approx(100) and result["mask_ap"] == pytest.approx(100) and result["images"] == 4
    assert result["classes"][:2] == [(pytest.approx(100), pytest.approx(100))] * 2 and np.isnan(result["classes"][2][0])


# Training and the commands

ARGUMENTS = {key: TINY[key] for key in ("embed_dim", "depths", "num_heads", "kernel_size", "channels", "hidden", "anchor_scale", "rpn_samples",
                                        "roi_samples")}
SMALL = dict(model="mask_rcnn_swin_t", attn="elsa", img_size=32, patch_size=2, window_size=2, drop_path_rate=0.1, batch_size=4, epochs=2,
             lr=1e-3, warmup_epochs=0.5, limit=8, val_limit=3, device="cpu", model_args=ARGUMENTS)


@pytest.mark.parametrize("model, recipe, drop_path, epochs, milestones", [
    ("mask_rcnn_swin_t", None, 0.1, 12, (8, 11)), ("mask_rcnn_swin_t", "mask_rcnn_swin_t_3x", 0.2, 36, (27, 33)),
    ("cascade_mask_rcnn_swin_t", None, 0.0, 12, (8, 11)), ("cascade_mask_rcnn_swin_s", "cascade_mask_rcnn_swin_s_3x", 0.75, 36, (27, 33))])
def test_recipes_are_the_published_ones(model, recipe, drop_path, epochs, milestones):
    config, _ = resolve(dict(model=model, data="coco"), recipe)
    assert (config.lr, config.weight_decay, config.img_size, config.batch_size, config.resize) == (1e-4, 0.05, 800, 16, (0.6, 1.0))
    assert (config.drop_path_rate, config.epochs, config.milestones) == (drop_path, epochs, milestones)
    steps = 117266 // 16
    rate = [learning_rate(step, steps, config) for step in (0, 250, 500, milestones[0] * steps - 1, milestones[0] * steps, milestones[1] * steps)]
    assert rate == pytest.approx([1e-7, 5e-5, 1e-4, 1e-4, 1e-5, 1e-6], rel=2e-3)


def test_train_eval_dump_and_predict(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = train(Config(**{**SMALL, "data": str(photos), "img_size": 64, "limit": None, "val_limit": None, "lr": 3e-3, "epochs": 3, "out": "run"}))
    assert {"box_ap", "box_ap50", "mask_ap"} <= history[-1].keys() and Path("run/curves.png").exists()
    capsys.readouterr()
    assert main(["eval", "--weights", "run/last.pt", "--data", str(photos), "--dump", "out/found.json"]) == 0
    printed = capsys.readouterr().out
    assert f"box AP {history[-1]['box_ap']:.2f}" in printed and "AP medium" in printed and "green" in printed
    found = json.loads(Path("out/found.json").read_text())
    truth = COCO(str(photos / "annotations" / "instances_val2017.json"))
    assert found and {entry["category_id"] for entry in found} <= set(IDS)
    evaluation = COCOeval(truth, truth.loadRes("out/found.json"), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert f"box AP {100 * evaluation.stats[0]:.2f}" in printed
    assert main(["eval", "mask_rcnn_swin_t", "--weights", "run/last.pt", "--data", str(photos), "--limit", "2"]) == 0
    assert "2 images" in capsys.readouterr().out
    assert main(["predict", "--weights", "run/last.pt", str(photos / "val2017" / "0.png"), "--out", "seen"]) == 0
    objects = json.loads(Path("seen/0.json").read_text())["objects"]
    assert objects == sorted(objects, key=lambda entry: -entry["score"]) and {entry["class"] for entry in objects} <= {"red", "green", "blue"}
    assert oracle_mask.decode(objects[0]["segmentation"]).shape == Image.open(photos / "val2017" / "0.png").size[::-1]
    assert Image.open("seen/0.png").size[0] >= 256
    capsys.readouterr()
    for arguments, words in ((["eval", "--weights", "run/last.pt"], "--data has 8 classes, the checkpoint 3"),
                             (["eval", "mask_rcnn_swin_t", "--multi-scale"], "is a detector"), (["eval", "swin_t", "--dump", "x"], "is a classifier")):
        assert main(arguments) == 2 and words in capsys.readouterr().err


def test_published_weights_are_run_as_published(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "published.pt")
    for model, size in (("mask_rcnn_swin_t", 800), ("upernet_swin_t", 512), ("swin_t", 224)):
        config, classes = options.settle({"model": model}, tmp_path / "published.pt", photographs=True)
        assert config.img_size == size and config.model_args == {} and config.patch_size is None and classes is None


@pytest.mark.parametrize("name", ["mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"])
def test_scenes_train_and_resume_bit_identically(tmp_path, name):
    config = {**SMALL, "model": name, "accumulate": 2}
    train(Config(**{**config, "out": str(tmp_path / "whole")}))
    stopped = Config(**{**config, "out": str(tmp_path / "parts")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.Run.train_epoch", lambda run, epoch: TRAIN_EPOCH(run, epoch) if epoch == 0 else (_ for _ in ()).throw(OSError))
        with contextlib.suppress(OSError):
            train(stopped)
    train(Config(**{**config, "out": str(tmp_path / "parts")}), resume=str(tmp_path / "parts"))
    first, second = (torch.load(tmp_path / part / "last.pt", weights_only=True)["model"] for part in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_processes_find_what_one_finds(photos, tmp_path):
    torch.manual_seed(0)
    torch.save(create_model("mask_rcnn_swin_t", attn="elsa", **TINY).state_dict(), tmp_path / "weights.pt")
    arguments = ["eval", "mask_rcnn_swin_t", "--attn", "elsa", "--weights", str(tmp_path / "weights.pt"), "--data", str(photos), "--img-size", "64",
               "--limit", "3", "--patch-size", "2", "--window-size", "2", "--device", "cpu", "--model-args", json.dumps(ARGUMENTS)]
    environment = {**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    outputs = []
    for number, command in enumerate(([sys.executable], launch)):
        dump = tmp_path / f"{number}.json"
        printed = subprocess.run([*command, "run.py", *arguments, "--dump", str(dump)], cwd=ROOT, env=environment, check=True, timeout=170,
                                 capture_output=True, text=True).stdout.splitlines()[2:]
        outputs.append(([line.split("  images/s")[0] for line in printed[:-1]], printed[-1].split("  ")[:4], json.loads(dump.read_text())))
    assert outputs[0] == outputs[1] and outputs[0][1][3] == "3 images" and len(outputs[0][2]) > 100
