"""Training does what the published training code does, step for step.

tests/golden/training holds a few steps each of it, in float32 and in float64, and what rounding alone does to every
parameter. float64 is the sharp test, but takes minutes: `pytest -m slow tests/test_trajectories.py`.
"""
import functools
import re

import numpy as np
import pytest
import torch

from models.rpn import RPNHead
from train import classification
from train.config import Config
from trajectory import Trajectory, decay_of, golden

# In exact arithmetic these have no gradient: a 1 x 1 convolution and BatchNorm follow a shift.
NOISE = ("backbone.norm0.bias", "backbone.norm1.bias")
KEYS_BIAS = r"layers\.3\.blocks\.\d\.attn\.pre_proj\.bias"  # nor has its last third, of the keys, before a softmax
COMMON = dict(attn="elsa", decay="published", amp="none", device="cpu", drop_path_rate=0.0)
CONFIGS = {
    "elsa_swin_tiny": dict(model="swin_t", num_classes=1000, weight_decay=0.05, clip_grad=5.0, label_smoothing=0.1,
                           mixup=1.0),
    "volo_d1": dict(model="volo_d1", attn="outlook", num_classes=1000, img_size=112, weight_decay=0.05, mix_token=1.0,
                    dense_weight=0.5),
    "upernet_elsa_tiny_160k": dict(model="upernet_swin_t", num_classes=150, weight_decay=0.01,
                                   model_args=dict(dropout=0.0)),
    "mask_elsa_tiny_1x": dict(model="mask_rcnn_swin_t", num_classes=80, weight_decay=0.05,
                              model_args=dict(rpn_samples=10 ** 7, roi_samples=10 ** 7)),
}
LOSSES = {torch.float64: 1e-6, torch.float32: 5e-5}


def config(name):
    return Config(**{**COMMON, **CONFIGS[name]})


@functools.cache
def drawn(name):
    """batch(step) of a trajectory, by the formulas beside the golden numbers."""
    arrays = golden(name)
    r = np.random.RandomState(20260101 + list(CONFIGS).index(name))
    normal = r.standard_normal
    if name == "elsa_swin_tiny":
        images, labels = tensor(normal((4, 4, 3, 224, 224))), torch.tensor(r.randint(0, 1000, (4, 4)))
        return lambda step: (images[step % 4], labels[step % 4])
    if name == "volo_d1":
        images, classes = tensor(normal((3, 4, 3, 112, 112))), r.randint(0, 1000, (3, 4, 50, 5))
        shares = np.exp(normal((3, 4, 50, 5)))
        shares /= shares.sum(-1, keepdims=True)
        targets = np.full((3, 4, 50, 1000), 0.0001)
        np.add.at(targets, (*(axis[..., None] for axis in np.ogrid[:3, :4, :50]), classes), 0.9 * shares)
        targets = tensor(targets)
        return lambda step: (images[step % 3], torch.zeros(4, dtype=torch.int64), targets[step % 3])
    count, batch = (3, 4) if name.startswith("upernet") else (2, 2)
    images = normal((count, batch, 3, 1, 1)) + normal((count, batch, 3, 8, 8)).repeat(16, -1).repeat(16, -2)
    images = tensor(images + 0.5 * normal((count, batch, 3, 128, 128)))
    if name.startswith("upernet"):
        labels = torch.tensor(r.randint(0, 150, (3, 4, 16, 16)).repeat(8, -1).repeat(8, -2))
        labels[..., 40:56, 72:104] = 255
        return lambda step: (images[step % 3], labels[step % 3], [(128, 128)] * len(labels[0]))
    boxes, labels = torch.tensor(arrays["gt_boxes"]), torch.tensor(arrays["gt_labels"])
    masks = np.unpackbits(arrays["gt_masks_packed"], axis=-1).reshape(2, 2, 3, 128, 128)
    masks = torch.tensor(masks.astype(bool))
    targets = [[dict(boxes=boxes[b, i], labels=labels[b, i], masks=masks[b, i]) for i in range(2)] for b in range(2)]
    return lambda step: (images[step % 2], [(128, 128)] * 2, targets[step % 2])


def tensor(array):
    return torch.tensor(array.astype(np.float32))


def train(name, dtype, steps=None):
    """The Trajectory of one of CONFIGS, with what its formulas hand in instead of drawing it."""
    arrays, step = golden(name), iter(range(100))

    def mix(images, *arguments):
        share = (1.0, 0.7, 0.35, 0.9)[next(step) % 4]
        return share * images + (1 - share) * images.flip(0), share

    def draw_swap(rng, alpha, h, w):
        top, left, bottom, right = arrays["boxes"][next(step)]
        swap = torch.zeros(h, w, dtype=torch.bool)
        swap[top:bottom, left:right] = True
        return swap, 1 - swap.sum().item() / swap.numel()

    def proposals(*arguments):
        return [(torch.tensor(boxes, dtype=dtype), None) for boxes in arrays["proposals"][next(step) % 2]]

    with pytest.MonkeyPatch.context() as patch:
        if name == "elsa_swin_tiny":
            patch.setattr(classification, "mix", mix)
        if name == "volo_d1":
            patch.setattr(classification, "draw_swap", draw_swap)
            patch.setattr(classification, "dense_targets",
                          lambda targets, *rest: (targets[:, 0], targets[:, 1:].unflatten(1, (7, 7))))
        if config(name).model.startswith(("mask", "cascade")):
            patch.setattr(RPNHead, "proposals", proposals)
        return Trajectory(name, config(name), drawn(name), dtype, steps)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_steps_and_what_decays(name):
    """In float32, for a few seconds: the second loss is that of weights after an update."""
    steps = 1 if name.startswith("upernet") else 2
    trajectory = train(name, torch.float32, steps)
    assert trajectory.of_losses() < LOSSES[torch.float32]
    assert trajectory.of_grad_norms() < 2e-4
    decay = dict(zip(golden(name)["names"].tolist(), golden(name)["weight_decay"].tolist()))
    ours = {trajectory.places[ours][0]: number for ours, number in decay_of(trajectory.state).items()}
    assert ours == decay


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOSSES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_trajectories_are_the_published_ones(name, dtype):
    trajectory = train(name, dtype)
    print(f"\n{name} | {trajectory.report(NOISE)}")
    exact = dtype == torch.float64
    assert trajectory.of_losses() < (5e-4 if not exact and name.startswith("upernet") else LOSSES[dtype])
    assert not exact or trajectory.of_grad_norms() < 1e-6
    assert trajectory.of_statistics() < 0.05  # published in float32 alone
    found = []
    for parameter, row in trajectory.of_parameters().items():
        limit = 1e-5 if exact else 10 * row["spread"]
        entries = row["entries"][:2] if re.fullmatch(KEYS_BIAS, parameter) else row["entries"]
        if parameter not in NOISE and not (entries.max() < limit and row["moved"] < limit):
            found.append(f"{parameter}: entries {row['entries']}, moved {row['moved']:.1e}, at most {limit:.1e}")
    assert not found, "\n".join(found)
