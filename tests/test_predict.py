"""eval/predict.py and eval/drawing.py: what is drawn and written is what the model found."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as rle
from PIL import Image

from eval import class_names, drawing, predict
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


def test_imagenet_classes_are_called_by_their_words(legends):
    chances = torch.tensor([0.1, 0.6, 0.3])
    classes = ["n02123045", "n02012849", "mine"]
    _, found = predict.classify(lambda x: chances.log()[None], Image.new("RGB", (40, 30)), classes, CONFIG, CPU)
    assert [(entry["class"], entry.get("name")) for entry in found["top5"]] == [
        ("n02012849", "crane, bird"), ("mine", None), ("n02123045", "tabby")]
    assert legends[0][0] == (None, "crane, bird  60.0%")
    assert predict.summary(found) == "crane, bird 60.0%, mine 30.0%, tabby 10.0%"
    assert len(set(class_names.words().values())) == 1000


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


def test_of_many_objects_the_best_are_drawn_and_the_rest_counted(monkeypatch):
    n = predict.AT_MOST + 3
    scores = torch.cat([torch.linspace(0.9, 0.4, n), torch.tensor([0.2, 0.1])])
    found = {"boxes": torch.tensor([[1.0, 1, 9, 9]]).repeat(n + 2, 1), "labels": torch.zeros(n + 2, dtype=torch.int64),
             "scores": scores, "masks": torch.zeros(n + 2, 20, 30, dtype=torch.bool)}
    drawn = []
    monkeypatch.setattr(predict, "draw_objects", lambda pixels, objects, masks: drawn.extend(objects))
    _, answer = predict.detect(lambda *_: [found], Image.new("RGB", (30, 20)), CLASSES, CONFIG, CPU)
    assert len(answer["objects"]) == n + 2 and drawn == answer["objects"][:predict.AT_MOST]
    assert predict.summary(answer) == "ant 90.0%, ant 88.4%, ant 86.9%, and 3 objects that are not drawn"


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


def test_letters_that_the_font_lacks_are_written_as_their_numbers():
    assert drawing.writable("Müll, Ёлка 50%") == "Müll, Ёлка 50%"
    assert drawing.writable("fu\u0308r") == "für"  # as file names of macOS have it
    assert drawing.writable("犬 a\nb\udce9\u202e") == "U+72AC aU+000AbU+DCE9U+202E"
    lines = [(None, "ü"), (None, "u"), (None, "犬")]
    drawn = [np.asarray(drawing.with_legend(Image.new("RGB", (256, 30)), [line]))[:, 256:] for line in lines]
    tops = [np.flatnonzero((picture < 128).any((1, 2)))[0] for picture in drawn]
    assert tops[0] < tops[1]  # the dots
    assert drawn[2].shape[1] > drawn[0].shape[1] + 40


@pytest.mark.parametrize("H, W", [(3, 600), (600, 3), (1, 1), (20000, 2)])
def test_photographs_of_any_shape_have_their_names_beside_them(H, W):
    ant = {"class": "an ant whose name is too long for the picture itself", "score": 1.0, "box": [0, 0, W, H]}
    drawn = drawing.draw_objects(np.zeros((H, W, 3), np.uint8), [ant], np.ones((1, H, W), bool))
    scale = drawing.enlargement(Image.new("RGB", (W, H)))
    assert drawn.width > W * scale + 200 and drawn.height == max(H * scale, 28) and drawn.width * drawn.height < 2e7
    assert (np.asarray(drawn)[4:24, W * scale + 30:] < 128).any()  # letters


def test_long_names_stand_beside_and_short_ones_inside():
    for name, inside in (("ant", True), ("an ant " * 9, False)):
        ant = {"class": name, "score": 1.0, "box": [250, 190, 299, 199]}
        black = np.zeros((200, 300, 3), np.uint8)
        drawn = np.asarray(drawing.draw_objects(black, [ant], np.zeros((1, 200, 300), bool)))
        assert (drawn.shape[1] == 300) == inside
        assert ((drawn[172:190, 240:300] == drawing.colour(0)).all(-1).mean() > 0.5) == inside
        if inside:  # all of it
            left = np.flatnonzero((drawn[174] == drawing.colour(0)).all(-1))[0]
            drawn = np.asarray(drawing.draw_objects(black, [{**ant, "box": [0, 0, 99, 50]}], [black[..., 0] > 0]))
            assert drawn[17, 60].tolist() == list(drawing.colour(0))
            assert abs(left - (300 - drawing.font().getlength("ant 100%") - 4)) < 2


# The command

@pytest.fixture
def command(tmp_path, monkeypatch):
    """`run.py predict` with a small classifier, in a folder with photographs of one stem, of the same name, and without
    a suffix."""
    monkeypatch.chdir(tmp_path)
    small = dict(embed_dim=4, depths=[1, 1], num_heads=[1, 2])
    torch.manual_seed(0)
    torch.save(create_model("swin_t", num_classes=7, img_size=32, patch_size=4, **small).state_dict(), "weights.pt")
    Path("c", "deep").mkdir(parents=True)
    Path("c", ".hidden").mkdir()
    for name, colour in (("a.png", "red"), ("b.jpg", "blue"), ("c/a.png", "green"), ("c/deep/a.bmp", "black"),
                         ("c/.hidden/d.png", "white"), ("c/.e.png", "white")):
        Image.new("RGB", (40, 60), colour).save(name)
    Path("c", "notes.txt").write_text("no photograph")
    Image.new("RGB", (40, 60)).save("plain", "png")
    options = ["--weights", "weights.pt", "--num-classes", "7", "--img-size", "32", "--patch-size", "4", "--model-args",
               json.dumps(small), "--device", "cpu"]
    return lambda *words: main(["predict", "--out", "new/seen", *options, *words])


def seen(folder="new/seen"):
    return sorted(path.name for path in Path(folder).iterdir())


def test_files_of_a_classifier(command, capsys):
    assert command("swin_t", "a.png", "b.jpg", "a.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("predict swin_t, attn default, weights.pt")
    assert lines[1] == "  2 photographs at 32 px on cpu, to new/seen/"
    assert len(lines) == 4 and lines[3].startswith("2/2  b.jpg -> new/seen/b.png, .json  ")
    assert seen() == ["a.json", "a.png", "b.json", "b.png"]
    content = json.loads(Path("new/seen/b.json").read_text())
    assert list(content) == ["image", "model", "top5"] and (content["image"], content["model"]) == ("b.jpg", "swin_t")
    assert {entry["class"] for entry in content["top5"]} <= set("0123456")


def test_folders_patterns_and_names_without_suffix_are_photographs(command):
    assert command("c", "plain", "*.jpg") == 0
    images = {json.loads(path.read_text())["image"] for path in Path("new/seen").glob("*.json")}
    assert images == {"c/a.png", "c/deep/a.bmp", "plain", "b.jpg"}
    assert seen()[:4] == ["a.bmp.json", "a.bmp.png", "a.png.json", "a.png.png"]


def test_results_of_one_name_do_not_replace_each_other(command):
    assert command("a.png", "c/a.png", "c/deep") == 0
    assert seen()[::2] == ["a.bmp.json", "a.png.json", "c-a.png.json"]
    assert command("a.png", "c/a.png", "c/deep") == 0 and len(seen()) == 6  # the same again
    assert command("b.jpg") == 0
    Image.new("RGB", (40, 60)).save("b.png")
    assert command("b.png") == 0  # of another image, in a later run
    assert "b.png.json" in seen() and json.loads(Path("new/seen/b.json").read_text())["image"] == "b.jpg"


def test_results_of_one_name_get_suffixes_or_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c", "d").mkdir(parents=True)
    Path("d").mkdir()
    names = lambda *images: [place.name for place in predict.results_of([Path(image) for image in images], Path("out"))]
    assert names("a.png", "b.png", "A.jpg") == ["a.png", "b", "A.jpg"]  # one file on some disks
    assert names("c/a.png", "../d/a.png", "/e/a.png") == ["c-a.png", "d-a.png", "e-a.png"]
    whole = "-".join(tmp_path.resolve().parts[1:])
    assert names("c/../d/a.png", "d/a.png", "c/d/a.png") == [f"{whole}-d-a.png", "d-a.png", f"{whole}-c-d-a.png"]
    Path("a.json").write_text('{"image": "x.png", "model": "of another program"}')
    assert predict.predicted(Path("a.json")) is None
    Path("out").mkdir()
    Path("out", "f.json").write_text('{"image": "gone/f.png", "model": "swin_t", "top5": []}')
    assert names("f.png") == ["f.png"]


def test_damaged_photographs_end_nothing_and_are_named(command, capsys):
    Path("c", "b.jpg").write_bytes(Path("b.jpg").read_bytes()[:300])
    assert command("c", "a.png") == 1
    printed = capsys.readouterr()
    assert "2/4  c/b.jpg: NOT READ" in printed.out and "1 of 4 photographs could not be read" in printed.err
    assert "c/b.jpg" in printed.err and len(seen()) == 6


@pytest.mark.parametrize("words, said", [
    (["nowhere.jpg", "a.png"], "no image at nowhere.jpg"), (["*.gif"], "no image at *.gif"),
    (["a.png", "swin_tt"], "no image at swin_tt\n"),
    (["swin_tt", "a.png"], "no image at swin_tt; did you mean the model swin_t?"), (["swin_t"], "predict needs images"),
    (["empty"], "no photographs in empty"), (["volo_d1", "a.png"], "does not fit")])
def test_what_is_no_photograph_is_said_before_anything_is_written(command, capsys, words, said):
    Path("empty").mkdir()
    assert command(*words) == 2 and said in capsys.readouterr().err and not Path("new").exists()


@pytest.mark.parametrize("out, said", [
    ("c", "holds photographs"), ("link", "holds photographs"), ("labels", "which predict did not write"),
    ("maps", "which predict did not write"), ("data/train", "would write over data/train or into it")])
def test_results_take_the_place_of_no_input(command, capsys, out, said):
    for folder in ("labels", "maps", "data/train", "data/val/x"):
        Path(folder).mkdir(parents=True)
    Path("link").symlink_to("c")
    Path("labels", "a.json").write_text('{"version": "5.0", "shapes": []}')
    Image.new("L", (40, 60)).save("maps/a.png")
    for i in range(7):
        Path("data/val", str(i)).mkdir()
        Image.new("L", (40, 60)).save(f"data/val/{i}/a.png")
    Path("data/val/x").rmdir()
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert command("c/a.png", "--data", "data", "--out", out) == 2  # the last --out counts
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
