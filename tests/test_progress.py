"""train/progress.py: speed and time left."""
from types import SimpleNamespace

import pytest

from train import progress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.seconds)
    return now


def test_time_left_after_two_seconds(clock):
    remaining = progress.Remaining(30)
    clock.seconds = 1.9
    assert remaining.after(5) == ""
    clock.seconds = 4
    assert remaining.after(0) == "" and remaining.after(30) == ""
    assert remaining.after(10) == "  2.5 images/s  0:08 left"
    assert progress.Remaining(3, unit=None).after(1) == ""
    clock.seconds = 4000
    assert remaining.after(1) == "  0.00 images/s  32:13:20 left"


def test_a_watched_loader_tells_every_ten_seconds(clock, capsys):
    def batches():
        for _ in range(10):
            clock.seconds += 4
            yield None

    class Loader(list):
        dataset = "data"
        __iter__ = lambda self: batches()

    for rank, lines in ((0, 4), (1, 0)):
        loader = progress.Watched(Loader(range(10)), 37, rank)
        assert loader.dataset == "data" and len(list(loader)) == 10
        said = capsys.readouterr()
        assert not said.out and len(said.err.splitlines()) == lines
    assert rank or said.err.startswith("3/37 images")


@pytest.mark.parametrize("value, text", [(1234.5, "1234"), (10, "10"), (9.96, "10.0"), (3.14, "3.1"), (0.123, "0.12")])
def test_small_rates_have_decimals(value, text):
    assert progress.rate_of(value) == text


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_clock(seconds, text):
    assert progress.clock(seconds) == text
