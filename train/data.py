"""What the data sets of all tasks share: random numbers, rendered scenes, the order of an epoch, loaders.

Nothing here depends on the number of workers or ranks, nor on where a run was interrupted: what happens to a sample is
a function of (seed, epoch, index), the order of an epoch one of (seed, epoch).
"""
import os

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from train import cores, scenes
from train.interruption import outlive_signals

SCENES, VALIDATION_SCENES = 2048, 512  # rendered scenes per epoch, and for validation


def seed_of(*numbers):
    """One 63-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    if max(numbers) < 2 ** 32:
        numbers = np.array(numbers, np.uint32)  # the same seed, sooner
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def with_generator(seeds, function, *arguments):
    """function(*arguments) with torch's global generator seeded; its state is put back: it drives stochastic depth."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed_of(*seeds))
    try:
        return function(*arguments)
    finally:
        torch.set_rng_state(state)


class Scenes(Dataset):
    """Rendered scenes; each task makes samples of its own from them. Every epoch of training draws new ones.

    Keys: (epoch, index) for training, index for validation. Drawing costs far less than training, so nothing is kept,
    and there is nothing to augment.
    """
    max_objects = 2

    def __init__(self, length, size, seed, validation=False):
        self.length, self.size, self.seed, self.validation = length, size, seed, validation

    @classmethod
    def of(cls, config, validation=False):
        length = config.val_limit or VALIDATION_SCENES if validation else config.limit or SCENES
        return cls(length, config.img_size, config.seed, validation)

    def __len__(self):
        return self.length

    @property
    def shapes(self):
        """Groups for validation_loader: one."""
        return np.zeros(self.length, np.int64)

    def draw(self, key):
        epoch, index = (0, key) if self.validation else key
        first = scenes.HELD_OUT if self.validation else epoch * self.length
        return scenes.draw(first + index, self.seed, self.size, self.max_objects)


class BatchSampler:
    """Keys (epoch, index) of one rank: step s takes images s * batch_size on of the epoch's permutation, split among
    ranks.

    Yields one list per backward pass of `epoch`, from pass `first` on; the length is that of the whole epoch. The
    images left over at the end of an epoch are not used in it; with fill_last they are, and first ones again fill the
    batch. groups: a number for each image; what a rank takes in one pass is then of one group, except for a few
    remainders at the end, which fill_last fills with images of their own group.
    """

    def __init__(self, length, batch_size, accumulate, seed, rank, world, groups=None, fill_last=False):
        self.length, self.batch_size, self.accumulate = length, batch_size, accumulate
        self.seed, self.rank, self.groups, self.fill_last = seed, rank, groups, fill_last
        self.per_pass = batch_size // accumulate
        self.per_rank = self.per_pass // world
        self.epoch, self.first = 0, 0  # which is next, and from which pass on

    def __len__(self):
        length = self.length
        if not self.fill_last:
            return length // self.batch_size * self.accumulate
        if self.groups is not None:
            counts = np.unique(self.groups, return_counts=True)[1]
            length = int((-(-counts // self.per_rank) * self.per_rank).sum())
        return -(-length // self.batch_size) * self.accumulate

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.length)
        if self.groups is not None:
            order = group_batches(order, np.asarray(self.groups)[order], self.per_rank, rng, self.fill_last)
        if self.fill_last:
            order = np.resize(order, len(self) * self.per_pass)  # repeats it
        order = order.tolist()
        for start in range(self.first * self.per_pass, len(self) * self.per_pass, self.per_pass):
            first = start + self.rank * self.per_rank
            yield [(self.epoch, index) for index in order[first:first + self.per_rank]]


def group_batches(order, groups, size, rng, fill=False):
    """`order` (n,) so rearranged that each `size` of it are of one group; what of a group is left over comes last, or
    with `fill` is made a batch of `size` with first ones of its group."""
    batches, rest = [], []
    for group in np.unique(groups):
        members = order[groups == group]
        if fill:
            members = np.resize(members, -(-len(members) // size) * size)  # repeats them
        whole = len(members) // size * size
        batches += list(members[:whole].reshape(-1, size))
        rest.append(members[whole:])
    return np.concatenate([batches[i] for i in rng.permutation(len(batches))] + rest)


def training_loader(dataset, config, rank, world):
    """Batches of one rank; dataset.groups and dataset.collate are used where a task has them."""
    sampler = BatchSampler(len(dataset), config.batch_size, config.accumulate, config.seed, rank, world,
                           getattr(dataset, "groups", None), config.fill_last)
    workers = num_workers(config)
    # Workers are forked, though threads run here: a spawned one imports torch anew, which on two busy cores took 20 s
    # to the first batch instead of one, and 390 MB a worker instead of 140.
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=getattr(dataset, "collate", None), num_workers=workers,
                      pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
                      prefetch_factor=config.prefetch if workers else None, worker_init_fn=outlive_signals)


def validation_loader(dataset, batch_size, rank, world, workers, by_shape=False):
    """Every image once over all ranks: rank r takes images r, r + world, ..., so that ranks may differ by one image.

    batch_size: images of one rank. by_shape: a batch is a list of samples as the data set gives them, whose number in
    dataset.shapes is the same; where there may be several, the images are dealt in the order of these numbers.
    """
    own, batches = np.arange(rank, len(dataset), world), dict(batch_size=batch_size)
    if by_shape:
        groups = np.asarray(dataset.shapes if batch_size > 1 else range(len(dataset)))
        own = np.argsort(groups, kind="stable")[own]
        batches = dict(batch_sampler=runs(groups[own], batch_size), collate_fn=list)
    return DataLoader(Subset(dataset, own.tolist()), **batches, num_workers=workers,
                      pin_memory=torch.cuda.is_available() and not by_shape, persistent_workers=workers > 0,
                      worker_init_fn=outlive_signals)


def runs(groups, size):
    """[[place, ...], ...]: all places in `groups` in their order, at most `size` at a time, and those of one group."""
    ends = [*(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    starts = [0, *ends[:-1]]
    return [list(range(first, min(first + size, end)))
            for start, end in zip(starts, ends) for first in range(start, end, size)]


def num_workers(config):
    """As configured; else none for scenes, which draw in a millisecond or two, and for photographs the cores that
    may be used, split among the machine's ranks."""
    if config.workers is not None:
        return config.workers
    return 0 if config.data is None else cores.available() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
