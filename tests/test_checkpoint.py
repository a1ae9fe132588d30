"""train/checkpoint.py: what is written beside the training, and what of it can be read back."""
import errno
import os
import threading
import time

import numpy as np
import pytest
import torch

from train import checkpoint as module
from train.checkpoint import NEEDED, Checkpoints, read_whole
from train.run_folder import RunFolder
from training import assert_same

CPU = torch.device("cpu")


def state(step):
    """A small checkpoint."""
    values = {name: {"weight": torch.full((3, 5), float(step)), "betas": (0.9, 0.999)} for name in NEEDED}
    return {**values, "step": step, "losses": [0.5] * step}


def written(folder, *steps, best=False):
    """A Checkpoints of a folder with checkpoints of these steps."""
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(RunFolder(folder, True, {}), 0)
    with checkpoints:
        for step in steps:
            checkpoints.save(state(step), best)
    return Checkpoints(RunFolder(folder, True, {}), 0)


def damage(path, position=300):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_every_damage_is_found_or_harmless(tmp_path):
    written(tmp_path / "run", 3)
    path, rng, found = tmp_path / "run" / "last.pt", np.random.default_rng(0), 0
    whole = path.read_bytes()
    for case in range(200):
        content = bytearray(whole)
        if case % 4:
            content[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        else:
            del content[rng.integers(len(whole)):]
        path.write_bytes(content)
        try:
            read = read_whole(path)
        except Exception:
            found += 1
            continue
        assert_same(read, state(3))
    assert found > 100
    content = bytearray(whole)
    content[whole.index(b"archive/data/1", whole.index(b"PK\1\2")) - 8] ^= 16  # no folder
    path.write_bytes(content)
    with pytest.raises(ValueError, match="mark of archive/data/1"):
        read_whole(path)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    folder = tmp_path / "run"
    checkpoints = written(folder, 1, 2)
    assert_same(checkpoints.load(CPU), (state(2), []))
    damage(folder / "last.pt")
    checkpoints = written(folder)
    found, (note,) = checkpoints.load(CPU)
    assert_same(found, state(1))
    assert f"{folder / 'last.pt'} is damaged" in note and f"continues from {folder / 'previous.pt'}" in note
    with checkpoints:
        checkpoints.save(state(3))
    assert_same(read_whole(folder / "previous.pt"), state(1))  # what was damaged has not taken its place
    for name in ("last.pt", "previous.pt"):
        damage(folder / name)
    with pytest.raises(ValueError, match="no checkpoint to continue from; start a new run"):
        written(folder).load(CPU)


def test_without_any_whole_checkpoint_the_best_weights_are_named(tmp_path):
    folder = tmp_path / "run"
    written(folder, 1, 2, best=True)
    (folder / "last.pt").write_bytes(b"")
    torch.save({"model": {}}, folder / "previous.pt")
    with pytest.raises(ValueError, match=r"last.pt is.*previous.pt is damaged \(it has no.*--weights .*best.pt"):
        written(folder).load(CPU)


def test_stopped_between_two_renames(tmp_path, monkeypatch):
    folder, replace = tmp_path / "run", os.replace
    written(folder, 1)

    def stop(source, target):
        if str(target).endswith("last.pt"):
            raise SystemExit
        replace(source, target)
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(SystemExit):
        module.save_atomically(state(2), folder / "last.pt", folder / "previous.pt")
    assert os.listdir(folder).count("last.pt") == 0
    assert_same(written(folder).load(CPU), (state(1), []))


def test_what_is_saved_is_of_one_moment_and_one_is_written_at_a_time(tmp_path, monkeypatch):
    go, at_once, save = threading.Event(), [], module.save_atomically

    def slow(*arguments):
        at_once.append(1)
        assert len(at_once) == 1
        go.wait(30)
        save(*arguments)
        at_once.clear()
    monkeypatch.setattr(module, "save_atomically", slow)
    checkpoints, moving = written(tmp_path / "run"), state(1)
    with checkpoints:
        assert checkpoints.due()
        checkpoints.save(moving)
        assert not checkpoints.due()  # while one is written
        moving["model"]["weight"].zero_()
        moving["losses"].append(0.25)
        threading.Timer(0.2, go.set).start()
        checkpoints.save(state(2))
        assert checkpoints.costs()["saving_s"] > 0.1 and checkpoints.costs() == {}
    assert_same(read_whole(tmp_path / "run" / "previous.pt"), state(1))
    assert_same(read_whole(tmp_path / "run" / "last.pt"), state(2))


@pytest.mark.parametrize("next_chance", ["due", "save", "the end"])
def test_a_full_disk_is_said_at_the_next_chance(tmp_path, monkeypatch, next_chance):
    checkpoints = written(tmp_path / "run", 1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError) as error, checkpoints:
        checkpoints.save(state(2))
        while not checkpoints.writing.done():
            time.sleep(0.01)
        if next_chance != "the end":
            checkpoints.due() if next_chance == "due" else checkpoints.save(state(3))
            raise AssertionError("nothing was said")
    assert error.value.filename == str(tmp_path / "run" / "last.pt") and error.value.errno == errno.ENOSPC
    assert_same(read_whole(tmp_path / "run" / "last.pt"), state(1))


def test_the_best_weights_and_the_log_are_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    order, save = [], module.save_atomically
    monkeypatch.setattr(module, "save_atomically", lambda state, path, *rest: (order.append(path.name),
                                                                               save(state, path, *rest)))
    monkeypatch.setattr(RunFolder, "sync_log", lambda self: order.append("log"))
    written(tmp_path / "run", 1, best=True)
    assert order == ["log", "best.pt", "last.pt"]
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best.keys() == NEEDED - {"optimizer", "scaler"}


def test_checkpoints_by_the_clock_and_on_rank_0_alone(tmp_path):
    assert not Checkpoints(RunFolder(tmp_path, True, {}), 15).due()
    other = Checkpoints(RunFolder(tmp_path / "other", False, {}), 0)
    assert not other.due()
    other.save(state(1))
    assert not (tmp_path / "other").exists()
