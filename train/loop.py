"""The training loop: one run, from a Config to checkpoints, a log and curves.

train_epoch() is the whole of it; what it uses lives beside it: state.py (model, optimiser, moving average), schedule.py
(learning rate), distributed.py (ranks), interruption.py (signals), checkpoint.py and run_folder.py (what is written),
progress.py (what is shown).
"""
import collections
import contextlib
import itertools
import math
import time

import torch

from train import data
from train.bad_images import BadImages, Replacing, allowed
from train.checkpoint import Checkpoints
from train.config import task_of
from train.device import peak_memory, seed_generators, to_device
from train.distributed import agree, gather, join_ranks, leave_ranks, tune_kernels
from train.interruption import Interruption
from train.profiler import start_profiler
from train.progress import Progress
from train.run_folder import RunFolder, best_row, notes_of
from train.schedule import learning_rate, total_steps
from train.state import TrainingState


def train(config, task, evaluation, resume=None, notes=()):
    """Trains as `config` says, alone or as one rank under torchrun, and returns the history: one dict per epoch.

    task: module with datasets(config) and loss(model, batch, config, seed), as train.classification. evaluation: module
    with METRICS, loader(dataset, batch_size, rank, world, workers) and evaluate(model, loader, device, amp), as
    eval.imagenet; the first of its METRICS chooses the best epoch. resume: None, True (the newest run of this name) or
    a path to a run's folder or checkpoint. notes: lines to print at the start.

    A run on CPU is a function of its Config: two of them, or one that was interrupted at any moment and resumed, end
    bit-identical. For this every step starts its generators from (seed, epoch, step, rank). Other numbers of ranks see
    the same images in the same steps; only what is drawn per batch (mixup, cutmix, erasing, stochastic depth) differs
    between them.

    Raises ValueError or FileNotFoundError for what the user can mend, FloatingPointError when the loss is no longer
    finite, SystemExit after a signal, see interruption.py.
    """
    rank, world, device = join_ranks(config.device, config.timeout_minutes)
    with contextlib.ExitStack() as ends:
        ends.push(leave_ranks)
        interruption = ends.enter_context(Interruption(rank, world, device))
        training, validation, classes = task.datasets(config)
        notes = [*notes, *notes_of("training", training), *notes_of("validation", validation)]
        config.num_classes = config.num_classes or len(classes)
        per_rank = config.batch_size // config.accumulate // world  # images of one forward pass
        agree(config, training, validation, classes)
        notes = [*notes, *check_fit(config, len(training), len(classes), world, device)]
        folder = RunFolder.open(config, resume, rank, evaluation.METRICS)
        checkpoints = ends.enter_context(Checkpoints(folder, config.save_minutes))
        state = TrainingState(config, world, device, fresh=not folder.resumes)
        ends.callback(state.unwrap)
        replacing = Replacing(training, allowed(config.bad_images, len(training)))
        loader = data.training_loader(replacing, config, rank, world)
        val_loader = evaluation.loader(validation, per_rank, rank, world, data.num_workers(config))
        steps = len(loader) // config.accumulate  # of an epoch
        total = total_steps(steps, config)
        if folder.resumes:
            checkpoint, said = checkpoints.load(device)
            notes += [*said, *state.load(checkpoint, classes, steps)]
            del checkpoint  # of the model's size several times over
        else:
            notes += folder.make(config, resume)
        loader = BadImages(loader, folder.path, rank)
        ends.callback(folder.close)
        if rank == 0:
            folder.announce(config, notes, state, len(training), len(validation), world, device)
        tune_kernels(state.model, per_rank, config.img_size, config.amp, rank, device)
        state.wrap()

        step_profiler = start_profiler(config.profile if rank == 0 else 0, folder.path, ends)
        progress = Progress(total, state.step, config.batch_size, rank)
        ends.callback(progress.close)
        for epoch in range(state.epoch, math.ceil(total / steps)):
            for steps_read in train_epoch(state, task, loader, epoch, rank, interruption, checkpoints.due):
                for row in steps_read:
                    folder.log("step", **row, **checkpoints.costs())
                    progress.step(row["loss"], row["lr"])
                if interruption.saves:
                    checkpoints.save(state.checkpoint(classes))
                    interruption.due = False
                interruption.check()
                step_profiler()
            loader.share()
            state.share_buffers()
            checkpoints.save(state.checkpoint(classes))  # the epoch is safe, whatever its evaluation meets
            start = time.perf_counter()
            result = evaluation.evaluate(state.evaluated, interruption.watch(val_loader), device, config.amp)
            costs = {"evaluation_s": time.perf_counter() - start, "saving_s": checkpoints.costs_of_epoch()}
            best = close_epoch(state, result, evaluation.METRICS, costs)
            folder.log("epoch", **state.history[-1])
            checkpoints.save(state.checkpoint(classes), best)
            folder.plot()
            progress.epoch(state.history[-1], config.epochs, evaluation.METRICS)
        progress.say([*loader.report(), *folder.ending(config, state.history)])
        return state.history


def train_epoch(state, task, loader, epoch, rank, interruption, due=lambda: False):
    """Makes the steps of an epoch that are not made yet. After each it yields what was read back meanwhile, rows for
    the log: of this step, or on a GPU, for whose results no step waits, of one some steps ago.

    due: function that says whether a checkpoint is due. When it is, and when a signal asks to stop, and after the last
    step, the rows of all steps are yielded, and `state` may be saved.
    """
    config, model, optimizer, scaler = state.config, state.forward, state.optimizer, state.scaler
    steps = len(loader) // config.accumulate
    end = min((epoch + 1) * steps, total_steps(steps, config))
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, (state.step - epoch * steps) * config.accumulate
    state.model.train()
    batches, start = timed(iter(loader), state), time.perf_counter() - state.seconds
    sent = collections.deque()  # of steps whose loss is on its way

    # No state of a generator outlives a step, and so none is saved. 1: other seeds than those of images.
    seeds = [(step, data.seed_of(config.seed, epoch, step, rank, 1)) for step in range(state.step, end)]
    for step, seed in seeds:  # made all at once: between other work each takes three times as long
        lr = learning_rate(step, steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr

        seed_generators(seed, state.device)
        losses = []  # of the passes
        first = (step - epoch * steps) * config.accumulate  # pass of this step in the epoch
        for i, batch in enumerate(itertools.islice(batches, config.accumulate), first):
            last_pass = (i + 1) % config.accumulate == 0
            # Ranks exchange gradients in the last pass alone.
            with contextlib.nullcontext() if last_pass or state.world == 1 else model.no_sync():
                loss = task.loss(model, to_device(batch, state.device), config, (config.seed, epoch, i, rank))
                loss = loss / config.accumulate if config.accumulate > 1 else loss
                scaler.scale(loss).backward()
            losses.append(loss.detach())

        if config.clip_grad:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        for group in optimizer.param_groups:  # zero_grad() also tells the profiler, for longer than this takes
            for parameter in group["params"]:
                parameter.grad = None
        state.update_ema()

        sent.append((interruption.send(sum(losses[1:], losses[0]), due()), step, lr, losses))
        state.step = step + 1
        rows = read_back(sent, 0 if state.step == end else interruption.ahead, state, epoch, interruption, loader)
        state.seconds = time.perf_counter() - start
        yield rows


def timed(batches, state):
    """The batches of an iterator; the seconds spent waiting for them are added to state.waiting."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        state.waiting += time.perf_counter() - start
        if batch is None:
            return
        yield batch


def read_back(sent, keep, state, epoch, interruption, loader):
    """Waits for the losses of steps in the deque `sent`, of all but the last `keep`, or where ranks agree to save, of
    all -> their rows for the log."""
    steps, rows = len(loader) // state.config.accumulate, []
    while len(sent) > (0 if interruption.saves else keep):
        message, step, lr, losses = sent.popleft()
        state.losses.append(interruption.receive(message))
        first = (step - epoch * steps) * state.config.accumulate
        check_finite(state.losses, step, epoch, lr, lambda: names_of(losses, first, loader))
        rows.append({"step": step, "epoch": epoch + 1, "loss": state.losses[-1], "lr": lr})
    return rows


def close_epoch(state, result, metrics, costs):
    """Adds a row to the history -> whether this is the epoch for best.pt, so far. costs: {name: seconds}, for the
    row."""
    state.epoch += 1
    row = {"epoch": state.epoch, "train_loss": sum(state.losses) / len(state.losses)}
    if "loss" in result:
        row["val_loss"] = result["loss"]
    row |= {metric: result[metric] for metric in metrics}
    row |= {"images_per_s": len(state.losses) * state.config.batch_size / state.seconds,
            "waiting": state.waiting / state.seconds, **costs, "memory": peak_memory(state.device)}
    state.history.append(row)
    state.losses, state.seconds, state.waiting = [], 0.0, 0.0
    return best_row(state.history, next(iter(metrics)), state.config.select) is row


def check_fit(config, images, classes, world, device):
    """Raises ValueError when the data, the batches and the ranks of a run do not fit together. -> notes"""
    if config.batch_size % (config.accumulate * world):
        raise ValueError(f"batch_size = {config.batch_size} does not split into {config.accumulate} accumulated passes "
                         f"on {world} ranks; expected a multiple of {config.accumulate * world}")
    if images < config.batch_size:
        raise ValueError(f"batch_size = {config.batch_size} is more than the {images} training images; use "
                         f"--batch-size {images} or less")
    if config.num_classes < classes:
        raise ValueError(f"num_classes = {config.num_classes}, but the data has {classes}; expected at least as many")
    if config.batch_size > config.accumulate * world:
        return []
    task = task_of(config.model)
    if task == "segmentation" and (world == 1 or device.type == "cpu"):  # on GPUs it spans all ranks
        raise ValueError(f"batch_size = {config.batch_size} is one image for each of {config.accumulate} accumulated "
                         f"passes on {world} ranks, of which batch norm has no statistics; expected at least "
                         f"{2 * config.accumulate * world}")
    mixed = [name for name in ("mixup", "cutmix", "mix_token") if task == "classification" and getattr(config, name)]
    return [f"without effect: {', '.join(mixed)}; a pass has one image, and no other to mix it with"] if mixed else []


def check_finite(losses, step, epoch, lr, names):
    """Raises FloatingPointError when the last of `losses`, of the steps of an epoch, is not a finite number.

    names: function that gives the names of the images to blame, to be called by all ranks.
    """
    if math.isfinite(losses[-1]):
        return
    last, blamed = ", ".join(f"{value:.4g}" for value in losses[-8:]), names()
    images = f"It is of {', '.join(blamed[:8])}{f' and {len(blamed) - 8} more' * (len(blamed) > 8)}. " if blamed else ""
    raise FloatingPointError(f"the loss of step {step} (epoch {epoch + 1}, lr {lr:.3g}) is {losses[-1]}; stopped. "
                             f"The last losses: {last}. {images}`--resume` goes on from the last checkpoint; a smaller "
                             "--lr, a longer --warmup-epochs or --amp none may help")


def names_of(losses, first, loader):
    """Names of the images in those passes, from `first` on, whose loss is not finite, of all ranks; none where the data
    set has no names.

    losses: of a step's passes on this rank. The data set's name(index) is used where it has one.
    """
    name, sampler, names = getattr(loader.dataset, "name", None), loader.batch_sampler, []
    for sampler.first, loss in enumerate(losses, first):
        if name and not math.isfinite(loss):
            names += [name(index) for _, index in next(iter(sampler))]
    return gather(names)
