"""The training loop: one run, from a Config to checkpoints, a log and curves.

train_epoch() is the whole of it; what it uses lives beside it: state.py (model, optimiser, moving average), schedule.py
(learning rate), distributed.py (ranks), run_folder.py (what is written), progress.py (what is shown).
"""
import contextlib
import itertools
import math
import time

import numpy as np
import torch

from train import data
from train.bad_images import BadImages, Replacing, allowed
from train.device import peak_memory, to_device
from train.distributed import broadcast_buffers, join_ranks, leave_ranks, mean_over_ranks, tune_kernels
from train.progress import Progress
from train.run_folder import RunFolder
from train.schedule import learning_rate, total_steps
from train.state import TrainingState


def train(config, task, evaluation, resume=None, notes=()):
    """Trains as `config` says, alone or as one rank under torchrun, and returns the history: one dict per epoch.

    task: module with datasets(config) and loss(model, batch, config, rng), as train.classification. evaluation: module
    with METRICS, loader(dataset, batch_size, rank, world, workers) and evaluate(model, loader, device, amp), as
    eval.imagenet; the first of its METRICS chooses the best epoch. resume: None, True (the newest run of this name) or
    a path to a run's folder or checkpoint. notes: lines to print at the start.

    A run on CPU is a function of its Config: two of them, or an interrupted and resumed one, end bit-identical. For
    this every epoch starts its generators from (seed, epoch, rank), and a checkpoint is written when it ends. Other
    numbers of ranks see the same images in the same steps; only what is drawn per batch (mixup, cutmix, erasing,
    stochastic depth) differs between them.

    Raises ValueError or FileNotFoundError for what the user can mend, FloatingPointError when the loss is no longer
    finite.
    """
    rank, world, device = join_ranks(config.device)
    try:
        training, validation, classes = task.datasets(config)
        training = Replacing(training, allowed(config.bad_images, len(training)))
        config.num_classes = config.num_classes or len(classes)
        check_fit(config, len(training), len(classes), world)
        state = TrainingState(config, world, device, fresh=not resume)
        folder = RunFolder.open(config, resume, rank, evaluation.METRICS)
        if resume:
            state.load(folder.load())
        per_rank = config.batch_size // config.accumulate // world  # images of one forward pass
        loader = BadImages(data.training_loader(training, config, rank, world), folder.path, rank)
        val_loader = evaluation.loader(validation, per_rank, rank, world, data.num_workers(config))
        if rank == 0:
            folder.announce(config, notes, state.model, len(training), len(validation), world, device, state.epoch)
        tune_kernels(state.model, per_rank, config.img_size, config.amp, rank, device)
        state.wrap()

        steps = len(loader) // config.accumulate  # of an epoch
        total = total_steps(steps, config)
        progress = Progress(total, state.epoch * steps, config.batch_size, rank)
        for epoch in range(state.epoch, math.ceil(total / steps)):
            start = time.perf_counter()
            losses = train_epoch(state, task, loader, epoch, rank, folder, progress)
            loader.share()
            rate = len(losses) * config.batch_size / (time.perf_counter() - start)
            broadcast_buffers(state.model)
            result = evaluation.evaluate(state.evaluated, val_loader, device, config.amp)
            close_epoch(state, folder, result, evaluation.METRICS, classes, losses, rate)
            progress.epoch(state.history[-1], config.epochs, evaluation.METRICS)
        progress.close()
        progress.say(loader.report())
        return state.history
    finally:
        leave_ranks()


def train_epoch(state, task, loader, epoch, rank, folder, progress):
    """One pass over the training images -> the loss of every step."""
    config, model, optimizer, scaler = state.config, state.forward, state.optimizer, state.scaler
    steps = len(loader) // config.accumulate
    torch.manual_seed(data.seed_of(config.seed, epoch, rank))
    loader.batch_sampler.epoch = epoch
    state.model.train()
    batches, losses = iter(loader), []

    for step in range(epoch * steps, min((epoch + 1) * steps, total_steps(steps, config))):
        lr = learning_rate(step, steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss = 0.0
        first = (step - epoch * steps) * config.accumulate  # pass of this step in the epoch
        for i, batch in enumerate(itertools.islice(batches, config.accumulate), first):
            rng = np.random.default_rng((config.seed, epoch, i, rank))
            last_pass = (i + 1) % config.accumulate == 0
            # Ranks exchange gradients in the last pass alone.
            with contextlib.nullcontext() if last_pass or state.world == 1 else model.no_sync():
                part = task.loss(model, to_device(batch, state.device), config, rng) / config.accumulate
                scaler.scale(part).backward()
            loss = loss + part.detach()

        if config.clip_grad:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state.update_ema()

        losses.append(mean_over_ranks(loss))  # all ranks see the same loss, so that all stop together
        state.recent_losses.append(losses[-1])
        check_finite(state.recent_losses, step, epoch, lr, folder)
        folder.log(step=step, epoch=epoch, loss=losses[-1], lr=lr)
        progress.step(losses[-1], lr)
    return losses


def close_epoch(state, folder, result, metrics, classes, losses, rate):
    """Adds an epoch to the history and the log, and writes last.pt and, if this is the best epoch so far, best.pt."""
    chosen = next(iter(metrics))
    # NaN, of nothing to find, is written, too.
    best = not result[chosen] <= max((row[chosen] for row in state.history), default=-1.0)
    best = best or state.config.select == "last"
    state.epoch += 1
    row = {"epoch": state.epoch, "train_loss": sum(losses) / len(losses)}
    if "loss" in result:
        row["val_loss"] = result["loss"]
    row |= {metric: result[metric] for metric in metrics}
    row |= {"images_per_s": rate, "memory": peak_memory(state.device)}
    state.history.append(row)
    folder.log(**row)
    folder.save(state.checkpoint(classes), best)


def check_fit(config, images, classes, world):
    """Raises ValueError when the data, the batches and the ranks of a run do not fit together."""
    if config.batch_size % (config.accumulate * world):
        raise ValueError(f"batch_size = {config.batch_size} does not split into {config.accumulate} accumulated passes "
                         f"on {world} ranks; expected a multiple of {config.accumulate * world}")
    if images < config.batch_size:
        raise ValueError(f"batch_size = {config.batch_size} is more than the {images} training images; use "
                         f"--batch-size {images} or less")
    if config.num_classes < classes:
        raise ValueError(f"num_classes = {config.num_classes}, but the data has {classes}; expected at least as many")


def check_finite(losses, step, epoch, lr, folder):
    """Raises FloatingPointError when the last of `losses`, of the latest steps, is not a finite number."""
    if not math.isfinite(losses[-1]):
        last = ", ".join(f"{value:.4g}" for value in losses)
        raise FloatingPointError(f"the loss of step {step} (epoch {epoch + 1}, lr {lr:.3g}) is {losses[-1]}; stopped. "
                                 f"The last losses: {last}. {folder.path} keeps the last finished epoch; a smaller "
                                 "--lr, a longer --warmup-epochs or --amp none may help")
