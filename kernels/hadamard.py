"""hadamard: what callers may pass, and the torch operators behind it, elsa::hadamard and its backward."""
import torch
import torch.nn.functional as F

from . import backend, checks
from .transforms import differentiable, differentiable_no_further, refuse_nested_forward_mode


def hadamard(q, k, weight, bias, *, scale=1.0, dilation=1):
    """Hadamard attention, what ELSA makes its attention maps from.

        z = GELU(scale * grouped convolution of (q * k) with weight + bias), zero-padded

    Args:
        q, k: queries and keys, (B, H, W, Q), any strides; read without a copy where channels are side by side in
            memory, e.g. slices of one projection.
        weight: (Q, width, kernel_size, kernel_size), groups of `width` channels, which divides Q; kernel_size odd.
        bias: (Q,).
        scale: finite number, factor of the product.
        dilation: distance between taps, >= 1.

    q and k have one dtype of float16, bfloat16, float32, float64 (under autocast they are cast to its dtype); weight
    and bias have that dtype or float32. Sums are float32 (float64 for float64).

    Returns:
        (B, H, W, Q) in q's dtype.

    Differentiable once in q, k, weight and bias, backward and forward. CUDA tensors of float16, bfloat16 and float32
    with groups of up to 128 channels go through Triton kernels, others through torch, CPU tensors too
    unless ELSA_BACKEND=triton. The kernels round q * k and weight to q's dtype; two runs of theirs are bit-identical as
    those of elsa_attention; and NaN in q or k may reach the other groups of its block of 8 channels, and of its sample
    pixels beside those that read it, up to 3 rows and 15 columns away (times dilation).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; the message names it.
        RuntimeError: a second derivative, or a forward-mode one inside torch.compile, of the Triton kernels.

    Source: arXiv 2112.12786, section 3.1.
    """
    q, k = checks.under_autocast(q, k)
    checks.whole_numbers(dilation=dilation)
    checks.finite_numbers(scale=scale)
    checks.same_kind(("weight", "bias"), q=q, k=k, weight=weight, bias=bias)
    _check_shapes(q, k, weight, bias)
    _check_size(q, k, weight, dilation)
    if q.numel() == 0 or backend.has_convolution(q, weight):
        q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
        return _maps(q, k, weight, bias, float(scale), dilation)[0]
    with backend.without_autocast(q):
        wide = torch.promote_types(q.dtype, torch.float32)
        h = q.to(wide) * k.to(wide)
        h = h if scale == 1 else h * scale
        return F.gelu(_convolution(h, weight.to(wide), bias.to(wide), dilation)).permute(0, 2, 3, 1).to(q.dtype)


def _check_shapes(q, k, weight, bias):
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(f"q, k: got shapes {tuple(q.shape)} and {tuple(k.shape)}, "
                         "expected the same (B, H, W, Q) for both")
    Q = q.shape[3]
    shape = tuple(weight.shape)
    if len(shape) != 4 or shape[0] != Q or shape[1] < 1 or Q % shape[1] or shape[2] != shape[3] or shape[3] % 2 == 0:
        raise ValueError(f"weight: got shape {shape}, "
                         f"expected ({Q}, width, k, k) with a width that divides {Q} and an odd k")
    if tuple(bias.shape) != (Q,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({Q},)")


def _check_size(q, k, weight, dilation):
    """The kernels' numbers are 32-bit: of a sample's elements, of one block of its channels, of all samples' pixels."""
    B, H, W, _ = q.shape
    block = H * W * max(8, 2 * weight.shape[1])
    checks.sample_fits("q", q, block)
    checks.sample_fits("k", k, block)
    edge = min(dilation, max(H, W))
    if q.device.type != "cpu" and B * (H + edge) * (W + edge) >= 2 ** 31:
        raise ValueError(f"q: got {B} samples of {H} x {W}, expected fewer than 2**31 pixels in all; split the batch")


def _convolution(h, weight, bias, dilation):
    """torch's: (B, H, W, Q) -> (B, Q, H, W)."""
    padding, groups = weight.shape[3] // 2 * dilation, weight.shape[0] // weight.shape[1]
    return F.conv2d(h.permute(0, 3, 1, 2), weight, bias, 1, padding, dilation, groups)


@torch.library.custom_op("elsa::hadamard", mutates_args=())
def _hadamard(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: float,
              dilation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(GELU(u), GELU'(u))"""
    if q.numel() == 0:
        return _fake_hadamard(q, k, weight, bias, scale, dilation)
    with backend.on_device_of(q):
        return backend.convolution().forward(q, k, weight, bias, scale, dilation)


@_hadamard.register_fake
def _fake_hadamard(q, k, weight, bias, scale, dilation):
    return q.new_empty(q.shape), q.new_empty(q.shape)


@torch.library.custom_op("elsa::hadamard_backward", mutates_args=())
def _hadamard_backward(dz: torch.Tensor, u: torch.Tensor, q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor,
                       bias: torch.Tensor, scale: float, dilation: int) -> list[torch.Tensor]:
    """Gradients of (q, k, weight, bias)."""
    if dz.numel() == 0:
        return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, weight, bias)]
    dz = dz if dz.stride(3) == 1 else dz.contiguous()
    with backend.on_device_of(q):
        dq, dk, dweight, dbias = backend.convolution().backward(dz, u, q, k, weight, scale, dilation)
        return [dq, dk, dweight.to(weight.dtype), dbias.to(bias.dtype)]


@_hadamard_backward.register_fake
def _fake_hadamard_backward(dz, u, q, k, weight, bias, scale, dilation):
    return [x.new_empty(x.shape) for x in (q, k, weight, bias)]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.dilation = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.save_for_forward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dz, du):
    if dz is None:
        return (None,) * 6
    return *_maps_backward(dz, *ctx.saved_tensors, ctx.scale, ctx.dilation), None, None


def _jvp(ctx, dq, dk, dweight, dbias, *_):
    """By torch's convolution, which is linear in its image and in its weight."""
    refuse_nested_forward_mode()
    q, k, weight, bias = ctx.saved_tensors
    h = q * k * ctx.scale
    u = _convolution(h, weight, bias, ctx.dilation)
    du = torch.zeros_like(u) if dbias is None else dbias.to(u.dtype)[:, None, None].expand_as(u)
    for tangent, other in ((dq, k), (dk, q)):
        if tangent is not None:
            du = du + _convolution(tangent * other * ctx.scale, weight, None, ctx.dilation)
    if dweight is not None:
        du = du + _convolution(h, dweight, None, ctx.dilation)
    return torch.ops.aten.gelu_backward(du, u).permute(0, 2, 3, 1), None


_maps = differentiable(_hadamard, _setup_context, _backward, _jvp)
_maps_backward = differentiable_no_further(_hadamard_backward)
