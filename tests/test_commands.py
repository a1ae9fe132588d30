"""Whole commands, with words and files a little wrong: an answer or one line that says why not, never a traceback."""
import random
import shutil

import pytest
import torch

from eval.options import load_model
from photographs import ade_folder, coco_folder, image_folder
from run import main
from train import data, loop
from train.config import to_dict
from training import detector, segmenter, tiny

KINDS = ((tiny, "folder", "cat", ["cat", "dog"]), (segmenter, "ade", "images/validation", ["red", "green", "blue"]),
         (detector, "coco", "val2017", ["green", "red", "blue"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data of each kind, and a checkpoint trained on it."""
    root = tmp_path_factory.mktemp("place")
    image_folder(root / "folder", {"train": 4, "val": 2})
    ade_folder(root / "ade")
    coco_folder(root / "coco")
    torch.manual_seed(0)
    for configuration, name, _, classes in KINDS:
        config = configuration(num_classes=len(classes))
        content = {"model": load_model(config, None).state_dict(), "ema": None, "classes": classes,
                   "config": {**to_dict(config), "data": name}}
        torch.save(content, root / f"{name}.pt")
        lines = [f"{key}: {value}" for key, value in to_dict(config).items() if key in ("epochs", "flip", "seed", "lr")]
        (root / f"{name}.yaml").write_text("\n".join(lines))
    return root


def commands(rng):
    """The words of a command that works."""
    configuration, name, photographs, _ = rng.choice(KINDS)
    config = configuration()
    photographs = f"{name}/val/{photographs}" if name == "folder" else f"{name}/{photographs}"
    few = ["--device", "cpu", "--workers", "0"]
    return rng.choice((
        ["eval", config.model, "--weights", f"{name}.pt", "--data", name, "--val-limit", "2", *few],
        ["eval", "--weights", f"{name}.pt", "--batch-size", "2", "--dump" if name != "folder" else "--amp",
         "new/x" if name != "folder" else "none", *few],
        ["predict", config.model, "--weights", f"{name}.pt", f"{photographs}/0.*", photographs, "--out", "new", *few],
        ["train", config.model, "--attn", "elsa", "--data", name, "--recipe", f"{name}.yaml", "--batch-size", "2",
         "--limit", "4", "--warmup-epochs", "0", "--out", "new", *few]))


def misspelt(words, rng):
    """One word left out, twice, from elsewhere, cut, or with another letter in it."""
    words, i = list(words), rng.randrange(1, len(words))
    change, letter = rng.randrange(6), rng.choice("-./xé,{[:\0 ")
    if change == 0:
        del words[i]
    elif change == 1:
        words.insert(i, words[i])
    elif change == 2:
        words[i] = rng.choice(words)
    elif change == 3:
        words[i] = words[i][:rng.randrange(len(words[i]) + 1)]
    else:
        at = rng.randrange(len(words[i]) + 1)
        words[i] = words[i][:at] + letter + words[i][at + 1:]
    return words


def damage(root, rng):
    """One file cut, with other bytes in it, another's, empty, or gone."""
    path = rng.choice(sorted(path for path in root.rglob("*") if path.is_file()))
    content, change = bytearray(path.read_bytes()), rng.randrange(6)
    if change == 0:
        path.unlink()
        return path
    if change == 1:
        content = content[:rng.randrange(len(content))]
    elif change == 2:
        content = rng.choice(sorted(path for path in root.rglob("*") if path.is_file())).read_bytes()
    elif change == 3:
        content = b""
    else:
        for _ in range(rng.choice((1, 4, 16))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)
    return path


def begun(config, task, evaluation, resume=None, notes=()):
    """Of training what comes before the first step."""
    training, validation, classes = task.datasets(config)
    config.num_classes = config.num_classes or len(classes)
    loop.check_fit(config, len(training), len(classes), 1, torch.device("cpu"))
    training[0, 0], validation[0]


@pytest.mark.parametrize("times", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_a_little_wrong_is_said_in_one_line(place, tmp_path, monkeypatch, capsys, times):
    monkeypatch.setattr(loop, "train", begun)
    monkeypatch.setattr(data, "VALIDATION_SCENES", 2)
    wrong = []
    for number in range(times):
        rng = random.Random(number + times)
        here = tmp_path / str(number)
        shutil.copytree(place, here)
        monkeypatch.chdir(here)
        words, damaged = commands(rng), None
        if number % 2:
            words = misspelt(words, rng)
        else:
            damaged = damage(here, rng)
        before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
        status = main(words)
        error = capsys.readouterr().err
        told = status == 0 or error.count("error: ") == 1 or status == 1 and "could not be read" in error
        kept = all(path.exists() and path.read_bytes() == content for path, content in before.items())
        if not told or not kept or status not in (0, 1, 2) or "Traceback" in error or "unexpected" in error:
            wrong.append(f"{number}: {words}, damaged {damaged}, status {status}, inputs kept {kept}: {error}")
        shutil.rmtree(here)
    assert not wrong, "\n".join(wrong)
