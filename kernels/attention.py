"""elsa_attention: what callers may pass, and the torch operators behind it, elsa::local_attention and its backward."""
import torch

from . import backend, checks
from .transforms import differentiable, differentiable_no_further, refuse_nested_forward_mode


def elsa_attention(v, logits, ghost_mul=None, ghost_add=None, *, kernel_size, dilation=1, stride=1, lam=1, gamma=1,
                   normalize=True):
    """Enhanced local self-attention's aggregation: each output pixel is a weighted sum of its window in v.

        a[t]   = softmax over t of logits[t]  (normalize=True), or logits[t]
        f[c,t] = a[g(c),t] * ghost_mul[c,t]**lam + gamma * ghost_add[c,t]
        out[c] = sum_t v(tap t)[c] * f[c,t]

    Tap t = i * kernel_size + j of output pixel (y, x) reads v at y*stride + (i-r)*dilation, x*stride + (j-r)*dilation,
    with r = kernel_size // 2; v is 0 outside the image, where the taps keep their share of the softmax.

    Args:
        v: (B, H, W, C), any strides; read without a copy where channels are contiguous.
        logits: (B, G*K, Ho, Wo) with K = kernel_size**2, head-major, then taps row by row; Ho = H // stride,
            Wo = W // stride; G heads of C / G channels. Contiguous (NCHW) and channels_last memory are both read
            without a copy; NCHW is the faster one on a GPU. None: no attention, the operator is a depth-wise
            convolution with gamma * ghost_add.
        ghost_mul: (C, kernel_size, kernel_size), or (B, C, kernel_size, kernel_size) for one filter a sample;
            None or lam=0: not applied.
        ghost_add: likewise; None or gamma=0: not applied.
        kernel_size: side of the window, odd, >= 1. dilation, stride: >= 1.
        lam: integer >= 0, the power of ghost_mul (it has negative entries, whose fractional powers are not real).
        gamma: finite number, the weight of ghost_add.
        normalize: take the softmax over the K taps.

    v and logits have one dtype of float16, bfloat16, float32, float64 (under autocast they are cast to its dtype);
    ghost filters have that dtype or float32. Sums are float32 (float64 for float64).

    Returns:
        (B, Ho, Wo, C), contiguous, in v's dtype.

    Differentiable once in v, logits, ghost_mul and ghost_add, backward and forward (torch.func's grad, jvp, vmap; vmap
    calls sample by sample). Two runs with the same tuned configurations are bit-identical; with any, if
    torch.use_deterministic_algorithms is on. CUDA tensors go through the Triton kernels, CPU tensors through
    a loop over taps, or through the kernels too if ELSA_BACKEND=triton.

    What is not finite stays where it is read. A pixel and head whose logits hold NaN or +inf, or -inf alone, has NaN in
    its channels of out, with normalize; NaN in v goes to the outputs that read it and to the gradients of their taps.
    Whether a weight that is not finite counts at a tap outside the image, where v is 0, is not defined.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; the message names it.
        RuntimeError: a second derivative, or a forward-mode one inside torch.compile.

    Source: arXiv 2112.12786, section 3. With normalize=False and per-sample filters this is a decoupled dynamic filter
    (arXiv 2104.14107): lam=1, gamma=0 its product, lam=0, gamma=1 its sum.
    """
    v, logits = checks.under_autocast(v, logits)
    tensors = dict(v=v, logits=logits, ghost_mul=ghost_mul, ghost_add=ghost_add)
    given = {name: x for name, x in tensors.items() if x is not None or name == "v"}
    checks.whole_numbers(kernel_size=kernel_size, dilation=dilation, stride=stride)
    checks.finite_numbers(lam=lam, gamma=gamma)
    if lam < 0 or lam != lam // 1:
        raise ValueError(f"lam: got {lam}, expected an integer >= 0: ghost_mul has negative entries, "
                         "and their fractional powers are not real numbers")
    checks.same_kind(("ghost_mul", "ghost_add"), **given)
    _check_shapes(v, logits, ghost_mul, ghost_add, kernel_size, stride)
    checks.sample_fits("v", v)
    if logits is not None:
        checks.sample_fits("logits", logits)
    mul = ghost_mul if logits is not None and lam != 0 else None
    add = ghost_add if gamma != 0 else None
    wide = torch.promote_types(v.dtype, torch.float32)  # in which their gradients, too, are no float16 yet
    if mul is not None and lam != 1:
        mul = mul.to(wide) ** lam
    if add is not None and gamma != 1:
        add = add.to(wide) * gamma
    if logits is None and add is None:
        raise ValueError("logits: None leaves ghost_add alone to act, and ghost_add is None or gamma is 0; "
                         "pass logits, or ghost_add and a gamma other than 0")
    return _aggregate(v, logits, mul, add, kernel_size, dilation, stride, normalize)[0]


def _check_shapes(v, logits, ghost_mul, ghost_add, kernel_size, stride):
    if v.ndim != 4:
        raise ValueError(f"v: got shape {tuple(v.shape)}, expected (B, H, W, C), channels last")
    B, H, W, C = v.shape
    if logits is not None:
        _check_logits(logits, v, kernel_size, H // stride, W // stride, stride)
    static, per_sample = (C, kernel_size, kernel_size), (B, C, kernel_size, kernel_size)
    for name, ghost in (("ghost_mul", ghost_mul), ("ghost_add", ghost_add)):
        if ghost is not None and tuple(ghost.shape) not in (static, per_sample):
            raise ValueError(f"{name}: got shape {tuple(ghost.shape)}, expected {static}, "
                             f"or {per_sample} for one filter a sample")


def _check_logits(logits, v, kernel_size, Ho, Wo, stride):
    B, C, K = v.shape[0], v.shape[3], kernel_size ** 2
    shape = tuple(logits.shape)
    if len(shape) != 4 or shape[0] != B or shape[2:] != (Ho, Wo) or shape[1] % K or not shape[1]:
        raise ValueError(f"logits: got shape {shape}, expected (B, heads * {K}, Ho, Wo) = "
                         f"({B}, heads * {K}, {Ho}, {Wo}) for v of shape {tuple(v.shape)}, "
                         f"kernel_size {kernel_size} and stride {stride}")
    heads = shape[1] // K
    if C % heads:
        raise ValueError(f"logits: got {shape[1]} channels, which is {heads} heads, expected a number of heads that "
                         f"divides v's {C} channels")


@torch.library.custom_op("elsa::local_attention", mutates_args=())
def _attention(v: torch.Tensor, logits: torch.Tensor | None, mul: torch.Tensor | None, add: torch.Tensor | None,
               kernel_size: int, dilation: int, stride: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, what the backward pass needs of the softmax); lam and gamma are already in mul and add."""
    if 0 in (*v.shape, v.shape[1] // stride, v.shape[2] // stride):
        empty = _fake_attention(v, logits, mul, add, kernel_size, dilation, stride, normalize)
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=v.device) for x in empty)
    with backend.on_device_of(v):
        return backend.aggregation(v).forward(v, logits, mul, add, kernel_size, dilation, stride, normalize)


@_attention.register_fake
def _fake_attention(v, logits, mul, add, kernel_size, dilation, stride, normalize):
    B, H, W, C = v.shape
    Ho, Wo = H // stride, W // stride
    lse = (B, logits.shape[1] // kernel_size ** 2, 2, Ho, Wo) if normalize and logits is not None else (0,)
    accumulator = torch.float64 if v.dtype == torch.float64 else torch.float32
    return v.new_empty(B, Ho, Wo, C), v.new_empty(lse, dtype=accumulator)


@torch.library.custom_op("elsa::local_attention_backward", mutates_args=())
def _attention_backward(grad_out: torch.Tensor, v: torch.Tensor, logits: torch.Tensor | None, mul: torch.Tensor | None,
                        add: torch.Tensor | None, lse: torch.Tensor, kernel_size: int, dilation: int, stride: int,
                        normalize: bool, needs: list[bool]) -> list[torch.Tensor]:
    """The gradients that `needs` asks for, of (v, logits, mul, add), in this order."""
    arguments = (grad_out, v, logits, mul, add, lse, kernel_size, dilation, stride, normalize, needs)
    if grad_out.numel() == 0:
        return [x.zero_() for x in _fake_attention_backward(*arguments)]
    with backend.on_device_of(v):
        return [grad for grad in backend.aggregation(v).backward(*arguments) if grad is not None]


@_attention_backward.register_fake
def _fake_attention_backward(grad_out, v, logits, mul, add, lse, kernel_size, dilation, stride, normalize, needs):
    # What the backends return, to the stride: compiled code relies on it. dlogits keeps the layout of logits, so that
    # the projection before it reads its own.
    dlogits = None if logits is None else torch.empty_like(logits)
    dmul, dadd = (None if x is None else x.new_empty(x.shape) for x in (mul, add))
    return [x for x, need in zip((v.new_empty(v.shape), dlogits, dmul, dadd), needs) if need]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation, ctx.stride, ctx.normalize = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.save_for_forward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    if grad_out is None:
        return (None,) * 8
    needs = list(ctx.needs_input_grad[:4])
    numbers = ctx.kernel_size, ctx.dilation, ctx.stride, ctx.normalize
    grads = iter(_aggregate_backward(grad_out, *ctx.saved_tensors, *numbers, needs))
    return *(next(grads) if need else None for need in needs), None, None, None, None


def _jvp(ctx, dv, dlogits, dmul, dadd, *_):
    """The operator is linear in v, in each filter, and in what the softmax gives."""
    refuse_nested_forward_mode()
    v, logits, mul, add = ctx.saved_tensors
    numbers = ctx.kernel_size, ctx.dilation, ctx.stride
    calls = []
    if dv is not None:
        calls.append((dv, logits, mul, add, *numbers, ctx.normalize))
    if dlogits is not None:
        if ctx.normalize:
            a = logits.unflatten(1, (-1, ctx.kernel_size ** 2)).softmax(2)  # (B, G, K, Ho, Wo)
            da = a * dlogits.reshape(a.shape)
            dlogits = (da - a * da.sum(2, keepdim=True)).flatten(1, 2)
        calls.append((v, dlogits, mul, None, *numbers, False))
    if dmul is not None:
        calls.append((v, logits, dmul, None, *numbers, ctx.normalize))
    if dadd is not None:
        calls.append((v, None, None, dadd, *numbers, False))
    return sum(_aggregate(*call)[0] for call in calls), None


_aggregate = differentiable(_attention, _setup_context, _backward, _jvp)
_aggregate_backward = differentiable_no_further(_attention_backward)
