"""Ranks: how the processes that torchrun started find each other, and what they tell each other."""
import hashlib
import io
import os
import pickle
from datetime import timedelta

import torch
import torch.distributed as dist

import kernels
from train import watch
from train.config import to_dict
from train.device import autocast, memory_format


def join_ranks(device="auto", timeout_minutes=10.0):
    """(rank, world size, torch.device) of this process. Under torchrun it joins the others.

    timeout_minutes: how long a rank may stand still, see watch.py.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch sees no GPU; "
                         "use --device cpu, or install torch for this GPU's driver")
    kind = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(f"{world} ranks, but this machine has {torch.cuda.device_count()} GPUs; "
                         "start one rank per GPU")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        # of what autocast leaves in float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1:
        if watch.current:
            watch.current.timeout = timeout_minutes
            watch.current.agree("device", {"device": kind})
        # The watch, which names a culprit, comes before the collectives' own timeout.
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes + 2))
    return (dist.get_rank() if world > 1 else 0), world, device


def agree(config, training, validation, classes):
    """Ends the job when ranks differ in their configuration or data; they may have them at different places."""
    if watch.current:
        places = ("data", "weights", "token_labels", "out", "workers")
        facts = {f"class {number}": str(name) for number, name in enumerate(classes)}
        facts |= inventory(config.data) if config.data else {}
        facts |= {"the number of training images": len(training), "of validation images": len(validation)}
        facts |= {name: value for name, value in to_dict(config).items() if name not in places}
        watch.current.agree("data", facts)


def inventory(folder):
    """{file or folder below `folder`: digest}: of files of text what they hold, of folders the names of all others."""
    found = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = sorted(name for name in files if not name.startswith("."))
        for name in files:
            if name.endswith((".json", ".txt")):
                with open(os.path.join(place, name), "rb") as file:
                    path = os.path.relpath(os.path.join(place, name), folder)
                    found[path] = hashlib.file_digest(file, "sha256").hexdigest()[:12]
        images = [name for name in files if not name.endswith((".json", ".txt"))]
        if images:
            digest = hashlib.sha256("\0".join(images).encode(errors="surrogateescape")).hexdigest()[:12]
            found[os.path.relpath(place, folder)] = f"{len(images)} files, {digest}"
    return found


def leave_ranks(kind=None, *_):
    """kind: of an exception on the way out, as __exit__ has it. After an error of one rank the others still wait, and
    taking leave of them could wait for them: the watch ends the process."""
    failed = kind is not None and issubclass(kind, Exception)
    if dist.is_initialized() and not (failed and watch.current):
        dist.destroy_process_group()


def from_rank_0(value):
    """Rank 0's `value`, an object that can be pickled, on every rank; an exception is raised on every rank."""
    if dist.is_initialized():
        box = [value]
        dist.broadcast_object_list(box, src=0)
        value = box[0]
    if isinstance(value, Exception):
        raise value
    return value


def tensors_from_rank_0(value, device):
    """As from_rank_0, for gigabytes: the tensors in `value`, on the CPU, travel one after the other by way of
    `device`, never all at once."""
    if not dist.is_initialized():
        return from_rank_0(value)
    file, tensors = io.BytesIO(), []
    describer = _Describer(file)
    describer.tensors = tensors
    describer.dump(value)
    described = from_rank_0(file.getvalue())
    if dist.get_rank():
        placer = _Placer(io.BytesIO(described))
        placer.tensors = tensors = []
        value = placer.load()
    for tensor in tensors:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).to(device)
        dist.broadcast(flat, 0)
        if dist.get_rank():
            tensor.copy_(flat.to(tensor.device).view(tensor.dtype).view(tensor.shape))
    if isinstance(value, Exception):
        raise value
    return value


class _Describer(pickle.Pickler):
    """Pickles with shape, stride and type in the place of every tensor; these go into the list `tensors`, in order."""

    def persistent_id(self, part):
        if isinstance(part, torch.Tensor):
            self.tensors.append(part)
            return tuple(part.shape), part.stride(), part.dtype
        return None


class _Placer(pickle.Unpickler):
    """Puts empty tensors into these places, and into the list `tensors`."""

    def persistent_load(self, described):
        shape, stride, dtype = described
        self.tensors.append(torch.empty_strided(shape, stride, dtype=dtype))
        return self.tensors[-1]


def sum_over_ranks(tensor):
    """The sum of all ranks' tensors, on each of them; alone the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(number, device):
    """The largest of all ranks' numbers."""
    largest = torch.tensor(number, device=device)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def gather(parts):
    """The lists of all ranks, joined, on every rank."""
    if not dist.is_initialized():
        return parts
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, parts)
    return [part for rank in gathered for part in rank]


def broadcast_buffers(model):
    """Gives all ranks rank 0's statistics of batch norm: those that will be saved and evaluated."""
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)


def tune_kernels(model, batch_size, img_size, amp, rank, device):
    """Lets the kernels choose their configurations before the first step, on rank 0; the others take over its choices.

    Ranks that tuned apart, in the middle of a step, could wait for each other for ever: so nothing is measured from
    then on, and images of another size take the choice of the most similar one. The CPU has nothing to tune.
    """
    if device.type != "cuda":
        return
    if rank == 0:
        images = torch.zeros(batch_size, 3, img_size, img_size, device=device).to(memory_format=memory_format(device))
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # statistics of batch norm
        with torch.random.fork_rng(devices=[device]):
            for training in (True, False):
                model.train(training)
                with autocast(device, amp), torch.set_grad_enabled(training):
                    out = getattr(model, "backbone", model)(images)
                if training:
                    sum(part.float().mean() for part in (out if isinstance(out, tuple) else (out,))).backward()
        model.zero_grad(set_to_none=True)
        for buffer, before in buffers:
            buffer.copy_(before)
    kernels.set_tuned(from_rank_0(kernels.tuned()), measure=False)
