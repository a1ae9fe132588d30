"""What both operators ask of their arguments, and how they say what does not fit; their dtype under autocast."""
import math

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def under_autocast(*tensors):
    """The tensors in autocast's dtype if it is on for the first one's device; float64 stays, and what is no tensor.

    So what has one dtype without autocast has one dtype under it, whatever made it.
    """
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in FLOATS[:3] else x for x in tensors]


def whole_numbers(**numbers):
    """Each at least 1; of kernel_size also odd."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, expected an integer")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
        if name == "kernel_size" and value % 2 == 0:
            raise ValueError(f"kernel_size: got {value}, expected an odd number, so that the window has a centre; "
                             f"try {value + 1}")


def finite_numbers(**numbers):
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: got {value!r}, expected a number")
        if not abs(value) < float("inf"):
            raise ValueError(f"{name}: got {value}, expected a finite number")


def same_kind(allowed, **tensors):
    """Each of the first one's device, and of its dtype; of the names in `allowed` float32 will do, too."""
    lead, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
        dtypes = FLOATS if name == lead else dict.fromkeys((first.dtype, *[torch.float32] * (name in allowed)))
        if x.dtype not in dtypes:
            beside = "" if name == lead else f" beside {lead} of {first.dtype}"
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {' or '.join(map(str, dtypes))}{beside}; convert "
                            f"it with .to({torch.float32 if name == lead else first.dtype})")
        if x.device != first.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, expected {lead}'s device {first.device}; "
                             f"move it with .to({str(first.device)!r})")


def sample_fits(name, x, at_least=0):
    """A sample of x, and of the results that have its shape, fewer than 2**31 elements from its first to its last.

    at_least: how many the kernels make of it.
    """
    if x.device.type == "cpu":
        return
    span = sum((size - 1) * abs(stride) for size, stride in zip(x.shape[1:], x.stride()[1:]))
    if max(span, math.prod(x.shape[1:]), at_least) >= 2 ** 31:  # an expanded tensor's span is less than its size
        raise ValueError(f"{name}: got {tuple(x.shape[1:])} a sample, expected fewer than 2**31 elements from a "
                         "sample's first to its last, since the kernels' offsets inside a sample are 32-bit; "
                         "split the image")
