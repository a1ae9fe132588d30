"""Precision, transfer and memory of the device that a process computes on."""
import contextlib
import functools
import sys

import torch

from train.photographs import MEAN, STD


def precision(device, amp):
    """"bf16", "fp16" or "none": what `amp` = "auto" means on this device."""
    return amp if amp != "auto" else "bf16" if device.type == "cuda" else "none"


def autocast(device, amp):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(device, amp))
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def seed_generators(seed, device):
    """torch.manual_seed of the CPU and of `device` alone. That of all kinds of devices takes a third of a millisecond
    where there are none, and keeps a list of what to do should they appear."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def memory_format(device):
    """On GPUs channels come last in memory, where attention over (B, H, W, C) wants them."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def to_device(batch, device):
    """A batch, of tensors in lists, tuples and dicts, on `device`; its images, the first, in memory_format(device).

    Images that come as bytes, (B, H, W, 3) uint8, are normalised there: (B, 3, H, W) float32. Tuples become lists, and
    what is no tensor stays as it is.
    """
    images, *rest = _moved(batch, device)
    if images.dtype == torch.uint8:
        return [normalised(images), *rest]
    return [images.to(memory_format=memory_format(device)), *rest]


def normalised(images):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, in the memory_format of its device. The bits are those of
    photographs.to_tensor."""
    white, mean, std = _constants(images.device)
    images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format(images.device))
    return images.div_(white).sub_(mean).div_(std)


def clear_padding(images, sizes):
    """Zeros, in place, right of and below each of the images (B, 3, H, W), whose sizes are [(h, w), ...]: where bytes
    were padded there is no zero, once they are normalised."""
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, h:] = 0
        image[:, :, w:] = 0


@functools.cache
def _constants(device):
    """Kept, for a copy to the device would be waited for."""
    return [torch.tensor(values, device=device).view(-1, 1, 1) for values in ([255.0], MEAN, STD)]


def _moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    return [_moved(part, device) for part in value] if isinstance(value, (list, tuple)) else value


def peak_memory(device):
    """Bytes: on a GPU the most that tensors took so far, on a CPU that the whole process did; None where the system
    does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
