"""train/layout.py: where photographs lie, which are for training, how many."""
import hashlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import imagenet
from photographs import ade_folder, coco_folder, image_folder
from train import classification
from train.layout import count_training, photographs_of, scarce, validation_part
from train.runs import refuse_inputs
from training import tiny

NAMES = st.sets(st.text("abc/é 0", min_size=1, max_size=8), max_size=40)


@pytest.fixture
def classes(tmp_path):
    """One folder of classes: thirteen photographs of each."""
    folder = image_folder(tmp_path, {"photos": 13}) / "photos"
    (folder / ".cache").mkdir()
    (folder / "cat" / "notes.txt").touch()
    return folder


@given(NAMES, st.text("abc", min_size=1, max_size=3))
def test_both_parts_have_some_and_one_that_comes_moves_none(names, new):
    part = validation_part([f"x/{name}" for name in names])
    assert part <= {f"x/{name}" for name in names} and len(part) < max(1, len(names))
    assert part or len(names) < 2
    low = {f"x/{name}" for name in names
           if hashlib.sha256(f"x/{name}".encode()).digest() < (2 ** 256 // 5).to_bytes(32)}
    more = validation_part([f"x/{name}" for name in {*names, new}])
    if low and len(low) < len(names):  # the rule alone decides
        assert part == low and more - {f"x/{new}"} == low - {f"x/{new}"}


def test_about_a_fifth_is_for_validation():
    assert 900 < len(validation_part([f"cat/{number}.jpg" for number in range(5000)])) < 1100
    assert all(validation_part([f"{name}/{number}.jpg" for number in range(20)]) for name in range(200))


def test_one_folder_of_classes_is_split(classes):
    training, validation, names = classification.datasets(tiny(data=str(classes), limit=None, val_limit=None))
    seen = [{path for path, _ in images.samples} for images in (training.images, validation)]
    assert names == validation.classes == ["cat", "dog"] and len(training) + len(validation) == 26
    assert not seen[0] & seen[1] and {*validation.targets} == {0, 1} and training.images.targets.count(0) < 13
    assert f"{len(training)} of the 26 photographs in {classes}, which a hash" in training.notes[-1]
    assert count_training(str(classes), "classification", 1000) == len(training) > count_training(
        str(classes), "classification", 3)
    evaluated, _ = imagenet.dataset(tiny(data=str(classes), val_limit=None), ["cat", "dog"])
    assert evaluated.samples == validation.samples
    elsewhere = classes.rename(classes.with_name("elsewhere"))
    moved = classification.image_folder(str(elsewhere), training=False)
    assert [path.removeprefix(str(elsewhere)) for path, _ in moved.samples] == [
        path.removeprefix(str(classes)) for path, _ in validation.samples]


def test_classes_of_few_photographs_are_named(classes):
    for number in range(3, 13):
        (classes / "dog" / f"{number}.jpg").unlink()
    notes = classification.datasets(tiny(data=str(classes), limit=None))[0].notes
    assert [note for note in notes if "too few" in note] == [
        "class dog has 2 photographs, too few to learn it well; expected 5 or more"]


def test_of_many_classes_of_few_the_first_are_named():
    lines = scarce({f"c{number}": number % 7 for number in range(40)})  # 0 to 4 are few, 5 and 6 are not
    assert len(lines) == 21 and lines[1].startswith("class c1 has 1 photograph, ")
    assert lines[-1] == "and 10 more classes have fewer than 5 photographs"
    assert scarce({"a": 4, "b": 5}) == ["class a has 4 photographs, too few to learn it well; expected 5 or more"]


def test_a_class_of_one_is_trained_on_and_all_of_one_are_refused(classes):
    for path in (classes / "dog").glob("*.jpg"):
        path.unlink()
    training, validation, _ = classification.datasets(tiny(data=str(classes), limit=None, val_limit=None))
    assert training.images.targets.count(1) == 1 and 1 not in validation.targets
    for path in (classes / "cat").glob("*.jpg"):
        path.unlink()
    with pytest.raises(ValueError, match="every class has one photograph"):
        classification.datasets(tiny(data=str(classes), limit=None))


@pytest.mark.parametrize("names", [("train", "val"), ("train", "test"), ("training", "validation")])
def test_layouts_of_classifiers(tmp_path, names):
    image_folder(tmp_path, {names[0]: 3, names[1]: 2})
    assert photographs_of(tmp_path, "classification", True) == (str(tmp_path / names[0]), False)
    assert photographs_of(tmp_path, "classification", False) == (str(tmp_path / names[1]), False)
    assert count_training(tmp_path, "classification", 100) == 6
    shutil.rmtree(tmp_path / names[0])
    assert photographs_of(tmp_path, "classification", False)[0] == str(tmp_path / names[1])
    with pytest.raises(FileNotFoundError, match="has no train/ or training/, and is no folder with a folder per class"):
        photographs_of(tmp_path, "classification", True)


def test_other_folders_are_no_classes(tmp_path):
    ade_folder(tmp_path / "ade")
    image_folder(tmp_path / "one", {"train": 2}, ["cat"])
    for folder in ("ade", "one/train"):
        with pytest.raises(FileNotFoundError, match="no folder with a folder per class, two or more; it holds"):
            photographs_of(tmp_path / folder, "classification", True)


def test_photographs_of_dense_tasks_are_counted(tmp_path):
    ade_folder(tmp_path / "ade")
    coco_folder(tmp_path / "coco")
    for task, name, part in (("segmentation", "ade", "images/validation"), ("detection", "coco", "val2017")):
        assert count_training(tmp_path / name, task, 100) == 5 and count_training(tmp_path / name, task, 2) == 2
        assert photographs_of(tmp_path / name, task, False) == (str(tmp_path / name / part), False)
        assert count_training(tmp_path / "absent", task, 100) == 0


def test_nothing_is_written_among_classes(classes, monkeypatch):
    with pytest.raises(ValueError, match="--out .*new would write over .*photos or into it"):
        refuse_inputs("--out", classes / "new", classes)
    refuse_inputs("--out", classes.parent / "new", classes)
