"""What `python run.py bench` times: ELSA as operator, layer and model, and what else could stand there.

Providers that compute the same, and are checked against `naive` before they are timed, results and gradients alike:
    ours, elsa       this project's kernels
    naive            kernels/reference.py, one tap at a time; speed-ups are over this row
    unfold           what the published code computes on a CPU: filters for every channel, tap and pixel, K copies of v
    torch.compile    naive, compiled
Providers that compute something else, for scale:
    depthwise        depth-wise convolution of the same kernel size
    window, outlook  attention inside windows of 7 x 7; outlook attention, VOLO's own
    flex             FlexAttention, masked to the neighbourhood of the same kernel size

A layer is the operator with its projections and Hadamard attention, which makes its logits. Forward is without
gradients (a model evaluates), forward+backward has the gradients of all inputs and parameters (a model trains, without
the optimizer).
"""
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import models.elsa
from kernels import elsa_attention, elsa_attention_reference
from models import create_model
from models.attention import local_attention
from train.device import autocast


class Shape(NamedTuple):
    height: int
    width: int
    heads: int  # of HEAD_DIM channels
    kernel_size: int
    lam: int
    group_width: int  # of the convolution of Hadamard attention, at layer level


HEAD_DIM = 32
WINDOW = 7
MODELS = {"swin_t": (3, 4), "swin_s": (3, 8), "swin_b": (4, 8), "volo_d1": (6, 8)}  # heads of stage 1, group width
SHAPES = {
    f"{model} stage {i + 1}": Shape(56 >> i, 56 >> i, heads << i, 7, 0, group_width)
    for model, (heads, group_width) in MODELS.items() if model.startswith("swin") for i in range(3)
}
SHAPES["volo_d1 stage 1"] = Shape(28, 28, 6, 5, 1, 8)
SHAPES |= {  # Swin-T on 800 x 1333 pixels
    f"detector stage {i + 1}": Shape(200 >> i, width, 3 << i, 7, 0, 4) for i, width in enumerate((334, 167, 84))
}

CHECKED = ("ours", "unfold", "torch.compile")  # have to equal naive
CHECKED_IMAGES = 4  # of the batch: the naive reference needs K copies of everything
COMPILED = ("torch.compile", "flex", "elsa compiled", "window compiled", "outlook compiled")
DTYPES = {"float32": "none", "float16": "fp16", "bfloat16": "bf16"}  # and what models call them under autocast


@dataclass
class Provider:
    """One implementation with its inputs: function(*images) -> out, to be called with or without gradients."""
    function: Callable
    images: tuple
    parameters: tuple = ()

    def __call__(self, grad_out):
        """(out, gradients of the images that require one, of the parameters); grad_out None: the forward pass alone."""
        with torch.set_grad_enabled(grad_out is not None):
            out = self.function(*self.images)
        if grad_out is None:
            return (out.detach(),)
        inputs = [*(x for x in self.images if x.requires_grad), *self.parameters]
        return out.detach(), *torch.autograd.grad(out, inputs, grad_out)

    def on_checked_images(self):
        images = (x[:CHECKED_IMAGES].detach().requires_grad_(x.requires_grad) for x in self.images)
        return Provider(self.function, tuple(images), self.parameters)

    def bytes(self, out_like, backward):
        """Compulsory traffic: inputs, filters and output once.

        Backward reads inputs, filters and grad_out again, and writes the gradients.
        """
        inputs = sum(x.nbytes for x in (*self.images, *self.parameters))
        return 3 * inputs + 2 * out_like.nbytes if backward else inputs + out_like.nbytes


# Operator

def operator(shape, batch_size, dtype, device, backward):
    """({row: function that builds its provider}, grad_out) of the aggregation, on random tensors."""
    H, W, G, k, lam, _ = shape
    C = G * HEAD_DIM
    torch.manual_seed(0)
    randn = lambda *size: torch.randn(*size, device=device, dtype=dtype).requires_grad_(backward)
    v, q, keys = (randn(batch_size, H, W, C) for _ in range(3))
    logits, ghost_add = randn(batch_size, G * k * k, H, W), randn(C, k, k)
    ghost_mul = randn(C, k, k) if lam else None
    parameters = (ghost_mul, ghost_add) if lam else (ghost_add,)

    def elsa(attention):
        function = lambda v, logits: attention(v, logits, ghost_mul, ghost_add, kernel_size=k, lam=lam)
        return Provider(function, (v, logits), parameters)

    builders = {
        "ours": lambda: elsa(elsa_attention),
        "naive": lambda: elsa(elsa_attention_reference),
        "unfold": lambda: elsa(unfold),
        "torch.compile": lambda: elsa(torch.compile(elsa_attention_reference, dynamic=False)),
        "depthwise": lambda: Provider(lambda v: depthwise(v, ghost_add), (v,), (ghost_add,)),
        "window": lambda: Provider(lambda *qkv: window(*qkv, G), (q, keys, v)),
        "flex": lambda: Provider(flex(H, W, G, k, device), (q, keys, v)),
    }
    return builders, torch.randn_like(v, requires_grad=False)


def unfold(v, logits, ghost_mul, ghost_add, *, kernel_size, lam):
    B, H, W, C = v.shape
    K, G = kernel_size ** 2, logits.shape[1] // kernel_size ** 2
    ghost_mul = ghost_mul if lam else torch.ones_like(ghost_add)
    a = logits.view(B, G, 1, K, H * W).softmax(3)
    filters = ghost_mul.view(1, G, C // G, K, 1) * a + ghost_add.view(1, G, C // G, K, 1)  # (B, G, C / G, K, H * W)
    copies = F.unfold(v.permute(0, 3, 1, 2), kernel_size, padding=kernel_size // 2).view(B, G, C // G, K, H * W)
    return (copies * filters).sum(3).view(B, C, H, W).permute(0, 2, 3, 1)


def depthwise(v, filters):
    k = filters.shape[-1]
    out = F.conv2d(v.permute(0, 3, 1, 2), filters[:, None], padding=k // 2, groups=len(filters))
    return out.permute(0, 2, 3, 1)


def window(q, k, v, heads):
    """Attention inside windows, (B, H, W, C) each -> (B, H, W, C).

    Maps are padded to whole windows, and the padding attended to.
    """
    B, H, W, C = v.shape
    rows, columns = -(-H // WINDOW), -(-W // WINDOW)

    def partition(x):  # (B, H, W, C) -> (B * windows, heads, WINDOW ** 2, C / heads)
        x = F.pad(x, (0, 0, 0, columns * WINDOW - W, 0, rows * WINDOW - H))
        x = x.view(B, rows, WINDOW, columns, WINDOW, heads, -1).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(B * rows * columns, heads, WINDOW ** 2, -1)

    out = F.scaled_dot_product_attention(partition(q), partition(k), partition(v))
    out = out.view(B, rows, columns, heads, WINDOW, WINDOW, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(B, rows * WINDOW, columns * WINDOW, C)[:, :H, :W]


def flex(H, W, heads, kernel_size, device):
    """(q, k, v) -> out, (B, H, W, C) each: every pixel attends to the k x k around it."""
    near = lambda i, j: (i - j).abs() <= kernel_size // 2
    neighbours = lambda b, h, i, j: near(i // W, j // W) & near(i % W, j % W)
    block_mask = torch.compile(create_block_mask, dynamic=False)(neighbours, None, None, H * W, H * W, device=device)
    attend = torch.compile(flex_attention, dynamic=False)

    def function(*qkv):
        q, k, v = (x.unflatten(3, (heads, -1)).flatten(1, 2).transpose(1, 2) for x in qkv)  # (B, G, H * W, C / G)
        return attend(q, k, v, block_mask=block_mask).transpose(1, 2).reshape(qkv[0].shape)

    return function


# Layer and model

def layer(shape, batch_size, dtype, device, backward):
    """({row: function that builds its provider}, grad_out) of the layer, with its model's published settings."""
    H, W, G, k, lam, group_width = shape
    C = G * HEAD_DIM
    torch.manual_seed(0)
    x = torch.randn(batch_size, H, W, C, device=device, dtype=dtype).requires_grad_(backward)

    def create(attn):
        settings = dict(qkv_bias=lam == 0, qk_scale=1, group_width=group_width, lam=lam)  # VOLO (lam = 1) has no bias
        made = local_attention(attn, C, G, kernel_size=k, window=dict(window_size=WINDOW, shift=0), elsa=settings)
        return made.to(device, dtype)

    elsa = create("elsa")
    provider = lambda layer, function=None: Provider(function or layer, (x,), tuple(layer.parameters()))
    builders = {
        "ours": lambda: provider(elsa),
        "naive": lambda: provider(elsa, with_reference(elsa)),
        "torch.compile": lambda: provider(elsa, with_reference(torch.compile(elsa, dynamic=False))),
        "window": lambda: provider(create("window")),
        "depthwise": lambda: provider(create("dwconv")),
    }
    return builders, torch.randn_like(x, requires_grad=False)


def model(name, batch_size, dtype, device, backward):
    """({row: function that builds its provider}, grad_out) of a whole model, under autocast for 16-bit dtypes.

    out is the mean of all its logits. The naive model is not compiled: that is K taps in every layer, one by one. The
    layer level has it.
    """
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format  # as in training
    images = torch.randn(batch_size, 3, 224, 224, device=device).to(memory_format=memory_format)

    def provider(attn, wrap=lambda model: model):
        torch.manual_seed(0)
        model = create_model(name, attn=attn).to(device, memory_format=memory_format).train(backward)
        wrapped = wrap(model)

        def function(images):
            with autocast(device, DTYPES[str(dtype).removeprefix("torch.")]):
                out = wrapped(images)
            return sum(logits.float().mean() for logits in (out if isinstance(out, tuple) else (out,)))

        return Provider(function, (images,), tuple(model.parameters()))

    plain = "outlook" if name.startswith("volo") else "window"
    builders = {
        "elsa": lambda: provider("elsa"),
        plain: lambda: provider(plain),
        "elsa naive": lambda: provider("elsa", with_reference),
        "elsa compiled": lambda: provider("elsa", torch.compile),
        f"{plain} compiled": lambda: provider(plain, torch.compile),
    }
    return builders, torch.ones((), device=device)


def with_reference(layer):
    """The layer or model with models.elsa on the naive reference and on torch's own convolution."""
    def hadamard(q, k, weight, bias, *, scale, dilation):
        h = (q * k * scale).permute(0, 3, 1, 2)
        padding, groups = weight.shape[3] // 2 * dilation, len(weight) // weight.shape[1]
        return F.gelu(F.conv2d(h, weight, bias, 1, padding, dilation, groups)).permute(0, 2, 3, 1)

    def function(x):
        ours = models.elsa.elsa_attention, models.elsa.hadamard
        models.elsa.elsa_attention, models.elsa.hadamard = elsa_attention_reference, hadamard
        try:
            return layer(x)
        finally:
            models.elsa.elsa_attention, models.elsa.hadamard = ours

    return function


LEVELS = {"operator": operator, "layer": layer, "model": model}


def cases(level, chosen):
    """[(name, shape)] of a level; at model level the shape is the model's name.

    The operator is the same in Swin-S as in Swin-T: once.
    """
    if level == "model":
        return [(name, name) for name in MODELS if any(shape.split()[0] == name for shape in chosen)]
    found = {name: shape for name, shape in SHAPES.items() if name in chosen or name.split()[0] in chosen}
    if level == "operator":
        found = {re.sub("^swin_[ts] ", "swin_t/s ", name): shape for name, shape in found.items()}
    return list(found.items())


def default_batch_size(name, device):
    if name.startswith("detector"):
        return 2 if device.type == "cuda" else 1
    return 128 if device.type == "cuda" else 4
