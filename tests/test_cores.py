"""train/cores.py: how many cores a process may use."""
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from train import cores, data
from train.config import Config
from training import ROOT


@pytest.mark.parametrize("membership, files, expected", [
    ("", {}, 16),
    ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
    ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
    ("0::/\n", {"cpu.max": "100000 20000\n"}, 5),
    ("4:memory:/\n0::/mine\n", {"unified/mine/cpu.max": "300000 100000\n"}, 3),  # both versions
    ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    ("0::/\n", {"cpu.max": "9900000 100000\n"}, 16),
    ("0::/jobs/mine\n", {"jobs/mine/cpu.max": "max 100000", "jobs/cpu.max": "250000 100000"}, 2),
    ("0::/not/visible/here\n", {"cpu.max": "300000 100000"}, 3),
    ("4:memory:/\n3:cpu,cpuacct:/mine\n", {"cpu,cpuacct/mine/cpu.cfs_quota_us": "600000",
                                           "cpu,cpuacct/mine/cpu.cfs_period_us": "100000"}, 6),
    ("3:cpu,cpuacct:/docker/abc\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ("3:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
    ("5:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "200000", "cpuset/cpu.cfs_period_us": "100000"}, 16),
])
def test_the_quota_of_the_control_group_counts(tmp_path, monkeypatch, membership, files, expected):
    monkeypatch.setattr(cores, "_allowed", lambda: 16)
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.available(tmp_path, tmp_path / "membership") == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_the_affinity_counts():
    command = "import os, sys; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); sys.path[:0] = ['.']\n" \
              "from train import cores; print(cores.available())"
    assert subprocess.check_output([sys.executable, "-c", command], cwd=ROOT, text=True) == "1\n"


def test_workers_are_the_cores_split_among_the_ranks_of_the_machine(monkeypatch):
    photographs = SimpleNamespace(workers=None, data="photos")
    for available, ranks, expected in ((200, 1, 200), (6, 1, 6), (16, 4, 4), (2, 4, 0)):
        monkeypatch.setattr(cores, "available", lambda: available)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert data.num_workers(photographs) == expected
    assert data.num_workers(SimpleNamespace(workers=None, data=None)) == 0
    assert data.num_workers(SimpleNamespace(workers=3, data="photos")) == 3


def test_workers_stay_and_read_ahead_as_configured():
    config = Config(workers=1, prefetch=3, batch_size=2)
    assert data.training_loader(range(4), config, 0, 1).prefetch_factor == 3
    loaders = data.training_loader(range(4), config, 0, 1), data.validation_loader(range(4), 2, 0, 1, 1)
    assert all(loader.persistent_workers for loader in loaders)
    assert not data.validation_loader(range(4), 2, 0, 1, 0).persistent_workers


def test_threads_follow_the_quota_and_what_the_user_sets(monkeypatch):
    monkeypatch.setattr(cores, "_allowed", lambda: 16)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(cores, "available", lambda: 16)
    cores.settle_threads()
    assert os.environ == {"GOMP_SPINCOUNT": "1000"}  # their number is left to torch, which knows physical cores
    monkeypatch.setattr(cores, "available", lambda: 3)
    cores.settle_threads()
    assert os.environ == {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "3"}
    own = {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "active"}
    monkeypatch.setattr(os, "environ", dict(own))
    cores.settle_threads()
    assert os.environ == own


def test_threads_are_settled_before_torch_is_there():
    command = "import os, sys; os.environ.clear(); import run; assert 'torch' not in sys.modules\n" \
              "print(os.environ['GOMP_SPINCOUNT'])"
    assert subprocess.check_output([sys.executable, "-c", command], cwd=ROOT, text=True) == "1000\n"
