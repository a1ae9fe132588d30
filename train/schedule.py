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


def total_steps(steps_per_epoch, config):
    """Optimiser steps of a whole run."""
    return min(config.epochs * steps_per_epoch, config.max_steps or math.inf)


def learning_rate(step, steps_per_epoch, config):
    """The rate of optimiser step `step`, from 0.

    A linear warm-up from warmup_lr towards lr, then half a cosine down to min_lr, which the last step has, then the
    cool-down at min_lr. The cosine is counted from the end of the warm-up, or with cosine_from "zero", as timm does,
    from epoch 0, so that it takes over below lr. lr_per "epoch": all steps of an epoch have the rate of its first.
    lr_late, as in Microsoft's Swin: the rate of the step before, so that the cosine would end one step after the last.

    The linear schedule falls from lr at the first step to min_lr after the last, the steps are a tenth after each
    milestone, and the warm-up, a factor, lies over both.
    """
    total, warmup = total_steps(steps_per_epoch, config), round(config.warmup_epochs * steps_per_epoch)
    end = total - round(config.cooldown_epochs * steps_per_epoch)
    if config.lr_per == "epoch":
        step = step // steps_per_epoch * steps_per_epoch
    elif config.lr_late:
        step = max(0, step - 1)
    else:
        end = max(1, end - 1)
    if config.schedule != "cosine":
        falling = config.min_lr + (config.lr - config.min_lr) * (1 - step / total)
        if config.schedule == "steps":
            falling = config.lr / 10 ** sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        start = config.warmup_lr / config.lr if config.lr else 0
        return falling * (start + (1 - start) * step / warmup) if step < warmup else falling
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
    start = warmup if config.cosine_from == "warmup" else 0
    done = min(1, (step - start) / max(1, end - start))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2
