"""Evaluation: one file per benchmark, and what they have in common."""
import contextlib
import json
import math
import os
import sys

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


def printed_as_json(run):
    """Runs a command with what it prints on stderr, then prints its result, a dict, as one JSON object on stdout ->
    the result. What is not a finite number is null. Of several ranks the first alone prints."""
    with contextlib.redirect_stdout(sys.stderr):
        result = run()

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(plain(result)))
    return result
