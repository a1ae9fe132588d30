"""What both operators must give, in float64, and how far a result may be from it, for each of its elements.

An element that is a sum may be off by a few roundings of the sum of its terms' magnitudes, and by one of its own. So a
tap that is left out shows, whatever the rest of the tensor holds, in 16 bits too.
"""
import torch
import torch.nn.functional as F

from kernels import elsa_attention_reference


def aggregation(tensors, options, grad_out, strict=False):
    """{"out": ..., "dv": ..., ...} in float64, of tensors by their names. What is ignored has a gradient of zeros.

    strict: a tap outside of the image gives nothing, where the reference has 0 times NaN if its weight is NaN.
    """
    operator = _strict if strict else elsa_attention_reference
    leaves = _leaves(tensors)
    return _results(operator(**leaves, **options), leaves, grad_out)


def aggregation_limits(tensors, options, grad_out, exact, roundings):
    """{name: the largest error allowed, of each element}. roundings: what a sum may lose, in units of its magnitude."""
    leaves = {name: None if x is None else x.abs() for name, x in _leaves(tensors, False).items()}
    logits, K = tensors["logits"], options["kernel_size"] ** 2
    a = None
    if logits is not None:
        a = logits.double().unflatten(1, (-1, K))
        a = (a.softmax(2) if options["normalize"] else a.abs()).flatten(1, 2)
    leaves = _leaves({**leaves, "logits": a})
    absolute = {**options, "gamma": abs(options["gamma"]), "normalize": False}
    magnitudes = _results(elsa_attention_reference(**leaves, **absolute), leaves, grad_out.abs())
    if logits is not None and options["normalize"]:
        a, da = (x.unflatten(1, (-1, K)) for x in (a, magnitudes["dlogits"]))
        magnitudes["dlogits"] = (a * (da + (a * da).sum(2, keepdim=True))).flatten(1, 2)
    return {name: roundings(name) * magnitudes[name] for name in exact}


def aggregation_and_limits(tensors, options, grad_out):
    """What aggregation gives, and the limits of sums in float32, or in float64 of float64."""
    tensors = {name: None if x is None else x.detach() for name, x in tensors.items()}
    exact = aggregation(tensors, options, grad_out)
    wide = torch.promote_types(tensors["v"].dtype, torch.float32)
    bounds = aggregation_limits(tensors, options, grad_out, exact, lambda name: 300 * torch.finfo(wide).eps)
    return exact, bounds


def assert_each_element_close(results, exact, bounds):
    """Off by its limit at most, and by one rounding of its own. NaN is not close."""
    for name, got in results.items():
        own = torch.finfo(got.dtype)
        limit = bounds[name] + own.eps * exact[name].abs() + own.smallest_normal
        error = (got.double() - exact[name]).abs()
        wrong = ~(error <= limit)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} elements, by up to {error.max():.3g}"


def _strict(v, logits, ghost_mul=None, ghost_add=None, *, kernel_size, dilation, stride, lam, gamma, normalize):
    B, H, W, C = v.shape
    Ho, Wo, r = H // stride, W // stride, kernel_size // 2
    offsets = (torch.arange(kernel_size) - r) * dilation
    y, x = (torch.arange(n)[:, None] * stride + offsets for n in (Ho, Wo))  # (Ho or Wo, kernel_size)
    inside = ((y >= 0) & (y < H))[:, None, :, None] & ((x >= 0) & (x < W))[None, :, None, :]  # (Ho, Wo, k, k)
    inside = inside.flatten(2)[None, :, :, :, None]
    window = v[:, y.clamp(0, H - 1)[:, None, :, None], x.clamp(0, W - 1)[None, :, None, :]].flatten(3, 4)
    window = torch.where(inside, window, 0.0)  # (B, Ho, Wo, K, C)
    f = v.new_zeros(())
    per_pixel = lambda ghost: ghost.flatten(-2).transpose(-1, -2).reshape(-1, 1, 1, kernel_size ** 2, C)
    if logits is not None:
        a = logits.unflatten(1, (-1, kernel_size ** 2))
        a = (a.softmax(2) if normalize else a).repeat_interleave(C // a.shape[1], 1).permute(0, 3, 4, 2, 1)
        a = torch.where(inside, a, 0.0)
        f = a * per_pixel(ghost_mul) ** lam if ghost_mul is not None and lam else a
    if ghost_add is not None and gamma:
        f = f + gamma * per_pixel(ghost_add)
    return torch.where(inside, window * f, 0.0).sum(3)


def hadamard(tensors, options, grad_out):
    """{"out": ..., "dq": ..., ...} in float64."""
    leaves = _leaves(tensors)
    u = _convolution(**leaves, **options)
    return _results(F.gelu(u).permute(0, 2, 3, 1), leaves, grad_out)


def hadamard_limits(tensors, options, grad_out, exact, roundings):
    """As aggregation_limits. A rounding of u, before GELU, changes its derivative by 0.8 times as much at most."""
    leaves = {name: x.abs().requires_grad_() for name, x in _leaves(tensors, False).items()}
    u = _convolution(**leaves, dilation=options["dilation"], scale=abs(options["scale"]))
    go = grad_out.double().abs().permute(0, 3, 1, 2) * (1.2 + 0.8 * u.detach())
    grads = torch.autograd.grad(u, list(leaves.values()), go)
    magnitudes = dict(zip(exact, (1.2 * u.detach().permute(0, 2, 3, 1), *grads)))
    return {name: roundings(name) * magnitudes[name] for name in exact}


def _convolution(q, k, weight, bias, scale, dilation):
    h = (q * k * scale).permute(0, 3, 1, 2)
    if 0 in h.shape:
        return h + 0 * (weight.sum() + bias.sum())
    padding = weight.shape[3] // 2 * dilation
    return F.conv2d(h, weight, bias, 1, padding, dilation, h.shape[1] // weight.shape[1])


def _leaves(tensors, requires_grad=True):
    return {name: None if x is None else x.detach().double().clone(memory_format=torch.contiguous_format)
            .requires_grad_(requires_grad) for name, x in tensors.items()}


def _results(out, leaves, grad_out):
    given = {name: x for name, x in leaves.items() if x is not None}
    grads = torch.autograd.grad(out, list(given.values()), grad_out.double(), allow_unused=True)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(given.values(), grads)]
    return dict(zip(("out", *(f"d{name}" for name in given)), (out.detach(), *grads)))
