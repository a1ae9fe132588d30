"""Steps of training beside those of the published code, from the golden trajectories in tests/golden/training.

What a step consists of is taken from where training has it: the optimiser and its groups from train/state.py, loss,
clipping and update from train/loop.py and the task. Handed in is what is drawn at random or follows from a schedule.
"""
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.tasks import task_of
from models import load_weights
from published import GOLDEN, published_entry
from train import loop
from train.interruption import Interruption
from train.state import TrainingState


@functools.cache
def golden(name):
    """The arrays of a trajectory by their keys, read-only in effect: they are shared."""
    with np.load(GOLDEN / "training" / f"{name}.npz") as file:
        return dict(file)


def shapes_of(arrays):
    """{published name of a parameter: its shape}"""
    return dict(zip(arrays["names"].tolist(), map(json.loads, arrays["shapes"].tolist())))


def statistics_of(model):
    """What BatchNorm keeps, as a state dict: it has the same names everywhere."""
    parameters = dict(model.named_parameters())
    return {key: value for key, value in model.state_dict().items() if key not in parameters}


def places(model, shapes):
    """Where the published parameters are: {our name: (published name, our positions of its entries 0, n // 3, 2n // 3
    and n - 1)}. shapes: {published name: shape}.

    The model is loaded with numbers that count the published entries, and is in float64 afterwards, which holds them.
    """
    starts = np.cumsum([0, *(np.prod(shape, dtype=int) for shape in shapes.values())]).tolist()
    state = {name: torch.arange(start, end, dtype=torch.float64).reshape(shape)
             for (name, shape), start, end in zip(shapes.items(), starts, starts[1:])}
    load_weights(model.double(), state | statistics_of(model))
    found = {}
    for ours, parameter in model.named_parameters():
        numbers = parameter.detach().flatten()
        index = int(np.searchsorted(starts, numbers[0].item(), side="right")) - 1
        n, positions = len(numbers), []
        for i in (0, n // 3, 2 * n // 3, n - 1):
            moved = numbers[i] != starts[index] + i
            positions.append(int((numbers == starts[index] + i).nonzero()) if moved else i)
        found[ours] = list(shapes)[index], positions
    assert sorted(name for name, _ in found.values()) == sorted(shapes)
    return found


def decay_of(state):
    """{our name: decay coefficient of its group in the optimiser of a TrainingState}"""
    groups = state.optimizer.param_groups
    of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    return {name: of[id(parameter)] for name, parameter in state.model.named_parameters()}


class Loader(list):
    """Batches in the order of the steps, as train_epoch takes them."""
    batch_sampler = SimpleNamespace()


class Trajectory:
    """`steps` steps (None: all) of the model of a Config, in `dtype`, from the published start.

    config: of the run, with the published decay. batch(step): as the task's loss takes it, floats in float32.
    Afterwards: state; losses and, after clipping, grad_norms of each step.
    """

    def __init__(self, name, config, batch, dtype=torch.float64, steps=None):
        self.golden, self.dtype = golden(name), dtype
        self.suffix = "_float64" if dtype == torch.float64 else ""
        shapes = shapes_of(self.golden)
        self.state = TrainingState(config, world=1, device=torch.device("cpu"))
        model = self.state.model
        self.places = places(model, shapes)
        start = {name: published_entry(name, shape, "float32") for name, shape in shapes.items()}
        start |= {key: published_entry(key, value.shape, "float32" if value.is_floating_point() else "int64")
                  for key, value in statistics_of(model).items()}
        load_weights(model, start).to(dtype)
        self.start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.grad_norms = []
        self.state.optimizer.register_step_pre_hook(lambda *_: self.grad_norms.append(self._grad_norm()))
        count = len(self.golden["lr"]) if steps is None else steps
        batches = Loader(_cast(batch(step), dtype) for step in range(count))
        rates = iter(self.golden["lr"])
        alone = Interruption(0, 1, torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "learning_rate", lambda *arguments: float(next(rates)))
            list(loop.train_epoch(self.state, task_of(config.model).training, batches, 0, 0, alone))
        self.losses = self.state.losses

    def _published(self, key):
        """An array of the published run in the same precision."""
        return self.golden[key + self.suffix]

    def _grad_norm(self):
        norms = [parameter.grad.double().norm() for parameter in self.state.model.parameters()]
        return torch.stack(norms).norm().item()

    def of_losses(self):
        """The largest relative difference of the losses."""
        return _relative(self.losses, self._published("loss")[:len(self.losses)])

    def of_grad_norms(self):
        """The largest relative difference of the gradients' norms, after clipping."""
        expected = self._published("grad_norm")[:len(self.grad_norms)]
        clip = self.state.config.clip_grad
        return _relative(self.grad_norms, np.minimum(expected, clip) if clip else expected)

    def of_parameters(self):
        """What the last step left of every parameter.

        {published name: dict(norm, moved: relative differences of the norms; entries: differences of the four in units
        of the root mean square movement; spread: the golden one)}
        """
        arrays, result = self.golden, {}
        rows = {name: row for row, name in enumerate(arrays["names"].tolist())}
        for name, parameter in self.state.model.named_parameters():
            published, positions = self.places[name]
            row, values, start = rows[published], parameter.detach().double().flatten(), self.start[name].double()
            moved = self._published("moved")[row]
            unit = moved / len(values) ** 0.5
            result[published] = {
                "norm": _relative(values.norm().item(), self._published("norm")[row]),
                "moved": _relative((values - start.flatten()).norm().item(), moved),
                "entries": np.abs(values[positions].numpy() - self._published("entries")[row]) / unit,
                "spread": arrays["spread"][row]}
        return result

    def of_statistics(self):
        """The largest difference of an entry of BatchNorm's statistics, in units of their root mean square movement in
        float32, the published precision of these."""
        arrays, worst = self.golden, 0.0
        statistics = self.state.model.state_dict()
        for row, name in enumerate(arrays.get("buffer_names", np.array([])).tolist()):
            values = statistics[name].double().flatten()
            n = len(values)
            ours = values[[0, n // 3, 2 * n // 3, n - 1]].numpy()
            unit = arrays["buffer_moved"][row] / n ** 0.5
            worst = max(worst, np.abs(ours - arrays["buffer_entries"][row]).max() / unit)
        return worst

    def report(self, noise=()):
        """One line of figures, as in the table beside the golden numbers."""
        found = {name: row for name, row in self.of_parameters().items() if name not in noise}
        figures = []
        for key in ("norm", "moved", "entries"):
            values = {name: np.max(row[key]) for name, row in found.items()}
            figures.append(f"{np.median([*values.values()]):.1e} / {max(values.values()):.1e}")
        worst = sorted(values, key=values.get)[:-4:-1]
        return " | ".join([str(self.dtype)[6:], f"{self.of_losses():.1e}", f"{self.of_grad_norms():.1e}", *figures,
                           f"statistics {self.of_statistics():.1e}", *(f"{name} {values[name]:.1e}" for name in worst)])


def _relative(ours, published):
    return float(np.max(np.abs(np.asarray(ours) / np.asarray(published) - 1)))


def _cast(value, dtype):
    """A batch with its floats in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    return type(value)(_cast(part, dtype) for part in value) if isinstance(value, (list, tuple)) else value
