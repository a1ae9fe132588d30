"""Training runs of a second: a tiny configuration, and what they leave behind."""
import json
from pathlib import Path

import torch

from eval.tasks import task_of
from train import loop
from train.config import Config

ROOT = Path(__file__).parents[1]
TINY = dict(model="swin_t", img_size=16, patch_size=2, window_size=2,
            model_args=dict(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 4]), limit=24, val_limit=9, epochs=2,
            warmup_epochs=0.5, batch_size=8, lr=1e-3, device="cpu")


def tiny(**changes):
    return Config(**{**TINY, "attn": "elsa", **changes})


def train(config, **options):
    """As run.py does it."""
    task = task_of(config.model)
    return loop.train(config, task.training, task.evaluation, **options)


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def checkpoint(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for pair in zip(first, second):
            assert_same(*pair)
    else:
        assert first == second
