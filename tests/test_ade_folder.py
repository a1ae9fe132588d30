"""train/ade_folder.py: which label map belongs to a photograph, what its numbers mean, what its classes are called."""
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from eval import ade20k
from photographs import ade_folder, mutated
from train import segmentation
from train.ade_folder import AdeFolder, named_classes, read_label_map
from train.config import Config


@pytest.fixture
def photos(tmp_path):
    return ade_folder(tmp_path / "ade")


class Colours(torch.nn.Module):
    def forward(self, images, coarse=False):
        return images


def folder(photos, **options):
    config = Config(data=str(photos), img_size=32, **options)
    return AdeFolder(config, "training", segmentation.class_names(config))


def write_label_map(photos, labels, name="0.png"):
    """A label map, and a photograph of its size in place of 0.jpg."""
    Image.fromarray(labels).save(photos / "annotations" / "training" / name)
    Image.fromarray(np.zeros((*labels.shape, 3), np.uint8)).save(photos / "images" / "training" / "0.jpg")


def test_255_is_void_and_0_is_what_the_option_says(photos):
    write_label_map(photos, np.uint8([[0, 1, 2, 255]]))
    assert folder(photos)[0][1].tolist() == [[255, 0, 1, 255]]
    assert folder(photos, zero_label="class")[0][1].tolist() == [[0, 1, 2, 255]]
    write_label_map(photos, np.uint8([[0, 3]]))
    assert folder(photos)[0][1].tolist() == [[255, 2]]
    with pytest.raises(ValueError, match="0.png has label 3; expected --zero-label class, 0 to 2, or 255"):
        folder(photos, zero_label="class")[0]


@pytest.mark.parametrize("dtype, value", [(np.uint8, 254), (np.uint16, 300), (np.uint16, 256), (np.int32, -1)])
def test_numbers_that_are_no_labels_are_named(photos, dtype, value):
    path = photos / "annotations" / "training" / "0.png"
    Image.fromarray(np.array([[1, value]], dtype)).save(path, format="TIFF" if dtype == np.int32 else "PNG")
    with pytest.raises(ValueError, match=f"0.png has label {value}; expected 0, unlabelled, 1 to 3, or 255"):
        folder(photos)[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_label_maps_of_few_bits_keep_their_numbers(tmp_path, bits):
    labels = (np.arange(12, dtype=np.uint8) % min(2 ** bits, 5)).reshape(3, 4)
    path = tmp_path / "a.png"
    if bits == 1:
        Image.fromarray(labels.astype(bool)).save(path)
    else:
        image = Image.fromarray(labels)
        image.putpalette([0] * 768)
        image.save(path, bits=bits)
        content = bytearray(path.read_bytes())
        assert content[24] == bits and np.array_equal(read_label_map(path), labels)
        content = strip_palette(bytes(content))  # the same numbers as grey values
        path.write_bytes(content)
    assert np.array_equal(read_label_map(path), labels) and read_label_map(path).dtype == np.uint8


def strip_palette(content):
    """A palette PNG as one of grey values: without PLTE, and with colour type 0 in IHDR."""
    header = b"IHDR" + content[16:25] + b"\0" + content[26:29]
    start = content.index(b"PLTE") - 4
    end = start + 12 + int.from_bytes(content[start:start + 4], "big")
    rest = content[33:start] + content[end:]
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + rest


def test_label_maps_that_may_count_from_0_are_said(photos, tmp_path, monkeypatch):
    (photos / "classes.json").write_text('["ground", "dog"]')
    for path in (photos / "annotations").glob("*/*"):
        labels = np.asarray(Image.open(path)).copy()
        Image.fromarray(np.uint8(labels == 1)).save(path)
    training, validation, _ = segmentation.datasets(Config(data=str(photos), img_size=32))
    for dataset in (training, validation):
        assert any("last class, 2 (dog), is in none of" in note and "--zero-label class" in note
                   for note in dataset.notes)
    assert not folder(photos, zero_label="class").notes
    monkeypatch.setattr("train.ade_folder.LOOKED_AT", 2)
    assert folder(photos).notes  # of those that are looked at, all others occur
    (photos / "classes.json").write_text('["ground", "dog", "cat"]')
    assert not folder(photos).notes
    monkeypatch.undo()
    assert folder(photos).notes
    write_label_map(photos, np.uint8([[0, 3]]))
    assert not folder(photos).notes
    ordinary = ade_folder(tmp_path / "ordinary")
    assert not folder(ordinary).notes  # few are unlabelled
    for path in (ordinary / "annotations" / "training").glob("*"):
        labels = np.asarray(Image.open(path)).copy()
        labels[:] = 1
        labels[:, :labels.shape[1] // 16 + 1] = 0
        Image.fromarray(labels).save(path)
    zeros = [np.mean(labels == 0) for _, labels, _ in folder(ordinary, zero_label="class")]
    assert 0.05 < np.mean(zeros) < 0.1 and folder(ordinary).notes


def test_files_are_found_at_any_depth_of_any_kind_and_hidden_ones_are_not(photos):
    images, annotations = photos / "images" / "training", photos / "annotations" / "training"
    names = ["0.tif", "1.bmp", "2.webp", "3.JFIF", "aachen/4.jpg", "aachen/a.b.png"]
    (images / "aachen").mkdir()
    (annotations / "aachen").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    for path in images.glob("*.jpg"):
        path.unlink()
    for name in names:
        Image.fromarray(pixels).save(images / name, format="JPEG" if "JFIF" in name else None)
    for name in ("4", "a.b"):
        Image.fromarray(np.ones((40, 50), np.uint8)).save(annotations / "aachen" / f"{name}.png")
    for name in ("0", "1", "2", "3"):
        Image.fromarray(np.ones((40, 50), np.uint8)).save(annotations / f"{name}.PNG")
        (annotations / f"{name}.png").unlink()
    for hidden in (".trash/5.jpg", "aachen/.ipynb_checkpoints/6.jpg", "._0.jpg"):
        (images / hidden).parent.mkdir(exist_ok=True)
        (images / hidden).write_bytes(b"junk")
        (annotations / hidden).parent.mkdir(exist_ok=True)
        (annotations / hidden).with_suffix(".png").write_bytes(b"junk")
    (photos / "elsewhere" / "images").mkdir(parents=True)
    (photos / "elsewhere" / "annotations").mkdir()
    Image.fromarray(pixels).save(photos / "elsewhere" / "images" / "5.jpg")
    Image.fromarray(np.ones((40, 50), np.uint8)).save(photos / "elsewhere" / "annotations" / "5.png")
    for path in (images, annotations):
        (path / "aachen-b").symlink_to(photos / "elsewhere" / path.parent.name)
    found = folder(photos)
    assert [name for _, _, name in found] == ["0", "1", "2", "3", "aachen/4", "aachen/a.b", "aachen-b/5"]
    assert len(found.notes) == 1 and "1 label maps without a photograph" in found.notes[0] and "4.png" in found.notes[0]
    (images / "readme.txt").touch()
    (images / "7.heic").touch()
    assert "left out: 2 files that Pillow does not read (.heic, .txt)" in folder(photos).notes


def test_dumps_of_folders_keep_them(photos, tmp_path):
    for name, ending in (("images", "jpg"), ("annotations", "png")):
        (photos / name / "validation" / "aachen").mkdir()
        (photos / name / "validation" / f"0.{ending}").rename(photos / name / "validation" / "aachen" / f"0.{ending}")
    dataset, _ = ade20k.dataset(Config(data=str(photos), img_size=32), None)
    ade20k.evaluate(Colours(), ade20k.loader(dataset, 1, 0, 1, 0), "cpu", dump=tmp_path / "out")
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")} == {
        "aachen/0.png", "1.png", "2.png"}


@pytest.mark.parametrize("first, second", [("images/training/0.jpg", "images/training/0.png"),
                                           ("annotations/training/0.png", "annotations/training/0.PNG")])
def test_two_files_of_one_name_are_refused(photos, first, second):
    (photos / second).write_bytes((photos / first).read_bytes())
    with pytest.raises(ValueError, match="share one name") as error:
        folder(photos)
    assert str(photos / first) in str(error.value) and str(photos / second) in str(error.value)


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_photographs_that_may_be_turned_follow_the_option(photos, exif):
    (photos / "annotations" / "training" / "0.png").touch()
    write_label_map(photos, np.uint8([[1, 2]]))
    path = photos / "images" / "training" / "0.jpg"
    path.unlink()
    orientation = Image.Exif()
    orientation[274] = 3
    stored = np.uint8([[[255] * 3, [0] * 3]])
    Image.fromarray(stored).save(path.with_suffix(".png"), exif=orientation)
    found = folder(photos, exif=exif)
    assert np.array_equal(found[0][0], stored[:, ::-1] if exif == "apply" else stored)
    assert len(found.notes) == 1 and "1 of the 5 photographs" in found.notes[0]


# Names of the classes

@pytest.mark.parametrize("file, text", [("classes.txt", "Löwe\nBär\n"), ("classes.json", '["Löwe", "Bär"]'),
                                        ("objectInfo150.txt", "Idx\tName\n1\tLöwe\n2\tBär\n")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_names_are_utf_8_with_or_without_a_mark(tmp_path, file, text, encoding):
    (tmp_path / file).write_text(text, encoding=encoding)
    assert named_classes(tmp_path) == ["Löwe", "Bär"]


@pytest.mark.parametrize("file, content, words", [
    ("classes.txt", b"dog\ncat\ndog\n", "more than once: .'dog'"), ("classes.json", b'["a", "b", "a"]', "more than"),
    ("classes.txt", "Löwe".encode("latin-1"), "expected one name a line, in UTF-8"),
    ("classes.json", b'["a",', "expected a list of names, JSON"), ("classes.json", b"[" * 100_000, "cannot be read"),
    ("classes.txt", "\n".join(map(str, range(255))).encode(), "255 classes; expected 1 to 254"),
    ("classes.json", b'["a", 3]', "expected a list of names"), ("classes.json", b'"dog"', "expected a list of names")])
def test_files_of_names_that_name_no_classes_are_refused(tmp_path, file, content, words):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        named_classes(tmp_path)
    assert str(tmp_path / file) in str(error.value)


def test_names_of_checkpoint_and_data_are_compared(photos):
    config, names = Config(data=str(photos), img_size=32), ["red", "green", "blue"]
    for classes in (None, names, ["1", "2", "3"]):
        assert ade20k.dataset(config, classes)[1] == names
    for classes in (["green", "red", "blue"], ["red", "green", "azure"], ["red", "green"], ["1", "2"]):
        with pytest.raises(ValueError, match="3 classes, the checkpoint has .*that differ"):
            ade20k.dataset(config, classes)
    (photos / "classes.json").unlink()
    assert ade20k.dataset(config, names)[1] == names
    with pytest.raises(ValueError, match="rendered scenes: 9 classes, the checkpoint has 3"):
        ade20k.dataset(Config(img_size=32), names)
    assert ade20k.dataset(Config(img_size=32), segmentation.Scenes.classes)[1] == segmentation.Scenes.classes


# Damage

@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_label_maps_give_labels_or_an_error_that_names_the_file(photos, count):
    rng, results = np.random.default_rng(count), [0, 0]
    path = photos / "annotations" / "training" / "0.png"
    whole, dataset = path.read_bytes(), folder(photos)
    for _ in range(count):
        path.write_bytes(mutated(whole, rng))
        with warnings.catch_warnings(action="ignore"):
            try:
                pixels, labels, _ = dataset[0]
                results[0] += labels.shape == pixels.shape[:2] and set(np.unique(labels)) <= {0, 1, 2, 255}
            except (ValueError, OSError) as error:
                results[1] += str(path) in str(error)
    assert sum(results) == count and min(results) > count / 50
