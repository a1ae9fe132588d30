"""models/published.py: which file a name stands for, and that a download is whole or leaves nothing."""
import hashlib
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from models import MODELS, create_model, load_weights, published
from models.swin import Swin
from photographs import image_folder
from run import main
from train.config import TASK_OF_FAMILY, task_of
from train.state import TrainingState
from training import tiny as tiny_run

SMALL = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 4), window_size=2, patch_size=2)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A table of one file, of a small swin_t of 7 classes, at a file:// address -> (its entry, to be changed; its
    weights; torch's cache)."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    weights = create_model("swin_t", num_classes=7, **SMALL).state_dict()
    torch.save({"model": weights}, tmp_path / "authors.pth")
    entry = {"model": "swin_t", "attn": "window", "source": "us", "file": "authors.pth", "resolution": 224,
             "score": {"top-1": 81.2}, "options": {}, "address": (tmp_path / "authors.pth").as_uri()}
    monkeypatch.setattr(published, "files", lambda: [entry])
    return entry, weights, tmp_path / "cache" / "hub" / "checkpoints"


def small(**options):
    return create_model("swin_t", **{"num_classes": 7, **SMALL, **options})


def kept(cache):
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("name, attn, img_size, window_size, word, file", [
    ("swin_t", "window", 224, None, "", "swin_tiny_patch4_window7_224.pth"),
    ("swin_t", "elsa", 224, None, "", "elsa_swin_tiny.pth"),
    ("swin_b", "window", 224, None, "", "swin_base_patch4_window7_224.pth"),
    ("swin_b", "window", 384, None, "", "swin_base_patch4_window7_224.pth"),
    ("swin_b", "window", 384, 12, "", "swin_base_patch4_window12_384.pth"),
    ("volo_d5", "outlook", 512, None, "", "d5_512_87.07.pth.tar"),
    ("volo_d5", "outlook", 256, None, "", "d5_224_86.10.pth.tar"),
    ("mask_rcnn_swin_t", "elsa", 800, None, "", "mask_rcnn_elsa_swin_tiny_3x.pth"),
    ("mask_rcnn_swin_t", "elsa", 800, None, ":swin_t", "elsa_swin_tiny.pth"),
    ("mask_rcnn_swin_t", "window", 800, None, ":mask_rcnn_swin_tiny_patch4_window7_1x.pth",
     "mask_rcnn_swin_tiny_patch4_window7_1x.pth"),
])
def test_the_file_of_a_model(name, attn, img_size, window_size, word, file):
    assert published.choose("published" + word, name, attn, img_size, window_size)["file"] == file


def test_what_nobody_published_is_said():
    with pytest.raises(ValueError, match="for volo_d1 with attn elsa, but with attn outlook; .*info --published"):
        published.choose("published", "volo_d1", "elsa", 224, None)
    with pytest.raises(ValueError, match="was not made by create_model"):
        load_weights(Swin(**SMALL), "published")


def test_the_table_is_whole():
    """Of models that there are, at addresses of the repositories that it names; one name is one file."""
    entries, sources = published.files(), yaml.safe_load(published.TABLE.read_text())["sources"]
    assert len({entry["file"] for entry in entries}) == len(entries) > 30
    for entry in entries:
        assert entry["file"] and ("address" in entry) != ("page" in entry) and entry["source"] in sources, entry
        assert entry.get("address", "").startswith("https://") or entry["page"].startswith("https://drive.google.com/")
        assert set(entry.get("sha256", "0" * 64)) <= set("0123456789abcdef") and entry["score"], entry
        assert len(entry.get("sha256", "0" * 64)) == 64 and set(entry["options"]) <= {"img_size", "window_size",
                                                                                      "crop_pct"}, entry
        architecture, _ = MODELS[entry["model"]]
        assert entry["attn"] in architecture.attentions and architecture.task == task_of(entry["model"])
        assert ("top-1" in entry["score"]) == (architecture.task == "classification")
    assert {entry["model"].split("_")[0] for entry in entries} == set(TASK_OF_FAMILY)


def test_a_file_is_fetched_once_and_loaded(shelf, capsys):
    entry, weights, cache = shelf
    entry["sha256"] = hashlib.sha256(Path(entry["address"].removeprefix("file://")).read_bytes()).hexdigest()
    for number in range(2):
        model = load_weights(small(), "published")
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        assert ("downloading file://" in capsys.readouterr().err) == (number == 0)
        entry["address"] = "file:///nowhere"  # nobody asks again
    assert kept(cache) == ["authors.pth"]


def test_pretrained_models_keep_a_fresh_classifier_of_other_classes(shelf, capsys):
    entry, weights, cache = shelf
    same, other, none = (small(num_classes=number, pretrained=True) for number in (7, 3, 0))
    printed = capsys.readouterr().err
    assert printed.count("starts fresh") == 1
    assert torch.equal(same.head.weight, weights["head.weight"]) and other.head.weight.shape == (3, 96)
    for model in (same, other, none):
        assert torch.equal(model.norm.weight, weights["norm.weight"])
        assert torch.equal(model.layers[3].blocks[0].mlp.fc1.weight, weights["layers.3.blocks.0.mlp.fc1.weight"])
    path = small(num_classes=3, pretrained=entry["address"].removeprefix("file://"))
    assert torch.equal(path.patch_embed.proj.weight, weights["patch_embed.proj.weight"])


def address_of(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    return (tmp_path / "other.pth").as_uri()


@pytest.mark.parametrize("change, said", [
    (lambda entry, path: entry.update(sha256="0" * 64), "is not the published file: invalid hash value"),
    (lambda entry, path: entry.update(address=(path / "gone.pth").as_uri()), "could not be fetched"),
    (lambda entry, path: entry.update(address="http://127.0.0.1:9/a.pth"), "could not be fetched"),
    (lambda entry, path: entry.update(address=address_of(path, b"<html>Sign in</html>")),
     "other.pth cannot be read: it is damaged"),
    (lambda entry, path: entry.update(address=address_of(path, (path / "authors.pth").read_bytes()[:-500])),
     "other.pth cannot be read: it is damaged"),
])
def test_what_did_not_come_whole_is_not_kept(shelf, tmp_path, change, said, capsys):
    entry, _, cache = shelf
    change(entry, tmp_path)
    with pytest.raises(ConnectionError) as error:
        small(pretrained=True)
    message = str(error.value)
    assert said in message and entry["address"] in message and "\n" not in message
    assert f"put it at {cache / 'authors.pth'}" in message and kept(cache) == []


def test_an_interrupted_download_leaves_nothing(shelf, monkeypatch):
    entry, _, cache = shelf

    def interrupted(address, path, *_):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "download_url_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(pretrained=True)
    assert kept(cache) == []


def test_what_lies_behind_a_page_is_put_by_hand(shelf):
    entry, weights, cache = shelf
    source = Path(entry.pop("address").removeprefix("file://"))
    entry["page"] = "https://drive.google.com/file/d/1/view"
    with pytest.raises(FileNotFoundError, match=f"drive.google.com/file/d/1/view , .*put it at {cache}/authors.pth"):
        small(pretrained=True)
    cache.mkdir(parents=True)
    (cache / "authors.pth").write_bytes(source.read_bytes())
    assert torch.equal(small(pretrained=True).head.weight, weights["head.weight"])


@pytest.mark.parametrize("locks", [True, False])
def test_several_processes_want_one_file(shelf, monkeypatch, locks):
    """Threads here; each opens the folder for itself, as processes do. Without locks each downloads, and all is well,
    too."""
    entry, weights, cache = shelf
    download, times = torch.hub.download_url_to_file, []

    def slow(*arguments):
        times.append(arguments)
        time.sleep(0.2)
        download(*arguments)

    monkeypatch.setattr(torch.hub, "download_url_to_file", slow)
    if not locks:
        monkeypatch.setattr(published, "fcntl", None)
    models = [small() for _ in range(3)]
    threads = [threading.Thread(target=load_weights, args=(model, "published")) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(model.head.weight, weights["head.weight"]) for model in models)
    assert kept(cache) == ["authors.pth"] and (len(times) == 1 if locks and published.fcntl else times)


def test_commands_take_weights_by_name(shelf, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "photos", {"val": 1}, "abcdefg")
    model = ["swin_t", "--img-size=32", "--patch-size=2", "--window-size=2", "--device=cpu", "--num-classes=7",
             "--model-args={embed_dim: 12, depths: [1, 1, 1, 1], num_heads: [1, 2, 4, 4]}", "--weights=published"]
    assert main(["predict", *model, "photos/val/a"]) == 0
    assert main(["eval", *model, "--data=photos", "--workers=0"]) == 0
    assert "7 images of photos" in capsys.readouterr().out
    state = TrainingState(tiny_run(attn="window", weights="published", num_classes=7), 1, torch.device("cpu"))
    assert torch.equal(state.model.head.weight, shelf[1]["head.weight"])
    state = TrainingState(tiny_run(attn="window", weights="published", num_classes=3), 1, torch.device("cpu"))
    assert state.notes[0].startswith("--weights published: all of it fits but the classifier")


def test_info_prints_the_table(capsys):
    assert main(["info", "--published"]) == 0
    printed = capsys.readouterr().out
    assert all(entry["file"] in printed and (entry.get("address") or entry["page"]) in printed
               for entry in published.files())
    assert "--img-size 384 --window-size 12" in printed and str(published.place({"file": ""})) in printed
