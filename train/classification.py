"""The task of classification: images and labels, and what is minimised."""
from eval.imagenet import evaluate  # noqa: F401  the loop and the command must count alike
from train.data import datasets, mix, validation_loader  # noqa: F401
from train.device import autocast
from train.losses import mixed_cross_entropy, token_cross_entropy
from train.tokens import dense_targets, draw_swap

METRICS = {"top1": "top-1", "top5": "top-5"}  # per cent; by the first, the best epoch is chosen


def loss(run, batch, rng):
    """Loss of one pass, a scalar. batch: (images, labels), with token labels (images, labels, maps, places). rng: numpy Generator."""
    config = run.config
    images, labels, *label_maps = batch
    images, own = mix(images, config.mixup, config.cutmix, rng)
    inputs = [images]
    if config.mix_token:
        swap, own = draw_swap(rng, config.mix_token, *run.model.token_grid(*images.shape[2:]))
        inputs.append(swap.to(run.device))
    with autocast(run.device, config.amp):
        out = run.runner(*inputs)
    if not isinstance(out, tuple):
        return mixed_cross_entropy(out.float(), labels, own, config.label_smoothing)
    logits, token_logits = (part.float() for part in out)
    targets = dense_targets(*label_maps, labels, *token_logits.shape[1:], config.label_smoothing, config.ground_truth) if label_maps else None
    return token_cross_entropy(logits, token_logits, labels, targets, own, config.label_smoothing, config.dense_weight)
