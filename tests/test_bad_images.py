"""train/bad_images.py: training goes on past what cannot be read, alike at every run, and counts it."""
import dataclasses
import json

import pytest
import torch

from photographs import ade_folder, coco_folder, image_folder
from test_interruption import assert_stopped_run_resumes
from train import classification, data
from train.bad_images import BadImages, Replacing, allowed
from training import detector, over_ranks, segmenter, tiny, train


@pytest.fixture
def photos(tmp_path):
    root = image_folder(tmp_path / "photos", {"train": 6, "val": 3})
    for name in ("cat/5.jpg", "dog/0.png"):  # indices 5 and 6: the next of the first is the second
        (root / "train" / name).write_bytes(b"junk")
    return root


def config_of(photos, **changes):
    return tiny(data=str(photos), limit=None, batch_size=4, seed=7, **changes)


def test_unreadable_images_become_the_next_one_for_any_workers_and_ranks(photos, tmp_path):
    config = config_of(photos, scale=(0.2, 1.0))
    images, _, _ = classification.datasets(config)
    training = Replacing(images, 10)
    (sample, label), reasons = training[3, 5]
    assert torch.equal(sample, images[3, 7][0]) and label == 1  # augmented as in its own place
    assert [name for reason in reasons for name in ("cat/5.jpg", "dog/0.png") if name in reason] == [
        "cat/5.jpg", "dog/0.png"]

    def epoch(name, rank, world, workers):
        loader = data.training_loader(training, dataclasses.replace(config, workers=workers), rank, world)
        loader.batch_sampler.epoch = 1
        (tmp_path / name).mkdir(exist_ok=True)
        loader = BadImages(loader, tmp_path / name, rank)
        return [images for images, _ in loader], loader

    alone, counted = epoch("alone", 0, 1, 0)
    assert len(alone) == len(counted) == 3 and all(torch.equal(a, b) for a, b in zip(alone, epoch("two", 0, 1, 2)[0]))
    halves = [torch.cat(pair) for pair in zip(epoch("both", 0, 2, 0)[0], epoch("both", 1, 2, 0)[0])]
    assert all(torch.equal(a, b) for a, b in zip(alone, halves))
    lines = (tmp_path / "alone" / "bad_images.txt").read_text().splitlines()
    assert sorted(lines) == sorted(reasons) == sorted(counted.reasons)
    assert (tmp_path / "two" / "bad_images.txt").read_text().splitlines() == lines
    assert "2 training images could not be read" in counted.report()[0] and len(counted.report()) == 3


def test_ranks_share_what_they_met_and_rank_0_writes(photos, tmp_path):
    config = config_of(photos, workers=0)
    images, _, _ = classification.datasets(config)

    def run(rank):
        loader = BadImages(data.training_loader(Replacing(images, 10), config, rank, 2), tmp_path, rank)
        for _ in loader:
            pass
        before = len(loader.reasons)
        loader.share()
        return before, sorted(loader.reasons)

    (first, all_0), (second, all_1) = over_ranks(2, run)
    assert first + second >= 2 and all_0 == all_1 and len(all_0) == 2
    assert sorted((tmp_path / "bad_images.txt").read_text().splitlines()) == all_0


def test_more_than_allowed_end_the_run(photos, tmp_path):
    images, _, _ = classification.datasets(config_of(photos))
    with pytest.raises(ValueError, match="2 training images could not be read; --bad-images allows 1.*dog/0.png"):
        Replacing(images, 1)[0, 5]
    with pytest.raises(ValueError, match="--bad-images allows 0"):
        Replacing(images, 0)[0, 6]
    for path in (photos / "train").glob("*/*"):
        path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="none of the 12 training images can be read"):
        Replacing(images, 20)[0, 5]
    loader = data.training_loader(Replacing([((torch.zeros(3), 0), [])] * 12, 3), config_of(photos, workers=0), 0, 1)
    count = BadImages(loader, tmp_path, 0)
    count.note(["a", "b", "a"])
    count.note(["c", "b"])
    with open(tmp_path / "bad_images.txt", "a") as file:
        file.write("half a li")
    count = BadImages(loader, tmp_path, 0)
    assert count.reasons == ["a", "b", "c"]  # of a resumed run
    assert (tmp_path / "bad_images.txt").read_text() == "a\nb\nc\n"
    with pytest.raises(ValueError, match="4 training images could not be read; --bad-images allows 3. The last: d"):
        count.note(["d"])


def test_names_that_are_no_utf_8_are_counted_once(tmp_path):
    class Photographs(list):
        def __getitem__(self, key):
            if key[1] == 0:
                raise OSError("\udcff.jpg\ncannot be read")
            return torch.zeros(3), 0

    for _ in range(2):  # a run, and it resumed
        loader = data.training_loader(Replacing(Photographs([0] * 8), 10), tiny(batch_size=8, workers=0), 0, 1)
        loader = BadImages(loader, tmp_path, 0)
        list(loader)
        assert loader.reasons == [r"\udcff.jpg cannot be read"]
    assert (tmp_path / "bad_images.txt").read_text() == "\\udcff.jpg cannot be read\n"


@pytest.mark.parametrize("given, images, expected", [(None, 100, 10), (None, 10_000, 10), (None, 1_281_167, 1281),
                                                     (0, 100, 0), (7, 10 ** 6, 7)])
def test_a_thousandth_is_allowed_and_at_least_ten(given, images, expected):
    assert allowed(given, images) == expected


def test_a_run_goes_on_past_damaged_photographs_and_says_so(photos, tmp_path, capsys):
    history = train(config_of(photos, epochs=1, workers=1, out=str(tmp_path / "run")))
    assert len(history) == 1 and len((tmp_path / "run" / "bad_images.txt").read_text().splitlines()) == 2
    assert "2 training images could not be read and were replaced" in capsys.readouterr().out
    (photos / "val" / "dog" / "1.jpg").write_bytes(b"junk")
    with pytest.raises(ValueError, match="val/dog/1.jpg cannot be read"):  # evaluation never skips
        train(config_of(photos, epochs=1, workers=0, out=str(tmp_path / "evaluated")))


def test_damaged_label_maps_are_replaced_too(tmp_path):
    photos = ade_folder(tmp_path / "ade")
    (photos / "annotations" / "training" / "3.png").write_bytes(b"junk")
    train(segmenter(data=str(photos), limit=None, epochs=1, batch_size=5, out=str(tmp_path / "run")))
    line, = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert "training/3.png cannot be read" in line
    with pytest.raises(ValueError, match="--bad-images allows 0.*training/3.png"):
        train(segmenter(data=str(photos), limit=None, epochs=1, batch_size=5, bad_images=0, out=str(tmp_path / "two")))


def damaged_classes(root):
    image_folder(root, {"train": 6, "val": 3})
    (root / "train" / "cat" / "5.jpg").write_bytes(b"junk")
    return tiny(batch_size=4, seed=7, drop_path_rate=0.2), ["cat/5.jpg"]


def damaged_label_maps(root):
    ade_folder(root, training=6)
    (root / "annotations" / "training" / "3.png").write_bytes(b"junk")
    (root / "images" / "training" / "1.jpg").write_bytes(b"")
    return segmenter(batch_size=2), ["training/3.png", "training/1.jpg"]


def damaged_objects(root):
    """Objects of another photograph than the one that is there, and one that is damaged."""
    coco_folder(root)
    (root / "train2017" / "1.png").write_bytes((root / "train2017" / "0.png").read_bytes())
    (root / "train2017" / "2.png").write_bytes(b"junk")
    return detector(batch_size=1), ["1.png", "2.png"]


def test_a_damaged_run_length_code_is_found_before_the_first_step(tmp_path):
    file = coco_folder(tmp_path / "coco") / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    objects = [annotation for annotation in content["annotations"] if "counts" in annotation["segmentation"]]
    objects[1]["segmentation"]["counts"] = objects[1]["segmentation"]["counts"][:-1]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file}: annotations, id {objects[1]['id']}: segmentation is"):
        train(detector(data=str(tmp_path / "coco"), limit=None, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damaged", [damaged_classes, damaged_label_maps, damaged_objects])
def test_a_run_that_met_them_resumes_bit_identical(tmp_path, damaged, capsys):
    config, names = damaged(tmp_path / "data")
    config = dataclasses.replace(config, data=str(tmp_path / "data"), limit=None, epochs=1, workers=0)
    assert_stopped_run_resumes(config, tmp_path)
    met = [(tmp_path / name / "bad_images.txt").read_text().splitlines() for name in ("whole", "cut")]
    assert met[0] == met[1] and len(met[0]) == len(names)
    assert all(any(name in line for line in met[0]) for name in names)
    assert capsys.readouterr().out.count(f"{len(names)} training images could not be read") == 2
