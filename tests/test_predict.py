"""eval/predict.py and eval/drawing.py: what is drawn and written is what the model found."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as rle
from PIL import Image

from eval import drawing, predict
from models import create_model
from run import main

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(img_size=32, crop_pct=1.0, amp="none")
CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]


@pytest.fixture
def legends(monkeypatch):
    """The lines of every legend that is drawn."""
    lines = []
    monkeypatch.setattr(predict, "with_legend", lambda image, new: lines.append(new) or image)
    return lines


def test_five_likeliest_classes(legends):
    chances = torch.tensor([0.04, 0.3, 0.02, 0.4, 0.01, 0.15, 0.08])
    image = Image.new("RGB", (40, 30))
    drawn, found = predict.classify(lambda x: chances.log()[None], image, CLASSES, CONFIG, CPU)
    assert drawn is image and list(found) == ["top5"]
    assert [entry["class"] for entry in found["top5"]] == ["dog", "bee", "fox", "gnu", "ant"]
    assert [entry["probability"] for entry in found["top5"]] == pytest.approx([0.4, 0.3, 0.15, 0.08, 0.04], abs=1e-4)
    assert legends[0][:2] == [(None, "dog  40.0%"), (None, "bee  30.0%")] and len(legends[0]) == 5
    assert predict.summary(found) == "dog 40.0%, bee 30.0%, fox 15.0%"


def test_there_may_be_fewer_than_five_classes(legends):
    model = lambda x: torch.tensor([[0.0, 1.0]])
    _, found = predict.classify(model, Image.new("RGB", (40, 30)), ["a", "b"], CONFIG, CPU)
    assert [entry["class"] for entry in found["top5"]] == ["b", "a"]


def test_classes_of_pixels_with_their_shares(legends):
    """A segmenter that says cat, dog and elk for what is red, green and blue."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :8, 0] = pixels[:, 8:24, 2] = pixels[:, 24:, 1] = 200
    model = lambda x, coarse: 50 * torch.nn.functional.pad(x, (0, 0, 0, 0, 2, 2))
    drawn, found = predict.segment(model, Image.fromarray(pixels), CLASSES, CONFIG, CPU)
    assert found == {"classes": [{"class": "dog", "share": 0.625}, {"class": "elk", "share": 0.25},
                                 {"class": "cat", "share": 0.125}]}
    assert legends == [[(drawing.colour(3), "dog  62.5%"), (drawing.colour(4), "elk  25.0%"),
                        (drawing.colour(2), "cat  12.5%")]]
    for column, i in ((4, 2), (16, 4), (40, 3)):
        blend = 0.45 * pixels[16, column] + 0.55 * np.array(drawing.colour(i))
        assert np.asarray(drawn)[16, column] == pytest.approx(blend, abs=1)


def detections():
    """bee at 0.9 over dog at 0.6, which it overlaps, and elk, too faint to be drawn."""
    masks = torch.zeros(3, 200, 300, dtype=torch.bool)
    masks[0, 40:80, 30:90] = masks[1, 60:120, 60:150] = masks[2, 150:180, 200:260] = True
    boxes = torch.tensor([[30.0, 40, 90, 80], [60, 60, 150, 120], [200, 150, 260, 180.125]])
    return {"boxes": boxes, "scores": torch.tensor([0.9, 0.6, 0.3]), "labels": torch.tensor([1, 3, 4]), "masks": masks}


def test_objects_with_boxes_and_masks():
    pixels = np.full((200, 300, 3), 100, np.uint8)
    found = detections()
    seen = []
    model = lambda images, sizes, originals: seen.append((images.shape, sizes, originals)) or [found]
    drawn, answer = predict.detect(model, Image.fromarray(pixels), CLASSES, CONFIG, CPU)
    assert seen == [((1, 3, 32, 64), [(32, 48)], [(200, 300)])]  # img_size is the shorter side, padded to 32s
    objects = answer["objects"]
    assert [(entry["class"], entry["score"]) for entry in objects] == [("bee", 0.9), ("dog", 0.6), ("elk", 0.3)]
    assert [entry["box"] for entry in objects] == [[30, 40, 90, 80], [60, 60, 150, 120], [200, 150, 260, 180.12]]
    for entry, mask in zip(json.loads(json.dumps(objects)), found["masks"]):
        assert np.array_equal(rle.decode(entry["segmentation"]), mask)
    assert drawn.size == (300, 200)
    drawn, bee, dog = np.asarray(drawn), np.array(drawing.colour(0)), np.array(drawing.colour(1))
    assert drawn[50, 50] == pytest.approx(50 + 0.5 * bee, abs=1)
    assert drawn[100, 120] == pytest.approx(50 + 0.5 * dog, abs=1)
    assert drawn[70, 80] == pytest.approx(0.5 * (50 + 0.5 * dog) + 0.5 * bee, abs=1)  # bee is on top
    assert (drawn[165, 230] == 100).all() and (drawn[150, 200:260] == 100).all()
    assert (drawn[60, 30] == bee).all() and (drawn[110, 150] == dog).all() and (drawn[80, 85] == bee).all()  # edges
    assert (drawn[24, 31] == bee).all() and (drawn[8:20] == 100).all()  # the name stands on the box
    assert predict.summary(answer) == "bee 90.0%, dog 60.0%, elk 30.0%"


def test_nothing_found_is_nothing_drawn():
    pixels = np.full((20, 30, 3), 100, np.uint8)
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64),
               "masks": torch.zeros(0, 20, 30, dtype=torch.bool)}
    drawn, found = predict.detect(lambda *_: [nothing], Image.fromarray(pixels), CLASSES, CONFIG, CPU)
    assert found == {"objects": []} and (np.asarray(drawn) == 100).all() and predict.summary(found) == ""


def test_small_photographs_are_enlarged_with_their_boxes():
    mask = np.zeros((1, 20, 50), bool)
    mask[0, 10:, 20:30] = True
    ant = {"class": "ant", "score": 1.0, "box": [20, 10, 30, 20]}
    drawn = drawing.draw_objects(np.zeros((20, 50, 3), np.uint8), [ant], mask)
    assert drawn.size == (300, 120)
    assert np.asarray(drawn)[90, 120].tolist() == list(drawing.colour(0))  # six times as large
    assert np.asarray(drawn)[90, 150] == pytest.approx(0.5 * np.array(drawing.colour(0)), abs=1)


def test_legend_stands_beside_the_image():
    image = Image.new("RGB", (300, 30), "red")
    drawn = np.asarray(drawing.with_legend(image, [((0, 0, 255), "blue"), (None, "nothing"), ((0, 255, 0), "green")]))
    assert drawn.shape[0] == 68 and drawn.shape[1] > 336 and (drawn[:30, :300] == (255, 0, 0)).all()
    assert (drawn[30:, :300] == 255).all()
    assert drawn[12, 315].tolist() == [0, 0, 255] and drawn[52, 315].tolist() == [0, 255, 0]
    assert (drawn[:, 328:] < 128).any() and drawing.with_legend(Image.new("RGB", (32, 16)), [(None, "x")]).height == 128


def test_colours_differ():
    assert len({drawing.colour(i) for i in range(150)}) > 140
    near = [np.abs(np.subtract(drawing.colour(i), drawing.colour(i + 1))).sum() for i in range(150)]
    assert min(near) > 100


def test_files_of_a_classifier(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = dict(embed_dim=4, depths=[1, 1], num_heads=[1, 2])
    torch.manual_seed(0)
    torch.save(create_model("swin_t", num_classes=7, img_size=32, patch_size=4, **small).state_dict(), "weights.pt")
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (40, 60), colour).save(name)
    command = ["predict", "swin_t", "--weights", "weights.pt", "--num-classes", "7", "--img-size", "32",
               "--patch-size", "4", "--model-args", json.dumps(small), "--device", "cpu", "--out", "new/seen"]
    assert main([*command, "a.png", "b.jpg", "a.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("2/2  b.jpg -> new/seen/b.png, .json  ")
    assert {path.name for path in (tmp_path / "new" / "seen").iterdir()} == {"a.png", "a.json", "b.png", "b.json"}
    content = json.loads((tmp_path / "new" / "seen" / "b.json").read_text())
    assert list(content) == ["image", "model", "top5"] and (content["image"], content["model"]) == ("b.jpg", "swin_t")
    assert {entry["class"] for entry in content["top5"]} <= set("0123456")
