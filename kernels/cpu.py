"""ELSA's aggregation on the CPU: a loop over the taps, one fused multiply-add a tap.

v is laid out channel by channel, with zeros between the rows of the image. There a tap is one distance for all pixels,
so that the inner loop of a tap runs over a whole image at once. No K-fold copy of v is made. The additive part of the
filters is a depth-wise convolution. 16-bit inputs are computed in float32.
"""
import torch
import torch.nn.functional as F

CHUNK = 640_000  # elements of v at a time: what a tap reads and writes then stays in the cache


def forward(v, logits, mul, add, kernel_size, dilation, stride, normalize):
    """As :func:`kernels.aggregation.forward`: out (B, Ho, Wo, C), and an lse of zeros.

    The backward pass here takes the softmax again.
    """
    dtype = v.dtype
    v, logits, mul, add = _upcast(v, logits, mul, add)
    B, H, W, C = v.shape
    Ho, Wo = H // stride, W // stride
    if add is None:
        out = v.new_zeros(B, Ho, Wo, C)
    else:
        out = _channels_last(_depthwise(v, add, kernel_size, dilation, stride)[:, :, :Ho, :Wo]).contiguous()
    if logits is None:
        return out.to(dtype), v.new_empty(0)
    heads = logits.shape[1] // kernel_size ** 2
    for chunk in _chunks(v):
        layout = _Layout(v[chunk], heads, kernel_size, dilation, stride)
        a = layout.attention(logits[chunk], normalize).unsqueeze(3).unbind(2)  # of every tap (B, G, 1, Ho, out_pitch)
        source = layout.padded(v[chunk])
        sums = v.new_zeros(layout.B, heads, C // heads, Ho, layout.out_pitch)
        scratch = None if mul is None else torch.empty_like(sums)
        for t, rows, read in layout.taps():
            v_t = read(source)
            if mul is not None:
                v_t = torch.mul(v_t, layout.tap(mul, t, chunk), out=scratch[..., rows, :])
            sums[..., rows, :].addcmul_(v_t, a[t][..., rows, :])
        out[chunk].add_(layout.pixels(sums))
    return out.to(dtype), v.new_zeros(B, heads, 2, Ho, Wo) if normalize else v.new_empty(0)


def backward(grad_out, v, logits, mul, add, lse, kernel_size, dilation, stride, normalize, needs):
    """As :func:`kernels.aggregation.backward`: (dv, dlogits, dmul, dadd), None where `needs` says so."""
    dtypes = [None if x is None else x.dtype for x in (v, logits, mul, add)]
    dlogits = torch.empty_like(logits) if needs[1] else None
    go, v, logits, mul, add = _upcast(grad_out.contiguous(), v, logits, mul, add)
    dv = dmul = dadd = None
    if add is not None and (needs[0] or needs[3]):
        dv, dadd = _depthwise_backward(go, v, add, kernel_size, dilation, stride, needs)
    if logits is not None:
        heads = logits.shape[1] // kernel_size ** 2
        dv = torch.zeros(v.shape, dtype=v.dtype) if needs[0] and dv is None else dv
        dmul = torch.zeros(mul.shape, dtype=mul.dtype) if needs[2] else None  # contiguous, so that flatten is a view
        for chunk in _chunks(v):
            layout = _Layout(v[chunk], heads, kernel_size, dilation, stride)
            _attention_backward(layout, chunk, go, v, logits, mul, normalize, dv if needs[0] else None, dlogits, dmul)
    return [x if x is None else x.to(dtype) for x, dtype in zip((dv, dlogits, dmul, dadd), dtypes)]


def _attention_backward(layout, chunk, go, v, logits, mul, normalize, dv, dlogits, dmul):
    """What the attention part of the filters gives to dv and dmul, and dlogits; those that are not None."""
    a, source, go = layout.attention(logits[chunk], normalize), layout.padded(v[chunk]), layout.outputs(go[chunk])
    sink = None if dv is None else torch.zeros_like(source)
    da = None if dlogits is None else torch.zeros_like(a)
    weighted, scratch = None if mul is None else torch.empty_like(go), torch.empty_like(go)
    for t, rows, read in layout.taps():
        go_t, a_t = go[..., rows, :], a[:, :, t, None, rows]
        go_mul = go_t
        if mul is not None:
            go_mul = torch.mul(go_t, layout.tap(mul, t, chunk), out=weighted[..., rows, :])
        if dv is not None:
            read(sink).addcmul_(go_mul, a_t)
        if dlogits is not None:
            torch.sum(torch.mul(go_mul, read(source), out=scratch[..., rows, :]), 2, out=da[:, :, t, rows])
        if dmul is not None:
            product = torch.mul(go_t, read(source), out=scratch[..., rows, :])
            product[..., layout.Wo:] = 0  # of a NaN that no output reads, too
            per_sample = product.mul_(a_t).sum((3, 4)).flatten(1)  # (B, C)
            if mul.ndim == 4:
                dmul.flatten(-2)[chunk][..., t] = per_sample
            else:
                dmul.flatten(-2)[..., t] += per_sample.sum(0)
    if dv is not None:
        dv[chunk].add_(layout.inputs(sink))
    if dlogits is not None:
        if normalize:
            da = a * da.sub_((a * da).sum(2, keepdim=True))
        dlogits[chunk] = da[..., :layout.Wo].flatten(1, 2)


def _chunks(v):
    """Slices of the batch."""
    step = max(1, CHUNK // (v.shape[1] * v.shape[2] * v.shape[3]))
    return [slice(start, start + step) for start in range(0, v.shape[0], step)]


class _Layout:
    """Layouts (B, G, head width, ...) of one chunk.

    Inputs: pixel (y, x) at (y + edge) * pitch + x + edge, pitch = W + edge, zero elsewhere, so that what is left of a
    row is right of the row before. Outputs: Ho rows of out_pitch pixels, of which Wo count; with a stride of one
    out_pitch is pitch, so that rows of inputs and outputs are equally far apart, and all of them one loop.
    """

    def __init__(self, v, heads, kernel_size, dilation, stride):
        self.B, self.H, self.W, self.C = v.shape
        self.G, self.kernel_size, self.stride = heads, kernel_size, stride
        self.dilation = min(dilation, max(self.H, self.W))  # from there on a tap beside the centre is outside
        self.Ho, self.Wo = self.H // stride, self.W // stride
        self.edge = kernel_size // 2 * self.dilation
        self.pitch = self.W + self.edge
        self.out_pitch = self.pitch if stride == 1 else self.Wo

    def attention(self, logits, normalize):
        """(B, G, K, Ho, out_pitch)"""
        a = logits.reshape(self.B, self.G, self.kernel_size ** 2, self.Ho * self.Wo)
        return self._spaced((a.softmax(2) if normalize else a).unflatten(3, (self.Ho, self.Wo)))

    def outputs(self, x):
        """(B, Ho, Wo, C) -> (B, G, head width, Ho, out_pitch)"""
        return self._spaced(x.unflatten(3, (self.G, -1)).permute(0, 3, 4, 1, 2))

    def _spaced(self, x):
        """Zeros behind every row."""
        out = x.new_empty(*x.shape[:4], self.out_pitch)
        out[..., :self.Wo] = x
        out[..., self.Wo:] = 0
        return out

    def pixels(self, x):
        """The reverse of outputs."""
        return x[..., :self.Wo].flatten(1, 2).permute(0, 2, 3, 1)

    def padded(self, v):
        """(B, H, W, C) -> (B, G, head width, pixels)"""
        pixels = (self.H + 2 * self.edge) * self.pitch + 2 * self.edge
        x = v.new_zeros(self.B, self.G, self.C // self.G, pixels)
        self._inside(x).copy_(v.unflatten(3, (self.G, -1)).permute(0, 3, 4, 1, 2))
        return x

    def inputs(self, x):
        """The reverse of padded."""
        return self._inside(x).flatten(1, 2).permute(0, 2, 3, 1)

    def _inside(self, x):
        first = self.edge * (self.pitch + 1)
        return x[..., first:first + self.H * self.pitch].unflatten(3, (self.H, self.pitch))[..., :self.W]

    def taps(self):
        """For each tap that reads any of the image: t, rows of outputs, and a function.

        The function makes from what `padded` gives a view of what these rows read. Small maps have many taps that read
        nothing: on 2 x 2 pixels, 40 of the 49 of a 7 x 7 window.
        """
        rows = [self._overlap(i, self.H, self.Ho) for i in range(self.kernel_size)]
        columns = [self._overlap(j, self.W, self.Wo) for j in range(self.kernel_size)]
        for i, (first, last) in enumerate(rows):
            for j, (left, right) in enumerate(columns):
                if first <= last and left <= right:
                    reader = self._reader(i, j, first, last + 1 - first)
                    yield i * self.kernel_size + j, slice(first, last + 1), reader

    def _reader(self, i, j, first, num_rows):
        offset = (first * self.stride + i * self.dilation) * self.pitch + j * self.dilation
        steps = self.stride * self.pitch, self.stride
        return lambda x: x.as_strided((*x.shape[:3], num_rows, self.out_pitch), (*x.stride()[:3], *steps), offset)

    def _overlap(self, i, size, out_size):
        """First and last output y along one axis with 0 <= y * stride + offset < size."""
        offset = (i - self.kernel_size // 2) * self.dilation
        return max(0, -(offset // self.stride)), min(out_size - 1, (size - 1 - offset) // self.stride)

    def tap(self, mul, t, chunk):
        """Tap t of the multiplicative filter, ready to multiply (B, G, head width, rows, out_pitch)."""
        mul = mul[chunk] if mul.ndim == 4 else mul
        return mul.flatten(-2)[..., t].reshape(-1, self.G, self.C // self.G, 1, 1)


def _upcast(first, *rest):
    """All in the dtype of sums: float32, or float64 where the first one is."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    return [x if x is None else x.to(dtype) for x in (first, *rest)]


def _channels_last(x):
    return x.permute(0, 2, 3, 1)


def _depthwise(v, add, kernel_size, dilation, stride):
    """The additive filters as a depth-wise convolution, NCHW; per-sample filters fold the batch into the groups."""
    x, weight, groups = _as_convolution(v, add)
    y = F.conv2d(x, weight, None, stride, kernel_size // 2 * dilation, dilation, groups)
    return y.reshape(v.shape[0], v.shape[3], *y.shape[2:])


def _depthwise_backward(go, v, add, kernel_size, dilation, stride, needs):
    """(dv, dadd), None where not needed."""
    dadd = None
    if needs[3] and go.shape[1] * go.shape[2] < kernel_size ** 2:
        # The library's weight gradient takes milliseconds even on 2 x 2 pixels, where few taps lie in the image.
        dadd = _dadd_tap_by_tap(go, v, add, kernel_size, dilation, stride)
        if not needs[0]:
            return None, dadd
    x, weight, groups = _as_convolution(v, add)
    edge, (H, W), (Ho, Wo) = kernel_size // 2 * dilation, v.shape[1:3], go.shape[1:3]
    edges, padding = (0, 0, 0, 0), edge
    if H % stride or W % stride:
        # A convolution yields ceil(H / stride) rows where the operator yields H // stride. Its image is cut or padded
        # so that it yields as many: zeros for the gradient of the others, times NaN, would be NaN.
        edges, padding = (edge, (Wo - 1) * stride + edge + 1 - W, edge, (Ho - 1) * stride + edge + 1 - H), 0
        x = F.pad(x, edges)
    go = go.permute(0, 3, 1, 2).reshape(*x.shape[:2], Ho, Wo)

    def gradient(wanted):
        # One at a time: asked for both, the library takes half as long again on large maps.
        return torch.ops.aten.convolution_backward(
            go, x, weight, None, (stride, stride), (padding, padding), (dilation, dilation), False, (0, 0), groups,
            [index == wanted for index in range(3)])[wanted]

    dv = None
    if needs[0]:
        dx = gradient(0)
        dx = F.pad(dx, [-n for n in edges]) if any(edges) else dx
        dv = _channels_last(dx.reshape(v.shape[0], v.shape[3], H, W)).contiguous()
    if needs[3] and dadd is None:
        dadd = gradient(1).reshape(add.shape).contiguous()
    return dv, dadd


def _dadd_tap_by_tap(go, v, add, kernel_size, dilation, stride):
    dadd = torch.zeros(add.shape, dtype=add.dtype)  # contiguous, so that flatten is a view
    layout = _Layout(v, 1, kernel_size, dilation, stride)
    source, go = layout.padded(v), layout.outputs(go)
    for t, rows, read in layout.taps():
        product = go[..., rows, :] * read(source)
        product[..., layout.Wo:] = 0
        per_sample = product.sum((3, 4)).flatten(1)  # (B, C)
        dadd.flatten(-2)[..., t] = per_sample if add.ndim == 4 else per_sample.sum(0)
    return dadd


def _as_convolution(v, add):
    """(input, weight, groups) for torch's convolution."""
    x = v.permute(0, 3, 1, 2)
    if add.ndim == 4:
        x = x.reshape(1, -1, *x.shape[2:])
    return x, add.reshape(-1, 1, *add.shape[-2:]), x.shape[1]
