"""eval/coco.py: the twelve numbers against pycocotools, the commands, two processes."""
import contextlib
import io
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as oracle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from eval import coco, options
from photographs import COCO_IDS, coco_folder
from run import main
from train import detection
from train.config import Config
from training import command_line, detector, over_ranks, train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return coco_folder(tmp_path_factory.mktemp("data") / "coco")


# The metric

def code_of(x, y, w, h, H, W):
    """A rectangle, as far as it is in the image, as a run-length code."""
    mask = np.zeros((H, W), np.uint8)
    mask[max(0, round(y)):max(0, round(y + h)), max(0, round(x)):max(0, round(x + w))] = 1
    return oracle.encode(np.asfortranarray(mask))


def detected(annotation, rng, H, W, classes):
    """A detection of an annotated box, moved a little, sometimes of another class."""
    x, y, w, h = np.array(annotation["bbox"]) + rng.normal(0, 3, 4)
    label = annotation["category_id"] if rng.random() < 0.8 else int(rng.integers(classes))
    score = round(float(rng.random()), 2)  # rounded: some are equal
    return {"image_id": annotation["image_id"], "category_id": label, "score": score,
            "bbox": [float(v) for v in (x, y, max(1, w), max(1, h))], "segmentation": code_of(x, y, w, h, H, W)}


def annotated(image_id, rng, H, W, classes):
    """A rectangle of any of the three sizes, now and then a crowd."""
    w, h = (float(side) for side in rng.uniform(3, 110, 2))
    x, y = float(rng.uniform(0, W - w)), float(rng.uniform(0, H - min(h, H)))
    crowd = int(rng.random() < 0.1)
    code = code_of(x, y, w, h, H, W)
    return {"image_id": image_id, "category_id": int(rng.integers(classes)), "bbox": [x, y, w, h], "iscrowd": crowd,
            "area": float(oracle.area(code)), "segmentation": code}


def synthetic(rng, images, objects, classes, H=120, W=160):
    """[(image id, size, annotations, results)]: detections near what is there, several of some, none of others."""
    photographs = []
    for image_id in range(images):
        annotations = [annotated(image_id, rng, H, W, classes) for _ in range(rng.integers(0, objects + 1))]
        found = [detected(annotation, rng, H, W, classes)
                 for annotation in annotations for _ in range(rng.integers(0, 3))]
        photographs.append((image_id, (H, W), annotations, found))
    return photographs


def of_pycocotools(photographs, classes):
    """Its twelve numbers, in per cent: of boxes, of masks."""
    truth, numbers = COCO(), []
    annotations = [entry for _, _, entries, _ in photographs for entry in entries]
    truth.dataset = {"images": [{"id": i, "height": h, "width": w} for i, (h, w), _, _ in photographs],
                     "categories": [{"id": i, "name": str(i)} for i in range(classes)],
                     "annotations": [{**entry, "id": i + 1} for i, entry in enumerate(annotations)]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        for kind, other in (("bbox", "segmentation"), ("segm", "bbox")):
            entries = [{key: value for key, value in entry.items() if key != other}
                       for *_, found in photographs for entry in found]
            evaluation = COCOeval(truth, truth.loadRes(entries), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            numbers.append([100 * value if value >= 0 else float("nan") for value in evaluation.stats])
    return numbers


@settings(deadline=None, max_examples=15)
@example(seed=46847, images=1, objects=1, classes=1)  # a crowd alone
@given(seed=st.integers(0, 1 << 16), images=st.integers(1, 6), objects=st.integers(1, 9), classes=st.integers(1, 4))
def test_the_twelve_numbers_are_pycocotools(seed, images, objects, classes):
    photographs = synthetic(np.random.default_rng(seed), images, objects, classes)
    if not any(found for *_, found in photographs):
        return  # pycocotools cannot
    result = coco.scores(photographs, classes)
    for ours, expected in zip((result["box"], result["mask"]), of_pycocotools(photographs, classes)):
        assert list(ours.values()) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    for name, of_classes in zip(("box_ap", "mask_ap"), zip(*result["classes"])):
        known = [value for value in of_classes if not np.isnan(value)] or [np.nan]
        assert result[name] == pytest.approx(np.mean(known), nan_ok=True)
    history = [result[metric] for metric in coco.METRICS]
    expected = [result["box"]["AP"], result["box"]["AP50"], result["mask"]["AP"]]
    assert history == pytest.approx(expected, nan_ok=True)


def test_nothing_detected_is_an_ap_of_zero():
    photographs = synthetic(np.random.default_rng(0), 3, 5, 2)
    result = coco.scores([(i, size, annotations, []) for i, size, annotations, _ in photographs], 2)
    assert result["box_ap"] == result["mask_ap"] == 0 and set(result["box"]) == set(coco.SUMMARY)


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
        masks = np.array([oracle.decode(entry["segmentation"]) for entry in annotations], bool)
        return [{"boxes": boxes, "scores": torch.ones(len(boxes)),
                 "labels": torch.tensor([entry["category_id"] for entry in annotations]),
                 "masks": torch.from_numpy(masks.reshape(-1, *original_sizes[0]))}]


def test_what_is_there_scores_100(photos):
    validation, _ = detection.validation_set(Config(data=str(photos), img_size=64))
    of_image = validation.folder.annotations
    validation.folder.annotations = lambda i: [entry for entry in of_image(i) if entry["area"] > 10]
    result = coco.evaluate(Oracle(validation), coco.loader(validation, 1, 0, 1, 0), torch.device("cpu"))
    assert result["box_ap"] == pytest.approx(100) and result["mask_ap"] == pytest.approx(100)
    assert result["images"] == 4
    assert result["classes"][:2] == [(pytest.approx(100), pytest.approx(100))] * 2
    assert np.isnan(result["classes"][2][0])


def test_pycocotools_finds_100_in_the_dump_of_what_is_there(photos, tmp_path):
    validation, _ = detection.validation_set(Config(data=str(photos), img_size=64, val_limit=None))
    loader, dump = coco.loader(validation, 1, 0, 1, 0), tmp_path / "out" / "found.json"
    coco.evaluate(Oracle(validation), loader, torch.device("cpu"), dump=dump)
    truth = COCO(str(photos / "annotations" / "instances_val2017.json"))
    with contextlib.redirect_stdout(io.StringIO()):
        for kind in ("bbox", "segm"):
            evaluation = COCOeval(truth, truth.loadRes(str(dump)), kind)
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[50, 1e10]], ["all"]  # not the slivers
            evaluation.evaluate()
            evaluation.accumulate()
            precision = evaluation.eval["precision"]
            assert precision[precision > -1].mean() == pytest.approx(1)
            assert (precision > -1).any((0, 1, 3, 4)).sum() == 2  # of the classes


def test_ids_are_dumped_as_they_were(tmp_path):
    folder, dump = coco_folder(tmp_path / "coco"), tmp_path / "found.json"
    file = folder / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    names = {100: "007", 99: "7", 98: -3, 97: 2.5}
    for entry in content["images"]:
        entry["id"] = names[entry["id"]]
    for entry in content["annotations"]:
        entry["image_id"] = names[entry["image_id"]]
    file.write_text(json.dumps(content))
    validation, _ = detection.validation_set(Config(data=str(folder), img_size=64))
    coco.evaluate(Oracle(validation), coco.loader(validation, 1, 0, 1, 0), torch.device("cpu"), dump=dump)
    expected = [(entry["image_id"], entry["category_id"], entry["bbox"]) for entry in content["annotations"]
                if not entry["iscrowd"]]
    found = [(entry["image_id"], entry["category_id"], pytest.approx(entry["bbox"], abs=1e-3))
             for entry in json.loads(dump.read_text())]
    assert sorted(expected, key=str) == sorted(found, key=lambda entry: str((*entry[:2], entry[2].expected)))
    # What a model has beyond the classes of the data has no id.
    entries = [{"image_id": 0, "category_id": label, "segmentation": {"counts": b""}} for label in (2, 3, 4)]
    coco.write_results(entries, validation, dump)
    assert [entry["category_id"] for entry in json.loads(dump.read_text())] == [90]


def without_masks(photographs, of):
    """The same, where annotations and detections of a class, or of one object in two, lose their masks."""
    for number, (_, _, annotations, found) in enumerate(photographs):
        for i, entry in enumerate(annotations):
            if of(entry, i):
                entry["segmentation"] = None
    return photographs


def test_objects_without_a_mask_are_out_of_mask_ap():
    """Neither those nor what is found of them count; boxes do."""
    def perfect(of):
        photographs = [(i, size, [{**entry, "iscrowd": 0, "category_id": i % 2} for entry in annotations], [])
                       for i, size, annotations, _ in synthetic(np.random.default_rng(3), 8, 5, 2)]
        for _, _, annotations, found in photographs:
            found += [{**{key: entry[key] for key in ("image_id", "category_id", "bbox", "segmentation")}, "score": 0.9}
                      for entry in annotations]
        return coco.scores(without_masks(photographs, of), 2)

    for of in (lambda entry, i: entry["category_id"] == 1, lambda entry, i: i % 2 == 0):
        result = perfect(of)
        assert result["mask_ap"] == pytest.approx(100) and result["box_ap"] == pytest.approx(100)
    assert np.isnan(perfect(lambda entry, i: entry["category_id"] == 1)["classes"][1][1])
    result = perfect(lambda entry, i: True)
    assert np.isnan(result["mask_ap"]) and result["box_ap"] == pytest.approx(100)


def test_a_test_set_without_annotations_is_dumped_but_not_scored(tmp_path, capsys):
    folder, dump = coco_folder(tmp_path / "coco"), tmp_path / "found.json"
    file = folder / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    file.unlink()
    (folder / "val2017").rename(folder / "test2017")
    del content["annotations"]
    (folder / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content))
    config = detector(data=str(folder), img_size=64, num_classes=3)
    torch.manual_seed(0)
    torch.save(options.load_model(config, None).state_dict(), tmp_path / "weights.pt")
    arguments = ["eval", config.model, "--weights", str(tmp_path / "weights.pt"),
                 *command_line(config, "attn", "data", "img_size", "patch_size", "window_size", "device", "model_args")]
    assert main([*arguments, "--dump", str(dump)]) == 0
    assert "no scores: the data has no annotations  4 images" in capsys.readouterr().out
    found = json.loads(dump.read_text())
    assert {entry["image_id"] for entry in found} == {97, 98, 99, 100}
    assert {entry["category_id"] for entry in found} <= set(COCO_IDS)
    assert main(arguments) == 2 and "nothing can be scored; --dump FILE" in capsys.readouterr().err


def test_classes_of_the_checkpoint_have_to_be_those_of_the_data_in_their_order(photos):
    config = Config(data=str(photos), img_size=64)
    for names in (None, ["green", "red", "blue"]):
        assert coco.dataset(config, names)[1] == ["green", "red", "blue"]
    with pytest.raises(ValueError, match=r"The first that differ: \[\('red', 'green'\), \('green', 'red'\)\]"):
        coco.dataset(config, ["red", "green", "blue"])


# The commands

@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """(a run's last.pt, its history)"""
    out = tmp_path_factory.mktemp("trained") / "run"
    history = train(detector(data=str(photos), img_size=64, limit=None, val_limit=None, lr=3e-3, epochs=3,
                             out=str(out)))
    return str(out / "last.pt"), history


def test_eval_repeats_the_scores_of_training_and_pycocotools_those_of_the_dump(photos, trained, tmp_path, capsys):
    weights, history = trained
    assert {"box_ap", "box_ap50", "mask_ap"} <= history[-1].keys()
    dump = str(tmp_path / "out" / "found.json")
    assert main(["eval", "--weights", weights, "--data", str(photos), "--dump", dump]) == 0
    printed = capsys.readouterr().out
    assert f"box AP {history[-1]['box_ap']:.2f}" in printed and "AP medium" in printed and "green" in printed
    with open(dump) as file:
        found = json.load(file)
    truth = COCO(str(photos / "annotations" / "instances_val2017.json"))
    assert found and {entry["category_id"] for entry in found} <= set(COCO_IDS)
    evaluation = COCOeval(truth, truth.loadRes(dump), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert f"box AP {100 * evaluation.stats[0]:.2f}" in printed


def test_eval_of_a_part(photos, trained, capsys):
    arguments = ["eval", "mask_rcnn_swin_t", "--weights", trained[0], "--data", str(photos), "--limit", "2"]
    assert main(arguments) == 0
    assert "2 images" in capsys.readouterr().out


def test_predict_lists_objects_by_their_scores(photos, trained, tmp_path):
    photograph = photos / "val2017" / "0.png"
    assert main(["predict", "--weights", trained[0], str(photograph), "--out", str(tmp_path / "seen")]) == 0
    objects = json.loads((tmp_path / "seen" / "0.json").read_text())["objects"]
    assert objects == sorted(objects, key=lambda entry: -entry["score"])
    assert {entry["class"] for entry in objects} <= {"red", "green", "blue"}
    with Image.open(photograph) as image, Image.open(tmp_path / "seen" / "0.png") as drawn:
        assert oracle.decode(objects[0]["segmentation"]).shape == image.size[::-1] and drawn.width >= 256


def test_mistakes_in_the_commands_are_said(trained, capsys):
    with pytest.raises(ValueError, match="rendered scenes: 8 classes, the checkpoint has 3"):
        coco.dataset(detector(), ["red", "green", "blue"])
    for arguments, words in ((["eval", "--weights", trained[0], "--dump", str(Path(trained[0]).parent)], "is a folder"),
                             (["eval", "mask_rcnn_swin_t", "--multi-scale"], "is a detector"),
                             (["eval", "swin_t", "--dump", "x"], "is a classifier")):
        assert main(arguments) == 2 and words in capsys.readouterr().err


def test_published_weights_are_run_as_published(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "published.pt")
    for model, size in (("mask_rcnn_swin_t", 800), ("upernet_swin_t", 512), ("swin_t", 224)):
        config, classes = options.settle({"model": model}, tmp_path / "published.pt", photographs=True)
        assert config.img_size == size and config.model_args == {}
        assert config.patch_size is None and classes is None


def test_two_ranks_find_what_one_finds(photos, tmp_path):
    torch.manual_seed(0)
    config = detector(data=str(photos), img_size=64, num_classes=3, val_limit=3)
    model, (validation, classes) = options.load_model(config, None), coco.dataset(config, None)

    def evaluate(rank, world=2):
        loader = coco.loader(validation, 1, rank, world, 0)
        dump = tmp_path / f"{rank} of {world}.json"
        return coco.evaluate(deepcopy(model), loader, torch.device("cpu"), dump=dump)

    one = evaluate(0, 1)
    for two in over_ranks(2, evaluate):
        assert coco.table({**two, "seconds": 1}, classes) == coco.table({**one, "seconds": 1}, classes)
        assert two["images"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0 of 1.json", "0 of 2.json"]
    found = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert found[0] == found[1] and len(found[0]) > 100
