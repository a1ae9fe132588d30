"""Evaluation: one file per benchmark, and what they have in common."""
import contextlib

import torch


@contextlib.contextmanager
def evaluating(model):
    """The model in evaluation mode, without gradients. Its mode is restored afterwards, whatever happens."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def refuse_other_names(classes, names, data):
    """Raises ValueError when the names of a checkpoint's classes are not, in order, those of the data.

    data: its folder, or None for rendered scenes.
    """
    if list(classes) != list(names):
        source = "without --data, rendered scenes" if data is None else f"--data {data}"
        differing = [pair for pair in zip(classes, names) if pair[0] != pair[1]]
        raise ValueError(f"{source}: {len(names)} classes, the checkpoint has {len(classes)}; expected the same names "
                         f"in the same order. The first that differ: {differing[:3]} (checkpoint, data)")
