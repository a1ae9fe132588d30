"""train/run_folder.py: which folder, and files that are either old or whole."""
import errno
import os

import pytest
import torch

from train.run_folder import RunFolder, replace_atomically, save_atomically
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


def test_resume_takes_the_newest_run_of_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("swin_t-elsa-scenes-2", "swin_t-elsa-scenes-3", "swin_t-elsa-scenes", "swin_t-scenes")):
        path = tmp_path / "runs" / name / "last.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "runs" / "swin_t-elsa-scenes-3" / "last.pt", (2e9, 2e9))
    assert RunFolder.open(tiny(), True, 0, METRICS).path.name == "swin_t-elsa-scenes-3"
    assert RunFolder.open(tiny(attn=None), True, 0, METRICS).path.name == "swin_t-scenes"
    assert RunFolder.open(tiny(), None, 0, METRICS).path.name == "swin_t-elsa-scenes-4"
    with pytest.raises(FileNotFoundError, match="no run of swin_t-window-scenes"):
        RunFolder.open(tiny(attn="window"), True, 0, METRICS)


def test_what_a_run_leaves(tmp_path):
    folder = tmp_path / "run"
    train(tiny(out=str(folder), epochs=1))
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert last.keys() - best.keys() == {"optimizer", "scaler"} and best.keys() <= last.keys()
    logged = rows(folder)
    assert [row.get("step") for row in logged] == [0, 1, 2, None] and logged[-1]["epoch"] == 1
