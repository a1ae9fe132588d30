"""All that training changes: the model, its moving average, the optimiser, the scaler. What last.pt holds."""
import copy
import inspect

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models import create_model, load_weights
from train.config import model_overrides, refuse_other, refuse_other_classes, task_of, to_dict
from train.device import memory_format, precision
from train.distributed import broadcast_buffers
from train.schedule import decay_groups


class TrainingState:
    """Built anew from a Config, with --weights where they are given, or with the state of a checkpoint by load().

    model: the plain model. forward: the same, compiled and with gradients averaged over ranks as the Config says; made
    by wrap(). optimizer: AdamW. scaler: of the loss, for fp16. ema: moving average of the weights, or None. epoch: how
    many are finished, trained and evaluated; history: a dict for each of them. step: how many are made, of all epochs
    together; losses: of those of the epoch that is not finished; seconds: that these took, waiting: of them for data.
    """

    def __init__(self, config, world, device, fresh=True):
        torch.manual_seed(config.seed)
        self.config, self.world, self.device = config, world, device
        self.model = create_model(config.model, attn=config.attn, num_classes=config.num_classes,
                                  img_size=config.img_size, **model_overrides(config))
        if (config.mix_token or config.token_labels) and not hasattr(self.model, "token_grid"):
            raise ValueError(f"mix_token and token_labels are for models with logits for every token, as VOLO; "
                             f"{config.model} has none")
        if config.weights and fresh:
            self._start_from(config)
        if world > 1 and device.type == "cuda" and task_of(config.model) != "classification":
            # The images of a rank are too few for statistics of their own.
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(device, memory_format=memory_format(device))
        self.forward = self.model
        groups = decay_groups(self.model, config)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision(device, config.amp) == "fp16")
        self.ema = None
        if config.ema:
            self.ema = copy.deepcopy(self.model)
        self.epoch, self.history = 0, []
        self.step, self.losses, self.seconds, self.waiting = 0, [], 0.0, 0.0

    def _start_from(self, config):
        try:
            load_weights(self.model, config.weights, classifier=not config.fresh_head)
        except ValueError as error:
            try:
                load_weights(self.model, config.weights, classifier=False)
            except ValueError:
                raise error from None
            raise ValueError(f"--weights {config.weights}: all of it fits but the classifier, which is not for the "
                             f"{config.num_classes} classes of this run; --fresh-head starts with a new one") from error

    def wrap(self):
        """torch.compile and DistributedDataParallel, last of all: they keep what they have seen of the model."""
        self.forward = self.compiled() if self.config.compile else self.model
        if self.world > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            # A detector's graph follows what it finds.
            static = task_of(self.config.model) != "detection" and self.config.accumulate == 1
            # Ranks share what batch norm counted at the end of an epoch. torch renamed the option in 2.14.
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.forward = DistributedDataParallel(self.forward, device_ids=device_ids, gradient_as_bucket_view=True,
                                                   static_graph=static, **{buffers: False})
            if self.config.grad_exchange == "bf16":
                self.forward.register_comm_hook(None, bf16_compress_hook)

    def compiled(self):
        """The model as one graph, made once: all batches of a run are of one shape, and what is evaluated is not
        compiled. Of a detector its backbone alone, in place, for images of any size: how much there is to compute after
        it depends on what it finds. With batch norm over all ranks there may be several graphs."""
        if task_of(self.config.model) == "detection":
            self.model.backbone.compile(fullgraph=True, dynamic=True)
            return self.model
        over_ranks = any(isinstance(module, torch.nn.SyncBatchNorm) for module in self.model.modules())
        return torch.compile(self.model, fullgraph=not over_ranks)

    def unwrap(self):
        """Drops what holds on to the group of ranks, which must not outlive it: a group whose last reference goes after
        destroy_process_group() waits for a thread that waits for Python."""
        self.forward = self.model

    @property
    def evaluated(self):
        """The model whose scores count: the moving average where there is one."""
        return self.ema or self.model

    def share_buffers(self):
        """Gives all ranks rank 0's statistics of batch norm: what is evaluated is what is saved."""
        broadcast_buffers(self.model)
        if self.ema:
            broadcast_buffers(self.ema)

    def update_ema(self):
        """One step of the average. torch's AveragedModel would wait for the device at each parameter."""
        if self.ema:
            average = get_ema_multi_avg_fn(self.config.ema)
            average([*self.ema.parameters()], [*self.model.parameters()], None)
            for ours, theirs in zip(self.ema.buffers(), self.model.buffers()):
                ours.copy_(theirs)

    def checkpoint(self, classes):
        """A dict of plain types and tensors. classes: their names. All that the rest of the run depends on: the random
        numbers of a step follow from its number."""
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "epoch": self.epoch,
                "config": to_dict(self.config), "classes": classes, "history": self.history,
                "step": self.step, "losses": self.losses, "seconds": self.seconds,
                "waiting": self.waiting}

    def load(self, checkpoint, classes, steps):
        """classes: names of those in the data; steps: of an epoch -> notes. Raises ValueError when the checkpoint is of
        a run that was configured otherwise, or had other classes or another number of steps in an epoch."""
        notes = refuse_other(self.config, checkpoint["config"])
        refuse_other_classes(checkpoint["classes"], classes, self.config.data or "the rendered scenes")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape[2:] == (1, 1) and parameter.ndim == 2:  # of when ELSA's projections were convolutions
                    moments[name] = value.flatten(1)
        self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema:
            self.ema.load_state_dict(checkpoint["ema"])
        self.epoch, self.history = checkpoint["epoch"], checkpoint["history"]
        self.step = checkpoint.get("step", self.epoch * steps)  # older versions saved whole epochs alone
        self.losses, self.seconds = checkpoint.get("losses", []), checkpoint.get("seconds", 0.0)
        self.waiting = checkpoint.get("waiting", 0.0)
        finished = min(self.epoch * steps, self.config.max_steps or self.epoch * steps)
        if self.step != finished + len(self.losses) or len(self.losses) > steps:
            raise ValueError(f"--resume: the checkpoint is of step {self.step}, after {self.epoch} epochs and "
                             f"{len(self.losses)} steps of the next one, but an epoch has {steps} steps here; expected "
                             "the training images, or with fill_last the ranks, of the run. A new one can start from "
                             "its weights: --weights")
        return notes
