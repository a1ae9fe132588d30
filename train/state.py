"""All that training changes: the model, its moving average, the optimiser, the scaler. What last.pt holds."""
from collections import deque

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import create_model, load_weights
from train.config import model_overrides, refuse_other, task_of, to_dict
from train.device import memory_format, precision
from train.schedule import decay_groups


class TrainingState:
    """Built anew from a Config, with --weights where they are given, or with the state of a checkpoint by load().

    model: the plain model. forward: the same, compiled and with gradients averaged over ranks as the Config says; made
    by wrap(). optimizer: AdamW. scaler: of the loss, for fp16. ema: moving average of the weights, or None. epoch: how
    many are finished; history: a dict for each of them.
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
            load_weights(self.model, config.weights, classifier=not config.fresh_head)
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
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
            self.ema.n_averaged.fill_(1)  # not 0: every update averages, as published; the first would copy
        self.epoch, self.history = 0, []
        self.recent_losses = deque(maxlen=8)  # of steps, for the message when one is not finite

    def wrap(self):
        """torch.compile and DistributedDataParallel, last of all: they keep what they have seen of the model."""
        self.forward = torch.compile(self.model) if self.config.compile else self.model
        if self.world > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=device_ids)

    @property
    def evaluated(self):
        """The model whose scores count: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def update_ema(self):
        if self.ema:
            self.ema.update_parameters(self.model)

    def checkpoint(self, classes):
        """A dict of plain types and tensors. classes: their names."""
        return {"model": self.model.state_dict(), "ema": self.ema.module.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "epoch": self.epoch,
                "config": to_dict(self.config), "classes": classes, "history": self.history}

    def load(self, checkpoint):
        """Raises ValueError when the checkpoint is of a run that was configured otherwise."""
        refuse_other(self.config, checkpoint["config"])
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape[2:] == (1, 1) and parameter.ndim == 2:  # of when ELSA's projections were convolutions
                    moments[name] = value.flatten(1)
        self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(checkpoint["ema"])
        self.epoch, self.history = checkpoint["epoch"], checkpoint["history"]
