"""The optimiser's parameter groups and the learning rate of every step."""
import math

from models.elsa import ELSA
from train.config import task_of

# Ends of the names of what has two axes or more and yet is no weight.
POSITIONS = ("relative_position_bias_table", "pos_embed", "cls_token")
# What the published segmenters and detectors spare: all whose published names contain one of these (or
# absolute_pos_embed, which no model here has).
PUBLISHED = ("norm", "relative_position_bias_table")


def decay_groups(model, config):
    """AdamW's groups: parameters that decay by config.weight_decay, and those that do not, as config.decay says.

    "weights": spared is what has fewer than two axes (norms, biases, layer scales), the relative position bias tables,
    position embeddings and class tokens. The ghost head decays, as in the published run.
    "published": as the published code of the task. Classifiers spare the same, segmenters and detectors what PUBLISHED
    names alone, so that biases and the heads' batch norms decay. Everywhere the tables beside ELSA layers, of the
    windows in the last stage, decay: there they are called `rb`, and no list of exceptions holds that name.
    """
    published = config.decay == "published"
    by_name = published and task_of(config.model) != "classification"
    tables_decay = published and any(isinstance(module, ELSA) for module in model.modules())
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if tables_decay and name.endswith("relative_position_bias_table"):
            kept = False
        elif by_name:
            kept = any(part in name for part in PUBLISHED)
        else:
            kept = parameter.ndim < 2 or name.endswith(POSITIONS)
        if parameter.requires_grad:
            (spared if kept else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]


def learning_rate(step, steps_per_epoch, config):
    """Linear from warmup_lr to lr over the warm-up, then half a cosine down to min_lr at the last step.

    The linear schedule falls from lr at the first step to min_lr after the last, the steps are a tenth after each
    milestone, and the warm-up, a factor, lies over both.
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
