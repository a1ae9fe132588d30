"""Logs of one kind of row each, `run.py plot`, TensorBoard's events, and how a run ends."""
import json
import sys

import pytest

from eval import plot
from run import main
from train import curves, run_folder
from train.run_folder import RunFolder, best_row, read_log
from training import tiny, train

METRICS = {"top1": "top-1", "top5": "top-5"}


def saved(folder, epochs=2, older=False, model="swin_t", metric="top1"):
    """A run of two steps an epoch, whose score rises and then falls."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model: {model}\n")
    rows = []
    for epoch in range(1, epochs + 1):
        rows += [{"kind": "step", "step": 2 * epoch - 2 + i, "epoch": epoch, "loss": 1 / epoch, "lr": 0.1}
                 for i in range(2)]
        rows.append({"kind": "epoch", "epoch": epoch, "train_loss": 1 / epoch, "val_loss": 1.5, metric: 50.0 - epoch})
    for row in rows if older else ():
        kind = row.pop("kind")
        row["epoch"] -= kind == "step"
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_older_logs_read_as_newer_ones(tmp_path):
    rows = read_log(saved(tmp_path / "new"))
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2, 2, 2] and [*rows[0]][0] == "kind"
    assert read_log(saved(tmp_path / "old", older=True)) == rows
    at, losses = curves.Points(rows).step_losses()
    assert (at, list(losses)) == ([0.5, 1.0, 1.5, 2.0], [1.0, 1.0, 0.5, 0.5])
    assert len(curves.Points(rows).epochs) == 2


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_curves_have_whole_epochs_from_0(tmp_path, epochs):
    rows = [{**row, "top5": 90.0} for row in read_log(saved(tmp_path / "run", epochs))]
    points = curves.Points(rows)
    for figure in (curves.curves_of(points, METRICS, "a$b"), curves.comparison_of({"a$^$": points}, "top1", "top-1")):
        figure.draw_without_rendering()
        for axes in figure.axes:
            ticks = [tick for tick in axes.get_xticks() if tick <= epochs]
            assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > epochs and len(ticks) >= 2
            assert all(tick == int(tick) for tick in ticks)


def test_plot_draws_runs_together(tmp_path, monkeypatch, capsys):
    runs = [saved(tmp_path / name, older=name == "b/one") for name in ("a/one", "b/one", "two")]
    monkeypatch.chdir(tmp_path)
    drawn, made = [], plot.comparison_of
    monkeypatch.setattr(plot, "comparison_of", lambda *arguments: drawn.append(made(*arguments)) or drawn[-1])
    for out in (["--out", "new/picture.svg"], []):
        assert main(["plot", str(runs[0]), "b/one", "two/log.jsonl", "two/log.jsonl", *out]) == 0
    assert "two: 2 epochs, top-1 49.00 at best, 48.00 at the end" in capsys.readouterr().out
    legend = [text.get_text() for text in drawn[0].axes[1].get_legend().get_texts()]
    assert legend == [str(runs[0]), "b/one", "two"]
    assert [line.get_ydata().tolist() for line in drawn[0].axes[1].lines] == [[49, 48]] * 3
    assert (tmp_path / "new/picture.svg").read_text().startswith("<?xml")
    assert (tmp_path / "runs/plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, words", [
    (["absent"], "absent: no log.jsonl there; expected the folder of a run"),
    (["one", "dense"], "one has top-1, dense has mIoU; draw them apart"),
    (["begun"], "begun: no epoch of this run is finished"),
    (["one", "--out", "x.gif"], "expected .png, .pdf, .svg"),
    (["one", "--out", "one/curves.png"], "would write over one/curves.png")])
def test_what_cannot_be_plotted(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "one")
    saved(tmp_path / "dense", model="upernet_swin_t", metric="miou")
    log = saved(tmp_path / "begun", epochs=0) / "log.jsonl"
    log.write_text('{"kind": "step", "step": 0, "epoch": 1, "loss": 1.0, "lr": 0.1}\n')
    (tmp_path / "one" / "curves.png").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(["plot", *arguments]) == 2 and words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("scores, select, best", [
    ([1, 3, 3, 2], "best", 2), ([1, 3, 3, 2], "last", 4), ([0], "best", 1), ([float("nan"), 1, 2], "best", 3),
    ([2, float("nan"), 1], "best", 2)])
def test_the_best_epoch_is_the_first_of_equals(scores, select, best):
    history = [{"epoch": number, "top1": score} for number, score in enumerate(scores, 1)]
    assert best_row(history, "top1", select)["epoch"] == best


def test_the_end_says_what_was_reached_and_what_to_type_next(tmp_path, monkeypatch):
    for split in ("train", "val"):
        (tmp_path / "my photos" / split).mkdir(parents=True)
    history = [{"epoch": 1, "top1": 40.0}, {"epoch": 2, "top1": 50.5}, {"epoch": 3, "top1": 50.0}]
    folder = RunFolder("runs/it's", True, METRICS)
    lines = folder.ending(tiny(data=str(tmp_path / "my photos")), history)
    assert lines[0] == "the best epoch is 2 of 3: top-1 50.50, runs/it's/best.pt"
    assert lines[1] == "curves: runs/it's/curves.png, log: runs/it's/log.jsonl. Next:"
    weights = """--weights 'runs/it'"'"'s/best.pt'"""
    assert lines[2:] == [f"  python run.py eval {weights} --data '{tmp_path}/my photos'",
                         f"  python run.py predict {weights} '{tmp_path}/my photos/val'"]
    monkeypatch.setattr(sys, "argv", ["../elsa/run.py", "train"])
    lines = folder.ending(tiny(select="last"), history)
    assert lines[0].startswith("the last epoch, as the recipe has it, is 3 of 3: top-1 50.00")
    assert lines[2:] == [f"  python ../elsa/run.py eval {weights}", f"  python ../elsa/run.py predict {weights} IMAGE"]


def test_tensorboard_that_is_not_there_is_said_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "swin_t", "--tensorboard"]) == 2
    assert "the package tensorboard, which is not installed: `pip install tensorboard`" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_tensorboard_has_the_rows_of_the_log(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tiny(out=str(tmp_path / "run"), epochs=1, tensorboard=True))
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    points = curves.Points(read_log(tmp_path / "run"))
    losses = events.Scalars("step/loss")
    assert [event.step for event in losses] == [0, 1, 2]
    assert [event.value for event in losses] == pytest.approx(list(points.losses))
    assert [(event.step, event.value) for event in events.Scalars("epoch/top1")] == [
        (1, pytest.approx(points.epochs[0]["top1"]))]


def test_the_screen_shows_the_configuration_when_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_folder.RunFolder, "plot", lambda folder: None)
    for verbose in (False, True):
        train(tiny(out=str(tmp_path / f"run{verbose}"), epochs=1, verbose=verbose))
        out = capsys.readouterr().out
        assert ("\nweight_decay: 0.05\n" in out) == verbose and "all options to config.yaml there" in out
    assert out.splitlines()[-4].startswith("the best epoch is 1 of 1: top-1 ")
