"""Curves of training runs, drawn from the rows of their logs: see run_folder.read_log."""
from array import array
from collections import Counter

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


class Points:
    """What is drawn of a log: the losses of its steps, and the rows of its epochs. 300 epochs of ImageNet have 375,000
    rows, which are not read again after every epoch."""

    def __init__(self, rows=()):
        self.steps, self.losses, self.per_epoch, self.epochs = array("d"), array("d"), Counter(), []
        for row in rows:
            self.add(row)

    def add(self, row):
        if row["kind"] == "step":
            self.steps.append(row["step"])
            self.losses.append(row["loss"])
            self.per_epoch[row["epoch"]] += 1
        else:
            self.epochs.append(row)

    def step_losses(self):
        """(epochs that are passed after each step, as fractions; losses)"""
        per_epoch = max(self.per_epoch.values(), default=1)
        return [(step + 1) / per_epoch for step in self.steps], self.losses


def curves_of(points, metrics, title):
    """Figure of one run: loss of every step and epoch, and the metrics, {key: name}, against epochs. The first of these
    is the one that chooses best.pt."""
    figure, losses, scores = _axes()
    epochs = points.epochs
    at = [row["epoch"] for row in epochs]
    losses.plot(*points.step_losses(), color="0.8", label="step")
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
    """Figure of several runs, {how it is called: Points}: losses, of steps faintly, and one metric."""
    figure, losses, scores = _axes()
    for number, (label, points) in enumerate(runs.items()):
        epochs = points.epochs
        style, at = dict(color=f"C{number % 10}", label=label), [row["epoch"] for row in epochs]
        losses.plot(*points.step_losses(), color=style["color"], alpha=0.2)
        losses.plot(at, [row["train_loss"] for row in epochs], "o-", **style)
        scores.plot(at, [row[metric] for row in epochs], "o-", **style)
    losses.set(title="training")
    scores.set(ylabel=f"{name}, %", title="validation")
    _finish(losses, scores)
    return figure


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
