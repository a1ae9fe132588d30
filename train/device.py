"""Which device a process computes on, in which precision, and how ranks started by torchrun find each other."""
import contextlib
import os
import sys

import torch
import torch.distributed as dist


def join_ranks(device="auto"):
    """(rank, world size, torch.device) of this process. Under torchrun it joins the others: nccl on cuda, gloo on cpu."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch sees no GPU; use --device cpu, or install torch for this GPU's driver")
    kind = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"{world} ranks, but this machine has {torch.cuda.device_count()} GPUs; start one rank per GPU")
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # of what autocast leaves in float32
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return (dist.get_rank() if world > 1 else 0), world, device


def leave_ranks():
    if dist.is_initialized():
        dist.destroy_process_group()


def precision(device, amp):
    """"bf16", "fp16" or "none": what `amp` = "auto" means on this device."""
    return amp if amp != "auto" else "bf16" if device.type == "cuda" else "none"


def autocast(device, amp):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(device, amp))
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def moved(value, device):
    """A batch, of tensors in lists, tuples and dicts, on `device`; tuples become lists, and what is no tensor stays as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    return [moved(part, device) for part in value] if isinstance(value, (list, tuple)) else value


def peak_memory(device):
    """Bytes: on a GPU the most that tensors took so far, on a CPU that the whole process did; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
