"""ELSA's aggregation on the CPU: a loop over the taps, one fused multiply-add a tap.

v is laid out channel by channel, with zeros between the rows of the image. There a tap is one distance for all pixels, so that the inner loop
of a tap runs over a whole image at once. No K-fold copy of v is made. The static part of the filters is a depth-wise convolution. 16-bit
inputs are computed in float32.
"""
import torch
import torch.nn.functional as F

PIECE = 640_000  # elements of v at a time: what a tap reads and writes then stays in the cache


def forward(v, logits, mul, add, kernel_size, dilation, stride, normalize):
    """As :func:`kernels.aggregation.forward`: out (B, Ho, Wo, C), and an lse of zeros: the backward pass here takes the softmax again."""
    dtype = v.dtype
    v, logits, mul, add = (_wide(x) for x in (v, logits, mul, add))
    B, H, W, C = v.shape
    Ho, Wo = H // stride, W // stride
    if add is None:
        out = v.new_zeros(B, Ho, Wo, C)
    else:
        out = _channels_last(_depthwise(v, add, kernel_size, dilation, stride)[:, :, :Ho, :Wo]).contiguous()
    if logits is None:
        return out.to(dtype), v.new_empty(0)
    heads = logits.shape[1] // kernel_size ** 2
    for part in _pieces(v):
        plan = _Plan(v[part], heads, kernel_size, dilation, stride)
        a = plan.attention(logits[part], normalize).unsqueeze(3).unbind(2)  # of every tap (B, G, 1, Ho, So)
        source, sums = plan.padded(v[part]), v.new_zeros(plan.B, plan.G, C // plan.G, Ho, plan.So)
        scratch = None if mul is None else torch.empty_like(sums)
        for t, rows, read in plan.taps():
            v_t = read(source) if mul is None else torch.mul(read(source), plan.tap(mul, t, part), out=scratch[..., rows, :])
            sums[..., rows, :].addcmul_(v_t, a[t][..., rows, :])
        out[part].add_(plan.pixels(sums))
    return out.to(dtype), v.new_zeros(B, heads, Ho, Wo) if normalize else v.new_empty(0)


def backward(grad_out, v, logits, mul, add, lse, kernel_size, dilation, stride, normalize, needs):
    """As :func:`kernels.aggregation.backward`: (dv, dlogits, dmul, dadd), None where `needs` says so."""
    dtype = v.dtype
    go, v, logits, mul, add = (_wide(x) for x in (grad_out.contiguous(), v, logits, mul, add))
    dv = dlogits = dmul = dadd = None
    if add is not None and (needs[0] or needs[3]):
        dv, dadd = _depthwise_backward(go, v, add, kernel_size, dilation, stride, needs)
    if logits is not None:
        heads = logits.shape[1] // kernel_size ** 2
        dv = torch.zeros(v.shape, dtype=v.dtype) if needs[0] and dv is None else dv
        dlogits = torch.empty(logits.shape, dtype=v.dtype) if needs[1] else None
        dmul = torch.zeros_like(mul) if needs[2] else None
        for part in _pieces(v):
            plan = _Plan(v[part], heads, kernel_size, dilation, stride)
            a, source, go_part = plan.attention(logits[part], normalize), plan.padded(v[part]), plan.outputs(go[part])
            sink = torch.zeros_like(source) if needs[0] else None
            da = torch.zeros_like(a) if needs[1] else None
            weighted, scratch = None if mul is None else torch.empty_like(go_part), torch.empty_like(go_part)
            for t, rows, read in plan.taps():
                go_t, a_t = go_part[..., rows, :], a[:, :, t, None, rows]
                go_mul = go_t if mul is None else torch.mul(go_t, plan.tap(mul, t, part), out=weighted[..., rows, :])
                if needs[0]:
                    read(sink).addcmul_(go_mul, a_t)
                if needs[1]:
                    torch.sum(torch.mul(go_mul, read(source), out=scratch[..., rows, :]), 2, out=da[:, :, t, rows])
                if needs[2]:
                    per_sample = (go_t * read(source) * a_t).sum((3, 4)).flatten(1)  # (B, C)
                    if mul.ndim == 4:
                        dmul.flatten(-2)[part][..., t] = per_sample
                    else:
                        dmul.flatten(-2)[..., t] += per_sample.sum(0)
            if needs[0]:
                dv[part].add_(plan.inputs(sink))
            if needs[1]:
                if normalize:
                    da = a * da.sub_((a * da).sum(2, keepdim=True))
                dlogits[part] = da[..., :plan.Wo].flatten(1, 2)
    return *(x if x is None else x.to(dtype) for x in (dv, dlogits)), dmul, dadd


def _pieces(v):
    """Slices of the batch."""
    step = max(1, PIECE // (v.shape[1] * v.shape[2] * v.shape[3]))
    return [slice(start, start + step) for start in range(0, v.shape[0], step)]


class _Plan:
    """Layouts (B, G, D, ...) of one call. Inputs: pixel (y, x) at (y + edge) * S + x + edge, S = W + edge, zero elsewhere, so that what is left
    of a row is right of the row before. Outputs: Ho rows of So pixels, of which Wo count; with a stride of one So = S, so that rows of
    inputs and outputs are equally far apart, and all of them one loop."""

    def __init__(self, v, heads, kernel_size, dilation, stride):
        self.B, self.H, self.W, self.C = v.shape
        self.G, self.k, self.dilation, self.stride = heads, kernel_size, dilation, stride
        self.Ho, self.Wo = self.H // stride, self.W // stride
        self.edge = kernel_size // 2 * dilation
        self.S = self.W + self.edge
        self.So = self.S if stride == 1 else self.Wo

    def attention(self, logits, normalize):
        """(B, G, K, Ho, So)"""
        a = logits.reshape(self.B, self.G, self.k ** 2, self.Ho * self.Wo)
        return self._wider((a.softmax(2) if normalize else a).unflatten(3, (self.Ho, self.Wo)))

    def outputs(self, x):
        """(B, Ho, Wo, C) -> (B, G, D, Ho, So)"""
        return self._wider(x.unflatten(3, (self.G, -1)).permute(0, 3, 4, 1, 2))

    def _wider(self, x):
        out = x.new_empty(*x.shape[:4], self.So)
        out[..., :self.Wo] = x
        out[..., self.Wo:] = 0
        return out

    def pixels(self, x):
        """The reverse of outputs."""
        return x[..., :self.Wo].flatten(1, 2).permute(0, 2, 3, 1)

    def padded(self, v):
        """(B, H, W, C) -> (B, G, D, pixels)"""
        x = v.new_zeros(self.B, self.G, self.C // self.G, (self.H + 2 * self.edge) * self.S + 2 * self.edge)
        self._inside(x).copy_(v.unflatten(3, (self.G, -1)).permute(0, 3, 4, 1, 2))
        return x

    def inputs(self, x):
        """The reverse of padded."""
        return self._inside(x).flatten(1, 2).permute(0, 2, 3, 1)

    def _inside(self, x):
        first = self.edge * (self.S + 1)
        return x[..., first:first + self.H * self.S].unflatten(3, (self.H, self.S))[..., :self.W]

    def taps(self):
        """(t, rows of outputs, function from what padded gives to a view of what these rows read), for the taps that read any of the image.

        Small maps have many that read none: on 2 x 2 pixels, 40 of the 49 of a 7 x 7 window.
        """
        rows = [self._overlap(i, self.H, self.Ho) for i in range(self.k)]
        columns = [self._overlap(j, self.W, self.Wo) for j in range(self.k)]
        for i, (first, last) in enumerate(rows):
            for j, (left, right) in enumerate(columns):
                if first <= last and left <= right:
                    yield i * self.k + j, slice(first, last + 1), self._reader(i, j, first, last + 1 - first)

    def _reader(self, i, j, first, rows):
        offset = (first * self.stride + i * self.dilation) * self.S + j * self.dilation
        return lambda x: x.as_strided((*x.shape[:3], rows, self.So), (*x.stride()[:3], self.stride * self.S, self.stride), offset)

    def _overlap(self, i, size, out_size):
        """First and last output y along one axis with 0 <= y * stride + offset < size."""
        offset = (i - self.k // 2) * self.dilation
        return max(0, -(offset // self.stride)), min(out_size - 1, (size - 1 - offset) // self.stride)

    def tap(self, mul, t, part):
        """Tap t of the multiplicative filter, ready to multiply (B, G, D, rows, So)."""
        return (mul[part] if mul.ndim == 4 else mul).flatten(-2)[..., t].reshape(-1, self.G, self.C // self.G, 1, 1)


def _wide(x):
    """Sums are float32; float64 stays."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def _channels_last(x):
    return x.permute(0, 2, 3, 1)


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
        plan = _Plan(v, 1, kernel_size, dilation, stride)
        source, go_rows = plan.padded(v), plan.outputs(go)
        for t, rows, read in plan.taps():
            per_sample = (go_rows[..., rows, :] * read(source)).sum((3, 4)).flatten(1)  # (B, C)
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
    # One at a time: asked for both, the library takes half as long again on large maps.
    grads = [torch.ops.aten.convolution_backward(go, x, weight, None, (stride, stride), (padding, padding), (dilation, dilation), False, (0, 0),
                                                 groups, [i == wanted for i in range(3)])[wanted] if needed else None
             for wanted, needed in enumerate((needs[0], needs[3]))]
    dv = None if grads[0] is None else _channels_last(grads[0].reshape(v.shape[0], v.shape[3], *v.shape[1:3])).contiguous()
    return dv, dadd if grads[1] is None else grads[1].reshape(add.shape)


def _as_convolution(v, add):
    x = v.permute(0, 3, 1, 2)
    if add.ndim == 4:
        x = x.reshape(1, -1, *x.shape[2:])
    return x, add.reshape(-1, 1, *add.shape[-2:]), x.shape[1]
