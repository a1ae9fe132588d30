"""Training runs of a second: tiny configurations, how they are started and interrupted, and what they leave behind."""
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from eval.tasks import task_of
from train import loop
from train.config import Config

ROOT = Path(__file__).parents[1]
TINY = dict(model="swin_t", img_size=16, patch_size=2, window_size=2,
            model_args=dict(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 4]), limit=24, val_limit=9, epochs=2,
            warmup_epochs=0.5, batch_size=8, lr=1e-3, device="cpu")

BACKBONE = dict(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], kernel_size=3)
DENSE = dict(attn="elsa", img_size=32, patch_size=2, window_size=2, drop_path_rate=0.1, batch_size=4, epochs=2, lr=1e-3,
             warmup_epochs=0.5, limit=8, val_limit=3, device="cpu", workers=0)
SEGMENTER = dict(**DENSE, model="upernet_swin_t", model_args=dict(**BACKBONE, channels=8, auxiliary_channels=6))
DETECTOR = dict(**DENSE, model="mask_rcnn_swin_t", model_args=dict(**BACKBONE, channels=8, hidden=16, anchor_scale=4,
                                                                   rpn_samples=16, roi_samples=8))


def tiny(**changes):
    return Config(**{**TINY, "attn": "elsa", **changes})


def segmenter(**changes):
    return Config(**{**SEGMENTER, **changes})


def detector(**changes):
    return Config(**{**DETECTOR, **changes})


def command_line(config, *names):
    """The options that name these keys of a configuration."""
    values = {name: getattr(config, name) for name in names}
    return [f"--{name.replace('_', '-')}={json.dumps(value) if name == 'model_args' else value}"
            for name, value in values.items()]


def train(config, **options):
    """As run.py does it."""
    task = task_of(config.model)
    return loop.train(config, task.training, task.evaluation, **options)


def run_py(*arguments, ranks=1, script="run.py"):
    """What `run.py ARGUMENTS` prints, or another script, in a process of its own, or under torchrun in several."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # the same order of sums as in this process
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run([sys.executable, *torchrun, str(script), *map(str, arguments)], cwd=ROOT, env=environment,
                          timeout=170, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def over_ranks(world, function):
    """[function(rank), ...], each in a thread that takes itself for a process of `world`: torch.distributed's
    collectives that the project uses work among them."""
    here, barrier, table = threading.local(), threading.Barrier(world, timeout=60), [None] * world

    def exchange(value):
        table[here.rank] = value
        barrier.wait()
        values = list(table)
        barrier.wait()
        return values

    def all_reduce(tensor, op=dist.ReduceOp.SUM):
        values = torch.stack(exchange(tensor.clone()))  # refuses other shapes
        assert len({value.dtype for value in exchange(tensor)}) == 1
        tensor.copy_(values.amax(0) if op == dist.ReduceOp.MAX else values.sum(0))

    def all_gather_object(gathered, value):
        gathered[:] = exchange(value)

    def gather_object(value, gathered):
        assert (gathered is None) == (here.rank > 0)
        values = exchange(value)
        if gathered:
            gathered[:] = values

    def broadcast_object_list(values, src):
        values[:] = exchange(list(values))[src]

    def broadcast(tensor, src):
        tensor.copy_(exchange(tensor.clone())[src])

    def run(rank):
        here.rank = rank
        try:
            return function(rank)
        except Exception:
            barrier.abort()  # the others wait for nothing
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(world) as threads:
        for name, fake in {"is_initialized": lambda: True, "get_rank": lambda: here.rank,
                           "get_world_size": lambda: world, "all_reduce": all_reduce,
                           "all_gather_object": all_gather_object, "gather_object": gather_object,
                           "broadcast": broadcast, "broadcast_object_list": broadcast_object_list}.items():
            patch.setattr(dist, name, fake)
        return list(threads.map(run, range(world)))


def interrupt(config, after):
    """Trains, and pulls the plug in the epoch that follows `after` whole ones, when it has taken its steps."""
    train_epoch = loop.train_epoch

    def power_cut(state, task, loader, epoch, *arguments):
        yield from train_epoch(state, task, loader, epoch, *arguments)
        if epoch == after:
            raise InterruptedError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_epoch", power_cut)
        with pytest.raises(InterruptedError, match="power cut"):
            train(config)


def assert_resumes_bit_identically(config, folder, after=1):
    """A run that was interrupted after so many epochs and resumed ends as one that was not."""
    whole, cut = (replace(config, out=str(folder / name)) for name in ("whole", "cut"))
    train(replace(whole))  # copies: the loop fills in num_classes
    interrupt(replace(cut), after)
    assert checkpoint(cut.out)["epoch"] == after
    train(cut, resume=True)
    for name in ("model", "ema", "optimizer", "scaler", "epoch"):
        assert_same(checkpoint(whole.out)[name], checkpoint(cut.out)[name])
    assert [repeatable(row) for row in rows(whole.out)] == [repeatable(row) for row in rows(cut.out)]


def repeatable(row):
    """A line of the log without what depends on the machine."""
    of_machine = ("images_per_s", "waiting", "evaluation_s", "saving_s", "memory")
    return {name: str(value) for name, value in row.items() if name not in of_machine}  # NaN is NaN


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
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for pair in zip(first, second):
            assert_same(*pair)
    else:
        assert first == second
