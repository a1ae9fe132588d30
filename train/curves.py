"""Curves of training runs, drawn from the rows of their logs: see run_folder.read_log."""
from collections import Counter

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def curves_of(rows, metrics, title):
    """Figure of one run: loss of every step and epoch, and the metrics, {key: name}, against epochs. The first of these
    is the one that chooses best.pt."""
    figure, losses, scores = _axes()
    steps, epochs = split(rows)
    at = [row["epoch"] for row in epochs]
    losses.plot(*step_losses(steps), color="0.8", label="step")
    losses.plot(at, [row["train_loss"] for row in epochs], "o-", label="training")
    if "val_loss" in epochs[0]:
        losses.plot(at, [row["val_loss"] for row in epochs], "o-", label="validation")
    for metric, name in metrics.items():
        scores.plot(at, [row[metric] for row in epochs], "o-", label=name)
    chosen, name = next(iter(metrics.items()))
    best = max(row[chosen] for row in epochs)
    scores.set(ylabel="validation, %", ylim=(0, 101), title=f"best {name} {best:.2f}")
    _finish(losses, scores)
    figure.suptitle(title, parse_math=False)  # a $ is a $
    return figure


def comparison_of(runs, metric, name):
    """Figure of several runs, {how it is called: rows}: losses, of steps faintly, and one metric."""
    figure, losses, scores = _axes()
    for number, (label, rows) in enumerate(runs.items()):
        steps, epochs = split(rows)
        style, at = dict(color=f"C{number % 10}", label=label), [row["epoch"] for row in epochs]
        losses.plot(*step_losses(steps), color=style["color"], alpha=0.2)
        losses.plot(at, [row["train_loss"] for row in epochs], "o-", **style)
        scores.plot(at, [row[metric] for row in epochs], "o-", **style)
    losses.set(title="training")
    scores.set(ylabel=f"{name}, %", title="validation")
    _finish(losses, scores)
    return figure


def split(rows):
    """(rows of steps, rows of epochs)"""
    return [row for row in rows if row["kind"] == "step"], [row for row in rows if row["kind"] == "epoch"]


def step_losses(steps):
    """(epochs that are passed after each step, as fractions; losses)"""
    per_epoch = max(Counter(row["epoch"] for row in steps).values(), default=1)
    return [(row["step"] + 1) / per_epoch for row in steps], [row["loss"] for row in steps]


def _axes():
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    losses.set(ylabel="loss")
    return figure, losses, scores


def _finish(*both):
    for axes in both:
        axes.set(xlabel="epoch", xlim=(0, None))  # from 0, so that a single epoch has a place
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        for text in axes.legend().get_texts():
            text.set_parse_math(False)
