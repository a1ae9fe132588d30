"""train/data.py: the order of images in an epoch, and that a run sees it."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from eval import imagenet
from train import classification, loop
from train.data import BatchSampler, validation_loader
from training import interrupt, tiny


@settings(deadline=None, max_examples=40)
@given(n=st.integers(4, 60), share=st.integers(1, 4), world=st.integers(1, 3), accumulate=st.integers(1, 2),
       seed=st.integers(0, 9))
def test_passes_are_of_one_orientation(n, share, world, accumulate, seed):
    groups = np.random.default_rng(seed).integers(0, 2, n)
    batch_size = share * world * accumulate
    passes = [list(BatchSampler(n, batch_size, accumulate, seed, rank, world, groups)) for rank in range(world)]
    seen = [index for rank in passes for part in rank for _, index in part]
    assert len(seen) == len(set(seen)) == n // batch_size * batch_size
    mixed = sum(len({groups[index] for _, index in part}) > 1 for rank in passes for part in rank)
    assert mixed <= 1  # the remainders of two groups meet in one pass


def epoch_of(sampler, epoch):
    sampler.epoch = epoch
    return [key for batch in sampler for key in batch]


@pytest.mark.parametrize("groups", [None, [0, 1] * 12])
def test_every_epoch_and_every_seed_has_an_order_of_its_own(groups):
    orders = set()
    for seed in (0, 1):
        sampler = BatchSampler(24, 4, 1, seed, 0, 1, groups)
        for epoch in range(3):
            keys = epoch_of(sampler, epoch)
            assert keys == epoch_of(sampler, epoch) and sorted(keys) == [(epoch, index) for index in range(24)]
            orders.add(tuple(index for _, index in keys))
    assert len(orders) == 6 and tuple(range(24)) not in orders


def test_images_left_over_differ_between_epochs():
    sampler = BatchSampler(23, 8, 1, 0, 0, 1)
    left = [set(range(23)) - {index for _, index in epoch_of(sampler, epoch)} for epoch in range(4)]
    assert all(len(images) == 7 for images in left) and len(set().union(*left)) > 12


class Recorder(Dataset):
    """Scenes of classification that note which keys they were asked for."""

    def __init__(self, config):
        self.scenes, self.keys = classification.Scenes.of(config), []

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, key):
        self.keys.append(key)
        return self.scenes[key]


def recorded(config, run):
    """The keys that `run`, given a task, asks for."""
    training = Recorder(config)
    _, validation, classes = classification.datasets(config)
    run(SimpleNamespace(datasets=lambda config: (training, validation, classes), loss=classification.loss))
    return training.keys


def test_a_run_sees_every_epoch_in_an_order_of_its_own(tmp_path):
    config = tiny(out=str(tmp_path / "run"), epochs=3)
    keys = recorded(config, lambda task: loop.train(config, task, imagenet))
    epochs = [keys[start:start + 24] for start in (0, 24, 48)]
    assert len(keys) == 72
    for epoch, seen in enumerate(epochs):
        assert sorted(seen) == [(epoch, index) for index in range(24)]
    assert len({tuple(index for _, index in seen) for seen in epochs}) == 3


def test_a_resumed_run_sees_what_it_would_have_seen(tmp_path):
    config = tiny(out=str(tmp_path / "run"), epochs=2)
    keys = recorded(config, lambda task: loop.train(replace(config, out=str(tmp_path / "whole")), task, imagenet))
    interrupt(replace(config), after=1)
    assert recorded(config, lambda task: loop.train(config, task, imagenet, resume=True)) == keys[24:]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_ranks_share_validation_images_without_padding(world, batch_size):
    images = torch.arange(5)
    shares = [[int(value) for part in validation_loader(images, batch_size, rank, world, 0) for value in part.flatten()]
              for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(deadline=None, max_examples=50)
@given(groups=st.lists(st.integers(0, 3), max_size=20), batch_size=st.integers(1, 5), world=st.integers(1, 4))
def test_batches_for_validation_are_of_one_group(groups, batch_size, world):
    class Images(list):
        shapes = groups

    images = Images(range(len(groups)))
    shares = [list(validation_loader(images, batch_size, rank, world, 0, by_shape=True)) for rank in range(world)]
    for batches in shares:
        of_batch = [{groups[image] for image in batch} for batch in batches]
        assert all(len(kinds) == 1 for kinds in of_batch) and all(len(batch) <= batch_size for batch in batches)
        for kind in range(4):  # no more batches than it takes
            sizes = [len(batch) for batch, kinds in zip(batches, of_batch) if kinds == {kind}]
            assert all(size == batch_size for size in sizes[:-1])
    images = [sum(batches, []) for batches in shares]
    assert sorted(sum(images, [])) == list(range(len(groups)))
    assert max(map(len, images)) - min(map(len, images)) <= 1
    if len({*groups}) == 1 or batch_size == 1:
        assert images == [list(range(rank, len(groups), world)) for rank in range(world)]
