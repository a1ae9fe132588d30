"""The published numbers in tests/golden, the weights they were computed with, and how closely ours must agree."""
import functools
import json
import pathlib
import re
import zlib

import numpy as np
import torch

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Of detectors: the first pattern in a key is what its weights were multiplied by, so that detections of every size
# remain.
GAINS = [
    (r"neck\.fpn_convs\.[01]\.", 0.35),
    (r"neck\.fpn_convs\.3\.", 2.5),
    (r"rpn_head\.rpn_conv\.", 1.5),
    (r"rpn_head\.rpn_reg\.", 0.6),
    (r"roi_head\.bbox_head\..*shared_(fcs|convs)\.", 1.5),
    (r"roi_head\.bbox_head\..*fc_cls\.", 3.0),
    (r"roi_head\.mask_head\..*convs\.", 1.5),
    (r"roi_head\.mask_head\..*upsample\.", 2.0),
    (r"roi_head\.mask_head\..*conv_logits\.", 2.0),
]


def assert_close(name, reference, result, ratio):
    """The largest difference, in units of the reference's largest entry, is at most `ratio`."""
    assert reference.shape == result.shape, f"{name}: {tuple(result.shape)} instead of {tuple(reference.shape)}"
    error = (reference - result).abs().max() / reference.abs().max().clamp_min(1e-30)
    assert error <= ratio, f"{name}: off by {error:.2e} of its largest entry, allowed {ratio:.0e}"  # also fails on NaN


@functools.cache
def published_units():
    """Inputs and outputs of the published detectors' parts, as tensors by their names."""
    with np.load(GOLDEN / "det_units.npz") as file:
        return {key: torch.tensor(value) for key, value in file.items()}


@functools.cache
def published_state(name):
    """A state dict whose entries follow from their keys and shapes, by the rule of the golden numbers."""
    entries = json.loads((GOLDEN / f"state_{name}.json").read_text())
    return {key: published_entry(key, shape, dtype) for key, shape, dtype in entries}


def published_entry(key, shape, dtype):
    if not dtype.startswith("float"):
        return torch.zeros(shape, dtype=getattr(torch, dtype))
    a = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        a = 1 + 0.1 * abs(a)
    elif key.endswith("ghost_head"):
        a = 0.02 * a
    elif key.endswith((".rb", "relative_position_bias_table", "pos_embed", "cls_token")):
        a = 0.1 * a
    elif a.ndim >= 2:
        gain = next((gain for pattern, gain in GAINS if re.search(pattern, key)), 1.0)
        a = a * np.float32(gain / np.sqrt(np.prod(shape[1:])))
    else:
        a = 1 + 0.1 * a if key.endswith(".weight") else 0.1 * a
    if key.endswith("fc_cls.bias"):
        a[-1] += 7.5  # of the background
    return torch.tensor(a, dtype=torch.float32)
