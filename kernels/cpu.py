"""ELSA's aggregation on the CPU: a loop over the taps on channels-last tensors, one fused multiply-add a tap.

No K-fold copy of v is made. The attention of one tap, (B, Ho, Wo, G), is contiguous, and the static part of the filters
is a depth-wise convolution. 16-bit inputs are computed in float32.
"""
import torch
import torch.nn.functional as F


def forward(v, logits, mul, add, kernel_size, dilation, stride, normalize):
    """As :func:`kernels.aggregation.forward`: out (B, Ho, Wo, C), and an lse of zeros: the backward pass here takes the softmax again."""
    dtype = v.dtype
    v, logits, mul, add = (_wide(x) for x in (v, logits, mul, add))
    B, H, W, C = v.shape
    Ho, Wo = H // stride, W // stride
    if add is not None:
        out = _channels_last(_depthwise(v, add, kernel_size, dilation, stride)[:, :, :Ho, :Wo]).contiguous()
    else:
        out = v.new_zeros(B, Ho, Wo, C)
    lse = v.new_empty(0)
    if logits is not None:
        a = _attention(logits, kernel_size, normalize)
        lse = v.new_zeros(B, a.shape[4], Ho, Wo) if normalize else lse
        taps, heads = _padded_taps(v, a, kernel_size, dilation, stride), _heads(out, a)
        for t, v_t in enumerate(taps):
            heads.addcmul_(v_t if mul is None else v_t * _tap(mul, t, a), a[t])
    return out.to(dtype), lse


def backward(grad_out, v, logits, mul, add, lse, kernel_size, dilation, stride, normalize, needs):
    """As :func:`kernels.aggregation.backward`: (dv, dlogits, dmul, dadd), None where `needs` says so."""
    dtype = v.dtype
    go, v, logits, mul, add = (_wide(x) for x in (grad_out.contiguous(), v, logits, mul, add))
    dv = dlogits = dmul = dadd = None
    if add is not None and (needs[0] or needs[3]):
        dv, dadd = _depthwise_backward(go, v, add, kernel_size, dilation, stride, needs)
    if logits is not None:
        a = _attention(logits, kernel_size, normalize)
        border = kernel_size // 2 * dilation
        dv_padded = v.new_zeros(v.shape[0], v.shape[1] + 2 * border, v.shape[2] + 2 * border, v.shape[3]) if needs[0] else None
        da = torch.empty_like(a) if needs[1] else None
        dmul = torch.zeros_like(mul) if needs[2] else None
        go = _heads(go, a)
        dv_taps = _taps(dv_padded, a, kernel_size, dilation, stride) if needs[0] else None
        for t, v_t in enumerate(_padded_taps(v, a, kernel_size, dilation, stride)):
            go_mul = go if mul is None else go * _tap(mul, t, a)
            if needs[0]:
                next(dv_taps).addcmul_(go_mul, a[t])
            if needs[1]:
                torch.sum(go_mul * v_t, -1, keepdim=True, out=da[t])
            if needs[2]:
                per_sample = (go * v_t * a[t]).sum((1, 2)).flatten(1)  # (B, C)
                dmul.flatten(-2)[..., t] = per_sample if mul.ndim == 4 else per_sample.sum(0)
        if needs[0]:
            inside = dv_padded[:, border:border + v.shape[1], border:border + v.shape[2]]
            dv = inside.contiguous() if dv is None else dv + inside
        if needs[1]:
            if normalize:
                da = a * (da - (a * da).sum(0, keepdim=True))
            dlogits = _taps_inside(da).to(dtype)
    return dv if dv is None else dv.to(dtype), dlogits, dmul, dadd


def _wide(x):
    """Sums are float32; float64 stays."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def _attention(logits, kernel_size, normalize):
    """a, taps outermost: (K, B, Ho, Wo, G, 1)."""
    B, _, Ho, Wo = logits.shape
    taps_first = logits.view(B, -1, kernel_size ** 2, Ho, Wo).permute(2, 0, 3, 4, 1).contiguous()  # (K, B, Ho, Wo, G)
    return (taps_first.softmax(0) if normalize else taps_first).unsqueeze(-1)


def _taps_inside(da):
    """(K, B, Ho, Wo, G, 1) -> (B, G*K, Ho, Wo)."""
    K, B, Ho, Wo, G, _ = da.shape
    return da.view(K, B, Ho, Wo, G).permute(1, 4, 0, 2, 3).reshape(B, G * K, Ho, Wo)


def _channels_last(x):
    return x.permute(0, 2, 3, 1)


def _heads(x, a):
    """(B, H, W, C) -> (B, H, W, G, D)."""
    return x.unflatten(-1, (a.shape[4], -1))


def _tap(mul, t, a):
    """Tap t of the multiplicative filter, ready to multiply (B, H, W, G, D)."""
    return mul.flatten(-2)[..., t].reshape(-1, 1, 1, a.shape[4], mul.shape[-3] // a.shape[4])


def _padded_taps(v, a, kernel_size, dilation, stride):
    border = kernel_size // 2 * dilation
    return _taps(F.pad(v, (0, 0, border, border, border, border)), a, kernel_size, dilation, stride)


def _taps(padded, a, kernel_size, dilation, stride):
    """The K shifted views (B, Ho, Wo, G, D) of a padded image."""
    Ho, Wo = a.shape[2:4]
    padded = _heads(padded, a)
    for i in range(0, kernel_size * dilation, dilation):
        for j in range(0, kernel_size * dilation, dilation):
            yield padded[:, i:i + Ho * stride:stride, j:j + Wo * stride:stride]


def _depthwise(v, add, kernel_size, dilation, stride):
    """The static filters as a depth-wise convolution, NCHW; per-sample filters fold the batch into the groups."""
    x, weight, groups = _as_convolution(v, add)
    y = F.conv2d(x, weight, None, stride, kernel_size // 2 * dilation, dilation, groups)
    return y.reshape(v.shape[0], v.shape[3], *y.shape[2:])


def _depthwise_backward(go, v, add, kernel_size, dilation, stride, needs):
    x, weight, groups = _as_convolution(v, add)
    Ho, Wo = go.shape[1:3]
    # A convolution yields ceil(H / stride) rows where the operator yields floor(H / stride): the last ones have no gradient.
    go = F.pad(go, (0, 0, 0, -(-v.shape[2] // stride) - Wo, 0, -(-v.shape[1] // stride) - Ho)).permute(0, 3, 1, 2)
    go = go.reshape(x.shape[0], x.shape[1], *go.shape[2:])
    padding = kernel_size // 2 * dilation
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        go, x, weight, None, (stride, stride), (padding, padding), (dilation, dilation), False, (0, 0), groups,
        (needs[0], needs[3], False))
    dx = _channels_last(dx.reshape(v.shape[0], v.shape[3], *v.shape[1:3])).contiguous() if needs[0] else None
    return dx, dweight.reshape(add.shape) if needs[3] else None


def _as_convolution(v, add):
    x = v.permute(0, 3, 1, 2)
    if add.ndim == 4:
        x = x.reshape(1, -1, *x.shape[2:])
    return x, add.reshape(-1, 1, *add.shape[-2:]), x.shape[1]
