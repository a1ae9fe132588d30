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
