"""The real commands, as a user types them, at a small size."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from photographs import image_folder

from run import main
from train.config import KEYS

ROOT = Path(__file__).parents[1]
TINY = ["--img-size", "16", "--patch-size", "2", "--window-size", "2", "--model-args",
        "{embed_dim: 12, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "8",
        "--device", "cpu"]


def run(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, timeout=120, capture_output=True, text=True)


def succeed(folder, *arguments):
    result = run(folder, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data") / "photos", {"train": 4, "test": 4}, ("cat", "dog", "owl"))


def test_train_scenes_eval_and_resume(tmp_path, monkeypatch, capsys):
    out = succeed(tmp_path, "train", "swin_t", "--attn", "elsa", "--limit", "16", "--val-limit", "9", *TINY)
    assert "rendered scenes" in out and "epoch 1/1" in out and "batch_size: 8" in out
    folder = tmp_path / "runs" / "swin_t-elsa-scenes"
    assert {path.name for path in folder.iterdir()} == {"last.pt", "best.pt", "log.jsonl", "curves.png", "config.yaml"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["batch_size"] == 8 and config["num_classes"] == 8
    assert torch.load(folder / "best.pt", weights_only=True)["config"] == config

    out = succeed(tmp_path, "eval", "swin_t", "--weights", folder / "best.pt", "--val-limit", "9")
    assert re.search(r"top-1 \d+\.\d\d  top-5 \d+\.\d\d  9 images  [\d.]+ images/s", out)
    trained = torch.load(folder / "best.pt", weights_only=True)["history"][0]
    assert f"top-1 {trained['top1']:.2f}  top-5 {trained['top5']:.2f}" in out

    command = ["train", "swin_t", "--attn", "elsa", "--limit", "16", "--val-limit", "9", *TINY]
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--resume"]) == 0 and "continues after epoch 1" in capsys.readouterr().out
    assert main(command) == 0 and (tmp_path / "runs" / "swin_t-elsa-scenes-2" / "last.pt").exists(), "a second run overwrites nothing"


def test_train_photos_with_the_paper_recipe_and_eval(tmp_path, photos):
    out = succeed(tmp_path, "train", "swin_t", "--attn", "elsa", "--data", photos, *TINY, "--out", "mine", "--workers", "1")
    assert "recipe swin_t" in out and "randaugment: 9.0" in out
    out = succeed(tmp_path, "eval", "swin_t", "--attn", "elsa", "--weights", "mine/last.pt", "--data", photos, "--workers", "1")
    assert "12 images" in out and "3 classes" in out


@pytest.mark.parametrize("arguments, message", [
    (["train", "swin_tt"], "did you mean 'swin_t'"),
    (["train", "swin_t", "--attn", "elza"], "did you mean 'elsa'"),
    (["train", "swin_t", "--btach-size", "8"], "did you mean --batch-size"),
    (["train", "swin_t", "--epochs"], "expected one argument"),
    (["train", "swin_t", "8"], "'8' is not the value of any option"),
    (["train", "swin_t", "--lr", "fast"], "lr = 'fast'"),
    (["train", "swin_t", "--data", "absent"], "absent: no such folder"),
    (["train", "swin_t", "--model-args", "{embed_dmi: 12}"], "did you mean 'embed_dim'"),
    (["eval", "swin_t", "--weights", "absent.pt"], "no checkpoint at absent.pt"),
    (["tarin"], "did you mean train"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2  # in this process: starting one takes longer than the command
    stderr = capsys.readouterr().err
    assert message in stderr.replace("Did", "did") and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_corrupt_photo_is_named_by_a_worker(tmp_path, photos):
    bad = tmp_path / "photos"
    for path in photos.rglob("*.*"):
        copy = bad / path.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"not an image" if path.match("train/cat/0.png") else path.read_bytes())
    result = run(tmp_path, "train", "swin_t", "--data", bad, *TINY, "--batch-size", "12", "--workers", "1")
    assert result.returncode == 2 and re.match(r"error: \S+/train/cat/0.png cannot be read as an image", result.stderr.splitlines()[-1])
    assert "Traceback" not in result.stderr


def test_unknown_option_fails_at_once(tmp_path):
    result = run(tmp_path, "train", "swin_t", "--epohcs", "3")
    assert result.returncode == 2 and result.stderr == "error: unknown option --epohcs; did you mean --epochs? --help lists all\n"


def test_usage_has_examples(capsys):
    assert main([]) == main(["--help"]) == 0
    assert capsys.readouterr().out.count("python run.py train swin_t --attn elsa ") == 6


def test_help_lists_every_key(tmp_path):
    out = succeed(tmp_path, "train", "--help")
    assert all("--" + name.replace("_", "-") in out for name in KEYS if name != "model") and "--resume" in out and "--recipe" in out
