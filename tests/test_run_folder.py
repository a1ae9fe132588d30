"""train/run_folder.py: which folder, and files that are either old or whole."""
import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
import yaml

from train import run_folder
from train.checkpoint import PROGRESS, save_atomically
from train.config import to_dict
from train.run_folder import RunFolder, replace_atomically
from train.runs import RUNS
from training import rows, tiny, train

METRICS = {"top1": "top-1"}


def test_crash_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_atomically({"epoch": 1}, path)

    def crash(state, file):
        file.write(b"half of it")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        save_atomically({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pt"]


def test_files_change_in_one_moment(tmp_path, monkeypatch):
    path, seen, replace = tmp_path / "file", [], os.replace
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append(path.read_text()), replace(*paths)))
    replace_atomically(path, lambda file: file.write(b"new"))
    assert seen == ["old"] and path.read_text() == "new"


def test_a_full_disk_names_the_file(tmp_path):
    def fill(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as error:
        replace_atomically(tmp_path / "file", fill)
    assert error.value.filename == str(tmp_path / "file") and error.value.errno == errno.ENOSPC


def saved_run(name, when=1e9, **config):
    """A folder runs/NAME as a run with a checkpoint leaves it."""
    path = RUNS / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(tiny(**config))))
    (path / "last.pt").touch()
    os.utime(path / "last.pt", (when, when))


def resumed(resume=True, **config):
    folder = RunFolder.open(tiny(**config), resume, 0, METRICS)
    return folder.resumes and folder.path.name


def made(resume=None, **config):
    folder = RunFolder.open(tiny(**config), resume, 0, METRICS)
    notes = folder.make(tiny(**config), resume)
    return folder.path.name, notes


def test_resume_takes_the_newest_run_of_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("swin_t-elsa-scenes-2", "swin_t-elsa-scenes-3", "swin_t-elsa-scenes")):
        saved_run(name, 2e9 if name.endswith("3") else 1e9 - age)
    saved_run("swin_t-scenes", attn=None)
    assert resumed() == "swin_t-elsa-scenes-3"
    (RUNS / "swin_t-elsa-scenes-3" / "previous.pt").touch()
    os.utime(RUNS / "swin_t-elsa-scenes-3" / "previous.pt", (1e8, 1e8))
    assert resumed() == "swin_t-elsa-scenes-3"  # by the newer of its two checkpoints
    assert resumed(attn=None) == "swin_t-scenes"
    assert made() == ("swin_t-elsa-scenes-4", [])
    assert made(True, attn="window") == ("swin_t-window-scenes", ["nothing to resume yet: a new run"])


def test_only_runs_on_this_data_are_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_run("swin_t-elsa-photos", 3e9, data="a/photos")
    saved_run("swin_t-elsa-photos-2", 1e9, data=str(tmp_path / "b" / "photos"))
    saved_run("swin_t-elsa-food-101", 2e9, data="food-101")
    saved_run("swin_t-elsa-set", 1e9, data="set")
    saved_run("swin_t-elsa-set-2", 2e9, data="set")
    assert resumed(data="a/photos/") == resumed(data="./a/../a/photos") == "swin_t-elsa-photos"
    assert resumed(data="b/photos") == "swin_t-elsa-photos-2"
    assert not resumed(data="food") and not resumed(data="set-2") and not resumed(data="photos")
    assert resumed(data="set") == "swin_t-elsa-set-2"
    assert made(True, data="set-2")[0] == "swin_t-elsa-set-2-2"
    saved_run("swin_t-elsa-set-2-3", 1e9, data="set-2")
    assert resumed(data="set-2") == "swin_t-elsa-set-2-3" and resumed(data="set") == "swin_t-elsa-set-2"
    (RUNS / "swin_t-elsa-set-2" / "config.yaml").write_text("[half of it")
    assert resumed(data="set") == "swin_t-elsa-set"


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(tmp_path):
    out = tmp_path / "run"
    assert made(True, out=str(out)) == ("run", ["nothing to resume yet: a new run"])
    (out / "log.jsonl").touch()
    with pytest.raises(ValueError, match="already holds a run"):
        made(out=str(out))
    assert made(True, out=str(out))[0] == "run"
    with pytest.raises(FileNotFoundError, match="no last.pt and no config.yaml"):
        made(str(out))
    (out / "config.yaml").touch()
    assert made(str(out))[0] == made(str(out / "config.yaml"))[0] == "run"
    (out / "last.pt").touch()
    assert resumed(str(out)) == resumed(str(out / "last.pt")) == resumed(out=str(out)) == "run"


def test_what_a_run_leaves(tmp_path):
    folder = tmp_path / "run"
    train(tiny(out=str(folder), epochs=1))
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert last.keys() - best.keys() == {*PROGRESS} and best.keys() <= last.keys()
    logged = rows(folder)
    assert [row.get("step") for row in logged] == [0, 1, 2, None] and logged[-1]["epoch"] == 1


def test_curves_are_drawn_without_reading_the_log_again(tmp_path, monkeypatch):
    """The same picture, to the byte, in a run, from the rows that it logs, and when it goes on, from those it kept."""
    def drawn(name, resumed):
        folder = RunFolder(tmp_path / name / "run", True, METRICS, resumes=resumed)
        folder.path.mkdir(parents=True)
        logged = [dict(kind="step", step=step, epoch=step // 3 + 1, loss=2 / (step + 1), lr=1e-3) for step in range(7)]
        logged.insert(3, dict(kind="epoch", epoch=1, train_loss=2, top1=50))
        logged.insert(7, dict(kind="epoch", epoch=2, train_loss=1, top1=75))
        if resumed:
            (folder.path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged[:6]))
            state = SimpleNamespace(step=4, epoch=1, model=torch.nn.Linear(1, 1), notes=[])
            folder.announce(tiny(), [], state, 24, 9, 1, torch.device("cpu"))
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "read_log", lambda path: pytest.fail("the log is read again"))
            for row in logged[5:] if resumed else logged:
                folder.log(**row)
            folder.plot()
        folder.close()
        assert rows(folder.path) == logged
        assert [*folder.points.steps] == [*range(7)] and [row["epoch"] for row in folder.points.epochs] == [1, 2]
        return (folder.path / "curves.png").read_bytes()

    assert drawn("whole", False) == drawn("resumed", True)
