"""Which path a call takes, the Triton kernels or torch: decided here and nowhere else.

The kernels are imported on their first use: Triton has no packages for macOS and Windows, where the CPU path must work.
"""
import importlib.util
import os

import torch

from kernels import cpu

HAS_TRITON = importlib.util.find_spec("triton") is not None
MAX_GROUP_WIDTH = 128  # channels of a group in the convolution's kernels, whose tiles have no more columns


def uses_triton(x):
    """On CUDA always, on a CPU if TRITON_INTERPRET=1 asks for Triton's interpreter. Raises ModuleNotFoundError where
    it would be used and is not installed."""
    used = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if used and not HAS_TRITON:
        raise ModuleNotFoundError("triton is not installed, which GPUs and TRITON_INTERPRET=1 need: install it (pip "
                                  "install triton); with TRITON_INTERPRET unset CPUs do without", name="triton")
    return used


def aggregation(v):
    """The module whose forward and backward aggregate v."""
    if not uses_triton(v):
        return cpu
    from kernels import aggregation
    return aggregation


def has_convolution(q, weight):
    """Whether convolution() can take these; torch's own convolution takes what it cannot."""
    return uses_triton(q) and q.dtype != torch.float64 and weight.shape[1] <= MAX_GROUP_WIDTH and q.numel() > 0


def convolution():
    """The module whose forward and backward make the attention maps."""
    from kernels import convolution
    return convolution


def on_device_of(x):
    """A context: Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
