"""Which path a call takes, the Triton kernels or torch: decided here and nowhere else.

The kernels are imported on their first use: Triton has no packages for macOS and Windows, where the CPU path must work.
"""
import contextlib
import importlib.util
import os

import torch

from . import cpu

HAS_TRITON = importlib.util.find_spec("triton") is not None
MAX_GROUP_WIDTH = 128  # channels of a group in the convolution's kernels, whose tiles have no more columns


def uses_triton(x):
    """On CUDA always; on a CPU if ELSA_BACKEND=triton in the environment says so when an operator is called.

    What runs the kernels is Triton's business: its interpreter, if TRITON_INTERPRET=1 was set when they were imported,
    else its active driver, which for CPU tensors is a stand-in.

    Raises:
        ValueError: ELSA_BACKEND has another value.
        ModuleNotFoundError: Triton would be used and is not installed.
    """
    asked = os.environ.get("ELSA_BACKEND", "")
    if asked not in ("", "triton"):
        raise ValueError(f"ELSA_BACKEND: got {asked!r}, expected triton, which sends CPU tensors through the Triton "
                         "kernels; unset it for the CPU path")
    used = x.is_cuda or asked == "triton"
    if used and not HAS_TRITON:
        raise ModuleNotFoundError("triton is not installed, and tensors on a GPU need it, as do those on a CPU while "
                                  "ELSA_BACKEND=triton is set: install it (pip install triton), or unset ELSA_BACKEND, "
                                  "for a CPU needs torch alone", name="triton")
    return used


def aggregation(v):
    """The module whose forward and backward aggregate v."""
    if not uses_triton(v):
        return cpu
    from . import aggregation
    return aggregation


def has_convolution(q, weight):
    """Whether convolution() can take these; torch's own convolution takes what it cannot."""
    return uses_triton(q) and q.dtype != torch.float64 and weight.shape[1] <= MAX_GROUP_WIDTH and q.numel() > 0


def convolution():
    """The module whose forward and backward make the attention maps."""
    from . import convolution
    return convolution


@contextlib.contextmanager
def on_device_of(x):
    """Inside, x's device is the current one, on which Triton launches, and autocast is off."""
    with torch.cuda.device(x.device if x.is_cuda else -1), without_autocast(x):
        yield


def without_autocast(x):
    """A context in which autocast rounds no sums. meta has none."""
    device = x.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
