"""train/hub_data.py and train/shards.py: photographs in records, as if they lay in folders."""
import dataclasses
import io
import sys
import tarfile

import pytest
import torch

from photographs import image_folder
from test_interruption import assert_stopped_run_resumes
from train import classification, data
from train.config import resolve
from train.runs import name_of_data
from train.shards import expand, paths_of
from training import tiny


@pytest.fixture
def photos(tmp_path):
    return image_folder(tmp_path / "photos", {"train": 6, "val": 3})


def contents(root, split):
    """[(name, bytes, label), ...] of a folder of photographs, in its order."""
    paths = sorted((root / split).glob("*/*"))
    return [(path.name, path.read_bytes(), ["cat", "dog"].index(path.parent.name)) for path in paths]


def write_shards(folder, rows, split, count=2):
    """Consecutive rows, as many to a tar file as to the next."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        with tarfile.open(folder / f"x-{split}-{number:02}.tar", "w") as tar:
            for i, (name, content, label) in list(enumerate(rows))[number * len(rows) // count:][:len(rows) // count]:
                kind = name.rpartition(".")[2].upper()
                for member, text in ((f"a.b/{i:03}.{kind}", content), (f"a.b/{i:03}.cls", f"{label}\n".encode()),
                                     (f"a.b/{i:03}.meta.json", b"{}")):
                    info = tarfile.TarInfo(member)
                    info.size = len(text)
                    tar.addfile(info, io.BytesIO(text))


def shards(root):
    folder = root.with_name("shards")
    write_shards(folder, contents(root, "train"), "train")
    write_shards(folder, contents(root, "val"), "val", 1)
    (folder / "classes.txt").write_text("cat\ndog\n")
    return f"wds:{folder}/x-train-{{00..01}}.tar"


def hub_rows(rows):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["cat", "dog"]))
    return datasets.Dataset.from_dict({"picture": [{"bytes": content, "path": name} for name, content, _ in rows],
                                       "kind": [label for *_, label in rows]}, features=features)


def saved(root):
    datasets = pytest.importorskip("datasets")
    folder = root.with_name("saved")
    datasets.DatasetDict(train=hub_rows(contents(root, "train")), test=hub_rows(contents(root, "val"))).save_to_disk(
        folder)
    return f"hf:{folder}"


def parquet(root):
    folder = root.with_name("parquet")
    folder.mkdir()
    hub_rows(contents(root, "train")).to_parquet(folder / "train-00000.parquet")
    hub_rows(contents(root, "val")).to_parquet(folder / "validation-00000.parquet")
    return f"hf:{folder}"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def config_of(place, **changes):
    return tiny(data=str(place), limit=None, val_limit=None, batch_size=4, seed=7, workers=0, **changes)


@pytest.mark.parametrize("kind", [shards, saved, parquet])
def test_records_are_what_the_folder_is(photos, kind):
    place, folder = kind(photos), classification.datasets(config_of(photos))
    training, validation, classes = classification.datasets(config_of(place))
    assert classes == folder[2] == ["cat", "dog"] and (len(training), len(validation)) == (12, 6)
    assert training.notes == [] and training.images.targets == folder[0].images.targets
    for ours, theirs, keys in ((training, folder[0], [(1, i) for i in range(12)]), (validation, folder[1], range(6))):
        assert all(torch.equal(ours[key][0], theirs[key][0]) and ours[key][1] == theirs[key][1] for key in keys)
    limited = classification.datasets(dataclasses.replace(config_of(place), limit=5))[0]
    assert sorted(limited[0, i][1] for i in range(5)) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("kind", [shards, saved])
def test_their_order_depends_on_no_workers_and_ranks(photos, kind):
    config = config_of(kind(photos))
    training, validation, _ = classification.datasets(config)

    def epoch(rank, world, workers):
        loader = data.training_loader(training, dataclasses.replace(config, workers=workers), rank, world)
        return [images for images, _ in loader]

    alone = epoch(0, 1, 0)
    assert len(alone) == 3 and all(torch.equal(a, b) for a, b in zip(alone, epoch(0, 1, 2)))
    assert all(torch.equal(a, torch.cat(pair)) for a, pair in zip(alone, zip(epoch(0, 2, 0), epoch(1, 2, 0))))
    evaluated = data.validation_loader(validation, 2, 1, 2, 1)
    for _ in range(2):  # its workers stay
        assert torch.cat([labels for _, labels in evaluated]).tolist() == [validation[i][1] for i in (1, 3, 5)]


@pytest.mark.parametrize("kind, name", [(shards, "x-train-01.tar, a.b/010.JPG"), (saved, "image 10 (4.jpg)")])
def test_a_damaged_record_is_replaced_and_named_and_the_run_resumes(photos, kind, name, tmp_path):
    (photos / "train" / "dog" / "4.jpg").write_bytes(b"junk")
    config = config_of(kind(photos), epochs=1)
    assert_stopped_run_resumes(config, tmp_path)
    line, = (tmp_path / "cut" / "bad_images.txt").read_text().splitlines()
    assert name in line and "cannot be read as an image" in line


def test_what_is_wrong_with_shards_is_said(photos, tmp_path):
    place = shards(photos)
    folder = photos.with_name("shards")
    (folder / "classes.txt").unlink()
    assert classification.datasets(config_of(place))[2] == ["0", "1"]
    (folder / "classes.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="x-train-01.tar, a.b/006.PNG has the label 1; expected 0 to 0"):
        classification.datasets(config_of(place))
    (folder / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(ValueError, match="classes.txt: expected the name of a class on every line"):
        classification.datasets(config_of(place))
    (folder / "classes.txt").unlink()
    with tarfile.open(folder / "x-train-02.tar", "w") as tar:
        for name, text in (("1.png", b""), ("2.cls", b"0"), ("3.jpg", b"x"), ("3.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    training = classification.datasets(config_of(f"wds:{folder}/x-train-*.tar"))[0]
    assert len(training) == 13
    assert training.notes == ["left out: 2 samples without a photograph or without a .cls"]
    for text, said in (((b"cat", "3.cls holds b'cat'; expected the number"), (None, "is no tar file"))):
        with tarfile.open(folder / "x-train-02.tar", "w") as tar:
            info = tarfile.TarInfo("3.cls")
            info.size = 3
            tar.addfile(info, io.BytesIO(text or b"abc"))
        if text is None:
            content = (folder / "x-train-02.tar").read_bytes()
            (folder / "x-train-02.tar").write_bytes(b"\x1f\x8b" + content[2:])
        with pytest.raises(ValueError, match=said):
            classification.datasets(config_of(f"wds:{folder}/x-train-*.tar"))
    training, _, _ = classification.datasets(config_of(place))
    content = (folder / "x-train-01.tar").read_bytes()
    (folder / "x-train-01.tar").write_bytes(content[:len(content) // 4])
    with pytest.raises(ValueError, match="x-train-01.tar ends in the middle of a photograph"):
        training[0, 11]


def test_patterns_of_shards(tmp_path):
    names = ["a-train-00.tar", "a-train-01.tar", "a-validation-000.tar", "b.tar", "c.tar"]
    for name in names:
        (tmp_path / name).touch()
    found = lambda paths: [path.name for path in paths]
    assert found(expand(f"{tmp_path}/a-train-{{00..01}}.tar")) == found(expand(f"{tmp_path}/a-train-*")) == names[:2]
    assert found(expand(f"{tmp_path}/{{b,c}}.tar")) == names[3:]
    assert list(map(found, paths_of(f"{tmp_path}/a-train-{{00..01}}.tar"))) == [names[:2], names[2:3]]
    assert list(map(found, paths_of(f"{tmp_path}/b.tar::{tmp_path}/c.tar"))) == [["b.tar"], ["c.tar"]]
    with pytest.raises(FileNotFoundError, match="no file .*a-train-02.tar"):
        expand(f"{tmp_path}/a-train-{{00..02}}.tar")
    with pytest.raises(FileNotFoundError, match="which shards are for validation.*wds:TRAIN::VAL"):
        paths_of(f"{tmp_path}/b.tar")


def test_what_is_wrong_with_a_data_set_is_said(photos, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # whoever imported it before
    rows, get = hub_rows(contents(photos, "train")), lambda: classification.datasets(config_of(f"hf:{tmp_path}/set"))
    for parts, said in (({"train": rows}, "no split validation or valid or val or test; it has train"),
                        ({"train": rows.rename_column("kind", "label").add_column("more", [0] * 12).remove_columns(
                            "label"), "val": rows}, "has 0 columns of the kind ClassLabel.*picture, more")):
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
        with pytest.raises(ValueError, match=said):
            get()
    unlabelled = hub_rows([(name, content, -1) for name, content, _ in contents(photos, "val")])
    datasets.DatasetDict(train=rows, test=unlabelled).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set, test, image 0 \(0.png\) has the label -1; expected 0 to 1"):
        get()
    rows.save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="is one split alone"):
        classification.datasets(config_of(f"hf:{tmp_path}/one"))
    with pytest.raises(FileNotFoundError, match="is no folder, nor in the cache"):
        classification.datasets(config_of("hf:nobody/nothing-of-this-name"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        get()


def test_only_classification_takes_records_and_runs_are_called_after_them():
    for place, name in (("hf:imagenet-1k", "imagenet-1k"), ("hf:owner/set", "set"),
                        ("wds:/data/x-train-{00..01}.tar::/data/y.tar", "x-train-00..01"),
                        ("/data/my photos", "my photos")):
        assert name_of_data(place) == name
    with pytest.raises(ValueError, match="data = 'hf:coco' does not fit; expected a folder, for detection"):
        resolve(dict(model="mask_rcnn_swin_t", data="hf:coco"))
    with pytest.raises(ValueError, match="token_labels = 'maps' does not fit; expected null"):
        resolve(dict(model="volo_d1", data="wds:x.tar", token_labels="maps"))
