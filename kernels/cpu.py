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
        v, to = _heads(v, a), _heads(out, a)
        for t, at, source in _taps(v, out, kernel_size, dilation, stride):
            v_t = v[source] if mul is None else v[source] * _tap(mul, t, a)
            to[at].addcmul_(v_t, a[t][at])
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
        if needs[0] and dv is None:
            dv = torch.zeros_like(v)
        da = torch.zeros_like(a) if needs[1] else None
        dmul = torch.zeros_like(mul) if needs[2] else None
        go, v, dv_heads = _heads(go, a), _heads(v, a), _heads(dv, a) if needs[0] else None
        for t, at, source in _taps(v, go, kernel_size, dilation, stride):
            go_mul = go[at] if mul is None else go[at] * _tap(mul, t, a)
            if needs[0]:
                dv_heads[source].addcmul_(go_mul, a[t][at])
            if needs[1]:
                da[t][at] = (go_mul * v[source]).sum(-1, keepdim=True)
            if needs[2]:
                per_sample = (go[at] * v[source] * a[t][at]).sum((1, 2)).flatten(1)  # (B, C)
                dmul.flatten(-2)[..., t] = per_sample if mul.ndim == 4 else per_sample.sum(0)
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


def _taps(v, out, kernel_size, dilation, stride):
    """(t, index of the output pixels whose tap t lies in the image, index of the pixels of v it reads), for taps that read any.

    Small maps have many that read none: on 2 x 2 pixels, 40 of the 49 of a 7 x 7 window.
    """
    for i in range(kernel_size):
        rows = _overlap((i - kernel_size // 2) * dilation, v.shape[1], out.shape[1], stride)
        for j in range(kernel_size):
            columns = _overlap((j - kernel_size // 2) * dilation, v.shape[2], out.shape[2], stride)
            if rows and columns:
                yield i * kernel_size + j, (slice(None), rows[0], columns[0]), (slice(None), rows[1], columns[1])


def _overlap(offset, size, out_size, stride):
    """Along one axis: slice of the outputs y with 0 <= y * stride + offset < size, and the slice they read; None if there are none."""
    first, last = max(0, -(offset // stride)), min(out_size - 1, (size - 1 - offset) // stride)
    if first > last:
        return None
    return slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)


def _depthwise(v, add, kernel_size, dilation, stride):
    """The static filters as a depth-wise convolution, NCHW; per-sample filters fold the batch into the groups."""
    x, weight, groups = _as_convolution(v, add)
    y = F.conv2d(x, weight, None, stride, kernel_size // 2 * dilation, dilation, groups)
    return y.reshape(v.shape[0], v.shape[3], *y.shape[2:])


def _depthwise_backward(go, v, add, kernel_size, dilation, stride, needs):
    dadd = None
    if needs[3] and go.shape[1] * go.shape[2] < kernel_size ** 2:
        # The library's weight gradient takes milliseconds even on 2 x 2 pixels, where few taps lie in the image.
        dadd = torch.zeros_like(add)
        for t, at, source in _taps(v, go, kernel_size, dilation, stride):
            per_sample = (go[at] * v[source]).sum((1, 2))  # (B, C)
            dadd.flatten(-2)[..., t] = per_sample if add.ndim == 4 else per_sample.sum(0)
        needs = (needs[0], None, None, False)
        if not needs[0]:
            return None, dadd
    x, weight, groups = _as_convolution(v, add)
    Ho, Wo = go.shape[1:3]
    # A convolution yields ceil(H / stride) rows where the operator yields floor(H / stride): the last ones have no gradient.
    go = F.pad(go, (0, 0, 0, -(-v.shape[2] // stride) - Wo, 0, -(-v.shape[1] // stride) - Ho)).permute(0, 3, 1, 2)
    go = go.reshape(x.shape[0], x.shape[1], *go.shape[2:])
    padding = kernel_size // 2 * dilation
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        go, x, weight, None, (stride, stride), (padding, padding), (dilation, dilation), False, (0, 0), groups,
        (needs[0], needs[3], False))
    dv = _channels_last(dx.reshape(v.shape[0], v.shape[3], *v.shape[1:3])).contiguous() if needs[0] else None
    return dv, dweight.reshape(add.shape) if needs[3] else dadd


def _as_convolution(v, add):
    x = v.permute(0, 3, 1, 2)
    if add.ndim == 4:
        x = x.reshape(1, -1, *x.shape[2:])
    return x, add.reshape(-1, 1, *add.shape[-2:]), x.shape[1]
