"""eval/bench_input.py: what it times is what trains, and its tables follow from its seconds."""
import multiprocessing

import pytest
import torch

from eval import bench, bench_input
from photographs import image_folder
from train.device import normalised


@pytest.fixture
def photos(tmp_path):
    return image_folder(tmp_path / "photos", {"train": 4, "val": 1})


def test_ours_makes_the_batches_of_training(photos, monkeypatch):
    made, to_device = [], bench_input.to_device
    monkeypatch.setattr(bench_input, "to_device", lambda *arguments: made.append(to_device(*arguments)) or made[-1])
    stopwatch = bench_input.Stopwatch()
    bench_input.ours(stopwatch, str(photos), torch.device("cpu"))(3, [1, 6])
    training = bench_input.datasets(str(photos))[0]
    expected = torch.stack([training[3, index][0] for index in (1, 6)])
    assert torch.equal(made[0][0], normalised(expected)) and made[0][1].tolist() == [0, 1]
    assert set(stopwatch.seconds) == {*bench_input.STAGES} - {"seeds and the rest"}
    assert min(stopwatch.seconds.values()) > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves files open
def test_timms_pipeline_is_timed_in_the_same_stages(photos):
    pytest.importorskip("timm.data")
    stopwatch = bench_input.Stopwatch()
    bench_input.timms(stopwatch, str(photos / "train"), torch.device("cpu"))(0, [0, 5, 7])
    assert set(stopwatch.seconds) == {*bench_input.WORKER} - {"seeds and the rest"}


def test_the_table_follows_from_the_seconds(capsys):
    of = lambda decode, crop: {**dict.fromkeys(bench_input.STAGES, 0.0), "read and decode": decode,
                               "crop and resize": crop, "to the device": 9.0}
    bench_input.report({"ours": [of(0.2, 0.2), of(0.3, 0.2), of(0.2, 0.1)], "timm": [of(0.3, 0.2)] * 3}, 100, [1000])
    said = capsys.readouterr().out
    assert "| read and decode | 2.00 | 3.00 |" in said and "| flip |  |  |" in said
    assert "| images/s and core, median | 250 | 200 |" in said and "| least | 200 | 200 |" in said
    assert "ours: 1.25 times timm's (1.00 to 1.67)" in said
    assert "A GPU that trains on 1000 images/s needs 4 cores" in said


def doubles(stopwatch, factor):
    """A maker, in a process of its own."""
    def make(epoch, indices):
        if indices == [13]:
            raise ValueError("13.jpg cannot be read")
        stopwatch.seconds["flip"] = factor * sum(indices) + epoch
    return make


def test_processes_take_turns_and_say_what_fails(monkeypatch):
    context = multiprocessing.get_context("fork")  # in a hundredth of the time
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    found = bench_input.measure({"a": (doubles, 2.0), "b": (doubles, 3.0)}, [[1, 2], [3]], repeats=2)
    assert [row["flip"] for row in found["a"]] == [12, 14] and [row["flip"] for row in found["b"]] == [18, 20]
    with pytest.raises(ValueError, match="13.jpg cannot be read"):
        bench_input.measure({"a": (doubles, 2.0)}, [[13]], repeats=1)


def test_what_the_level_input_needs_is_said():
    with pytest.raises(ValueError, match="--level input needs --data"):
        bench.main(["--level", "input", "--device", "cpu"])
    with pytest.raises(ValueError, match="--level: got operator input; input is measured by itself"):
        bench.main(["--level", "operator", "input", "--device", "cpu"])
