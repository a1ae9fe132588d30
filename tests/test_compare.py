"""`run.py compare`: what it trains, what it continues, what it writes."""
import contextlib
import json
import subprocess
from pathlib import Path

import pytest

from eval import compare
from photographs import image_folder
from run import main
from train import small_data
from train.config import RECIPES
from training import rows

MODEL_ARGS = "{embed_dim: 12, depths: [1, 1, 1, 1], num_heads: [1, 2, 2, 4], kernel_size: 3}"
SETTINGS = ["--set", "epochs=2", "limit=16", "val_limit=8", "img_size=16", "patch_size=2", "window_size=2",
            "batch_size=8", "warmup_epochs=0.5", "device=cpu", f"model_args={MODEL_ARGS}"]


def in_this_process(command, stdout, stderr):
    """subprocess.run of run.py, without waiting for another Python to import torch -> with the exit status."""
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
        return subprocess.CompletedProcess(command, main(command[2:]))


def test_compare_trains_resumes_and_survives_a_crash(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ELSA_BACKEND", raising=False)
    out = tmp_path / "compared"
    command = ["compare", "swin_t", "--attn", "dwconv,elsa", "--seeds", "1", "--out", str(out), *SETTINGS]
    (out / "elsa-0").mkdir(parents=True)
    (out / "elsa-0" / "last.pt").write_bytes(b"junk")  # a run that cannot go on
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", in_this_process)
        assert main(command) == 2
    printed = capsys.readouterr()
    assert "1 of 2 runs failed" in printed.err and "elsa, seed 0: no epoch finished" in printed.out
    result = json.loads((out / "results.json").read_text())
    assert [row["runs"] for row in result["rows"]] == [1, 0] and result["rows"][1]["mean"] is None
    before = (out / "dwconv-0" / "last.pt").stat().st_mtime_ns

    (out / "elsa-0" / "last.pt").unlink()
    assert main(command) == 0  # in processes of their own
    table = (out / "table.md").read_text()
    result = json.loads((out / "results.json").read_text())
    assert (out / "dwconv-0" / "last.pt").stat().st_mtime_ns == before and (out / "plot.png").exists()
    assert "| dwconv |" in table and "| elsa |" in table and "python run.py compare swin_t" in table
    for row in result["rows"]:
        history = [line for line in rows(out / f"{row['attn']}-0") if "step" not in line]
        assert row["mean"] == history[-1]["top1"] and len(history) == 2
        assert row["memory"] > 1e8 and row["images_per_s"] > 0


@pytest.mark.parametrize("arguments, words", [
    (["--attn", "elsa,dwconf"], "Did you mean 'dwconv'?"),
    (["--attn", "elsa,elsa"], "every kind of attention once"),
    (["--set", "epochs"], "expected KEY=VALUE"),
    (["--set", "epoch=3"], "expected KEY=VALUE"),
    (["--set", "seed=3"], "expected KEY=VALUE"),
    (["--seeds", "0"], "1 seed or more")])
def test_mistakes_are_answered_before_anything_is_trained(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "swin_t", *arguments]) == 2
    assert words in capsys.readouterr().err and not Path("runs").exists()


def test_all_kinds_of_attention_are_trained_by_one_recipe(tmp_path, monkeypatch):
    """Plain Swin has a recipe of its own, which would make two kinds of training."""
    made = []
    image_folder(tmp_path / "photos", {"train": 2, "val": 1})
    monkeypatch.setattr(compare.Comparison, "run", lambda comparison: made.append(comparison))
    monkeypatch.setitem(small_data.LARGE, "classification", 4)  # as if they were many
    places = ["--data", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    compare.main(["swin_t", "--attn", "window,elsa", *places, *SETTINGS, "--set", "epochs=3", "mixup=0.1"])
    arguments = made[0].arguments
    assert arguments[arguments.index("--recipe") + 1] == str(RECIPES / "swin_t.yaml")
    assert made[0].config.decay == "published" and made[0].config.crop_pct == 0.9
    assert (made[0].config.epochs, made[0].config.mixup, made[0].config.batch_size) == (3, 0.1, 8)  # --set adds up
    monkeypatch.undo()
    monkeypatch.setattr(compare.Comparison, "run", lambda comparison: made.append(comparison))
    compare.main(["swin_t", "--attn", "window,elsa", *places, *SETTINGS])  # few have one recipe for all kinds
    assert "--recipe" not in made[1].arguments and made[1].config.decay == "weights"
