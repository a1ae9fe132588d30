"""Which path a call takes, the Triton kernels or torch: decided here and nowhere else.

The kernels are imported on their first use: Triton has no packages for macOS and Windows, where the CPU path must work.
"""
import os

import torch

MAX_GROUP_WIDTH = 128  # channels of a group: the tiles of the convolution's kernels have to fit into shared memory


def interpreted():
    """Whether CPU tensors are to go through the Triton kernels, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(x):
    return x.is_cuda or interpreted()


def aggregation(v):
    """The module whose forward and backward aggregate v."""
    if uses_triton(v):
        from kernels import aggregation as module
    else:
        from kernels import cpu as module
    return module


def has_convolution(q, weight):
    """Whether convolution() can take these; torch's own convolution takes what it cannot."""
    return uses_triton(q) and q.dtype != torch.float64 and weight.shape[1] <= MAX_GROUP_WIDTH and q.numel() > 0


def convolution():
    """The module whose forward and backward make the attention maps."""
    from kernels import convolution as module
    return module


def on_device_of(x):
    """A context: Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
