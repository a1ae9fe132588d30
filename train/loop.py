"""The training loop: one run, from a Config to checkpoints, a log and curves."""
import contextlib
import math
import time
from collections import deque

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import kernels
from models import create_model, load_weights
from train import classification, data, detection, segmentation
from train.config import model_overrides, refuse_other, to_dict
from train.device import autocast, join_ranks, leave_ranks, moved, peak_memory, precision
from train.run_folder import RunFolder

# family of architectures -> module with METRICS, datasets(config), loss(run, batch, rng), evaluate(model, loader, device, amp)
TASKS = {"swin": classification, "volo": classification, "upernet": segmentation, "mask": detection, "cascade": detection}


def train(config, resume=None, notes=()):
    """Trains as `config` says, alone or as one rank under torchrun, and returns the history: one dict per epoch.

    resume: None, True (the newest run of this name) or a path to a run's folder or checkpoint. notes: lines to print at the start.

    A run on CPU is a function of its Config: two of them, or an interrupted and resumed one, end bit-identical. For this every
    epoch starts its generators from (seed, epoch, rank), and a checkpoint is written when it ends. Other numbers of ranks see the same
    images in the same steps; only what is drawn per batch (mixup, cutmix, stochastic depth) differs between them.

    Raises ValueError or FileNotFoundError for what the user can mend, FloatingPointError when the loss is no longer finite.
    """
    rank, world, device = join_ranks(config.device)
    try:
        run = Run(config, resume, notes, rank, world, device)
        for epoch in range(run.first_epoch, config.epochs):
            run.train_epoch(epoch)
            run.close_epoch(epoch)
        run.bar.close()
        return run.history
    finally:
        leave_ranks()


class Run:
    """All that one run consists of; train() says in which order its methods are called."""

    def __init__(self, config, resume, notes, rank, world, device):
        self.task = TASKS.get(config.model.split("_")[0], classification)
        training, validation, self.classes = self.task.datasets(config)
        config.num_classes = config.num_classes or len(self.classes)
        check_fit(config, len(training), len(self.classes), world)
        self.config, self.rank, self.world, self.device = config, rank, world, device

        torch.manual_seed(config.seed)
        self.model = create_model(config.model, attn=config.attn, num_classes=config.num_classes, img_size=config.img_size,
                                  **model_overrides(config))
        if (config.mix_token or config.token_labels) and not hasattr(self.model, "token_grid"):
            raise ValueError(f"mix_token and token_labels are for models with logits for every token, as VOLO; {config.model} has none")
        if config.weights and not resume:
            load_weights(self.model, config.weights, classifier=not config.fresh_head)
        # On GPUs channels come last in memory, where attention over (B, H, W, C) wants them.
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        if world > 1 and device.type == "cuda" and self.task is not classification:  # images of a rank are too few for statistics
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(device, memory_format=self.layout)
        groups = decay_groups(self.model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision(device, config.amp) == "fp16")

        self.folder = RunFolder.open(config, resume, rank, world, self.task.METRICS)
        self.first_epoch, self.history = 0, []
        if resume:
            self.restore(self.folder.load())
        workers = config.workers if config.workers is not None else data.default_workers(config)
        share = config.batch_size // config.accumulate // world  # images of one forward pass
        self.loader = data.training_loader(training, config, rank, world, workers)
        self.validation_loader = self.task.validation_loader(validation, share, rank, world, workers)
        self.steps_per_epoch = len(self.loader) // config.accumulate
        if rank == 0:
            self.folder.announce(config, notes, self.model, len(training), len(validation), world, device, self.first_epoch)

        self.tune_kernels(share)
        self.runner = torch.compile(self.model) if config.compile else self.model
        if world > 1:
            self.runner = DistributedDataParallel(self.runner, device_ids=[device.index] if device.type == "cuda" else None)
        self.recent = deque(maxlen=8)  # losses, for the message when one is not finite
        self.bar = Progress(config.epochs * self.steps_per_epoch, self.first_epoch * self.steps_per_epoch, config.batch_size, rank)

    def restore(self, checkpoint):
        refuse_other(self.config, checkpoint["config"])
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(checkpoint["ema"])
            self.ema.n_averaged.fill_(1)  # not 0: the next update has to average, not to copy
        self.first_epoch, self.history = checkpoint["epoch"], checkpoint["history"]

    def tune_kernels(self, share):
        """Lets the kernels choose their configurations before the first step, on rank 0 alone; the others take over its choices.

        Ranks that tuned apart, in the middle of a step, could wait for each other for ever. The CPU has nothing to tune.
        """
        if self.device.type != "cuda":
            return
        if self.rank == 0:
            images = torch.zeros(share, 3, self.config.img_size, self.config.img_size, device=self.device)
            buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]  # statistics of batch norm
            with torch.random.fork_rng(devices=[self.device]):
                for training in (True, False):
                    self.model.train(training)
                    with autocast(self.device, self.config.amp), torch.set_grad_enabled(training):
                        out = getattr(self.model, "backbone", self.model)(images.to(memory_format=self.layout))
                    if training:
                        sum(part.float().mean() for part in (out if isinstance(out, tuple) else (out,))).backward()
            self.model.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.copy_(before)
        if self.world > 1:
            table = [kernels.tuned() if self.rank == 0 else None]
            dist.broadcast_object_list(table, src=0, device=self.device)
            kernels.set_tuned(table[0])

    def train_epoch(self, epoch):
        config = self.config
        torch.manual_seed(data.seed_of(config.seed, epoch, self.rank))
        self.loader.batch_sampler.epoch = epoch
        self.model.train()
        self.losses, self.began, loss = [], time.perf_counter(), 0.0
        for i, batch in enumerate(self.loader):
            last_pass = (i + 1) % config.accumulate == 0
            rng = np.random.default_rng((config.seed, epoch, i, self.rank))
            loss = loss + self.backward(batch, rng, last_pass)
            if not last_pass:
                continue
            step = epoch * self.steps_per_epoch + i // config.accumulate
            lr = learning_rate(step, self.steps_per_epoch, config)
            self.update(lr)

            if self.world > 1:
                dist.all_reduce(loss)  # all ranks see the same loss, so that all stop together
            self.losses.append(float(loss) / self.world)
            self.recent.append(self.losses[-1])
            if not math.isfinite(self.losses[-1]):
                last = ", ".join(f"{value:.4g}" for value in self.recent)
                raise FloatingPointError(f"the loss of step {step} (epoch {epoch + 1}, lr {lr:.3g}) is {self.losses[-1]}; stopped. The "
                                         f"last losses: {last}. {self.folder.path} keeps the last finished epoch; a smaller --lr, a longer "
                                         "--warmup-epochs or --amp none may help")
            self.folder.log(step=step, epoch=epoch, loss=self.losses[-1], lr=lr)
            self.bar.update(self.losses[-1], lr)
            loss = 0.0

    def backward(self, batch, rng, last_pass):
        """Adds the gradients of one pass -> its part of the step's loss. Ranks exchange gradients in the last pass alone."""
        batch = moved(batch, self.device)
        batch[0] = batch[0].to(memory_format=self.layout)
        with contextlib.nullcontext() if last_pass or self.world == 1 else self.runner.no_sync():
            loss = self.task.loss(self, batch, rng) / self.config.accumulate
            self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self, lr):
        """One step of AdamW, and of the moving average."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update_parameters(self.model)

    def close_epoch(self, epoch):
        """Evaluates, logs, and writes last.pt and, if this is the best epoch so far, best.pt."""
        rate = self.steps_per_epoch * self.config.batch_size / (time.perf_counter() - self.began)
        for buffer in self.model.buffers() if self.world > 1 else ():  # statistics of batch norm: those that will be saved
            dist.broadcast(buffer, 0)
        result = self.task.evaluate(self.ema.module if self.ema else self.model, self.validation_loader, self.device, self.config.amp)
        chosen = next(iter(self.task.METRICS))
        best = not result[chosen] <= max((row[chosen] for row in self.history), default=-1.0)  # so NaN, of nothing to find, is written, too
        val_loss = {"val_loss": result["loss"]} if "loss" in result else {}
        self.history.append({"epoch": epoch + 1, "train_loss": sum(self.losses) / len(self.losses), **val_loss,
                             **{metric: result[metric] for metric in self.task.METRICS}, "images_per_s": rate, "memory": peak_memory(self.device)})
        self.folder.log(**self.history[-1])
        self.folder.save({"model": self.model.state_dict(), "ema": self.ema.module.state_dict() if self.ema else None,
                          "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "epoch": epoch + 1,
                          "config": to_dict(self.config), "classes": self.classes, "history": self.history}, best)
        self.bar.epoch(self.history[-1], self.config.epochs, self.task.METRICS)


def check_fit(config, images, classes, world):
    """Raises ValueError when the data, the batches and the ranks of a run do not fit together."""
    if config.batch_size % (config.accumulate * world):
        raise ValueError(f"batch_size = {config.batch_size} does not split into {config.accumulate} accumulated passes on {world} ranks; "
                         f"expected a multiple of {config.accumulate * world}")
    if images < config.batch_size:
        raise ValueError(f"batch_size = {config.batch_size} is more than the {images} training images; use --batch-size {images} or less")
    if config.num_classes < classes:
        raise ValueError(f"num_classes = {config.num_classes}, but the data has {classes}; expected at least as many")


def decay_groups(model, weight_decay):
    """AdamW's groups: weights that decay, and those that do not.

    Not decayed is what has fewer than two axes (norms, biases, layer scales), the relative position bias tables, position embeddings and
    class tokens. The ghost head decays, as in the published run. There, the bias tables of the last stage decayed, too; Swin's do not.
    """
    undecayed = ("relative_position_bias_table", "pos_embed", "cls_token")
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    spared = [parameter for name, parameter in parameters if parameter.ndim < 2 or name.endswith(undecayed)]
    ids = {id(parameter) for parameter in spared}
    return [{"params": [parameter for _, parameter in parameters if id(parameter) not in ids], "weight_decay": weight_decay},
            {"params": spared, "weight_decay": 0.0}]


def learning_rate(step, steps_per_epoch, config):
    """Linear from warmup_lr to lr over the warm-up, then half a cosine down to min_lr at the last step.

    The linear schedule falls from lr at the first step to min_lr after the last, the steps are a tenth after each milestone, and the
    warm-up, a factor, lies over both.
    """
    warmup, last = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch - 1
    if config.schedule != "cosine":
        falling = config.min_lr + (config.lr - config.min_lr) * (1 - step / (last + 1))
        if config.schedule == "steps":
            falling = config.lr / 10 ** sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        start = config.warmup_lr / config.lr if config.lr else 0
        return falling * (start + (1 - start) * step / warmup) if step < warmup else falling
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
    done = (step - warmup) / max(1, last - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


class Progress:
    """A tqdm bar on a terminal; a line now and then where the output is a file or a pipe."""

    def __init__(self, steps, done, batch_size, rank):
        self.quiet, self.batch_size = rank != 0, batch_size
        self.bar = tqdm(total=steps * batch_size, initial=done * batch_size, unit="img", unit_scale=True, smoothing=0.05,
                        dynamic_ncols=True, disable=True if self.quiet else None)  # None: unless it writes to a terminal
        self.total, self.done, self.first = steps, done, done
        self.began = self.spoke = time.perf_counter()

    def update(self, loss, lr):
        self.done += 1
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}", refresh=False)
        self.bar.update(self.batch_size)
        now = time.perf_counter()
        if self.bar.disable and not self.quiet and now - self.spoke > 10:
            rate = (self.done - self.first) / (now - self.began)  # steps per second
            left = round((self.total - self.done) / rate)
            print(f"step {self.done}/{self.total}  loss {loss:.3f}  lr {lr:.1e}  {rate * self.batch_size:.0f} images/s  "
                  f"{left // 60}:{left % 60:02d} left", flush=True)
            self.spoke = now

    def epoch(self, row, epochs, metrics):
        if not self.quiet:
            reached = "  ".join(f"{name} {row[metric]:.2f}" for metric, name in metrics.items())
            val_loss = f"val loss {row['val_loss']:.3f}  " if "val_loss" in row else ""
            tqdm.write(f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  {val_loss}{reached}  {row['images_per_s']:.0f} images/s")

    def close(self):
        self.bar.close()
