"""The optimiser's parameter groups and the learning rate of every step."""
import math


def decay_groups(model, weight_decay):
    """AdamW's groups: weights that decay, and those that do not.

    Not decayed is what has fewer than two axes (norms, biases, layer scales), the relative position bias tables,
    position embeddings and class tokens. The ghost head decays, as in the published run. There, the bias tables of the
    last stage decayed, too; Swin's do not.
    """
    no_decay = ("relative_position_bias_table", "pos_embed", "cls_token")
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if parameter.ndim < 2 or name.endswith(no_decay) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


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
