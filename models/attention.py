"""Local attention and its counterparts, all (B, H, W, C) -> (B, H, W, C): what `attn` chooses, in Swin and in VOLO.

The ones made here share a frame with ELSA: a linear projection to values, weights for the k x k neighbours of every
pixel, a linear projection of the weighted sum. They differ in where the weights come from:

                    one set for          the weights come from
    window          a head, a pixel      q . k plus a bias, inside fixed windows (Swin: arXiv 2103.14030)
    neighborhood    a head, a pixel      q . k plus a bias, in a window around the pixel (arXiv 1906.05909, 1904.11491)
    outlook         a head, 2 x 2        the pixels alone, by one linear layer (VOLO: arXiv 2106.13112)
    dwconv          a channel            nothing: they are learnt, and the same everywhere (arXiv 2106.04263)
    ddf, ddf_add    a channel, a pixel   product, or sum, of a filter a pixel and a filter a channel (arXiv 2104.14107)
    elsa            a channel, a pixel   convolution of q * k, and learnt ghost filters (arXiv 2112.12786; elsa.py)

and, of ELSA, without one of its parts: elsa_no_hadamard (q instead of q * k), elsa_no_softmax, elsa_no_ghost_mul
(lam = 0), elsa_no_ghost_add (gamma = 0).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import elsa_attention
from models.elsa import ELSA

ABLATIONS = {
    "elsa_no_hadamard": dict(hadamard=False),
    "elsa_no_softmax": dict(softmax=False),
    "elsa_no_ghost_mul": dict(lam=0),
    "elsa_no_ghost_add": dict(gamma=0),
}
ATTENTIONS = ("window", "elsa", "outlook", "neighborhood", "dwconv", "ddf", "ddf_add", *ABLATIONS)


def local_attention(attn, dim, num_heads, *, kernel_size, window, elsa):
    """The layer that `attn`, one of ATTENTIONS, names.

    kernel_size: side of the neighbourhood, of all but window and outlook. window: arguments of WindowAttention; elsa:
    of ELSA.
    """
    if attn == "window":
        return WindowAttention(dim, num_heads, **window)
    if attn == "outlook":
        return OutlookAttention(dim, num_heads)
    if attn == "neighborhood":
        return NeighborhoodAttention(dim, num_heads, kernel_size)
    if attn == "dwconv":
        return DepthwiseConvolution(dim, kernel_size)
    if attn in ("ddf", "ddf_add"):
        return DecoupledDynamicFilter(dim, num_heads, kernel_size, combine="add" if attn == "ddf_add" else "mul")
    return ELSA(dim, num_heads, kernel_size=kernel_size, **{**elsa, **ABLATIONS.get(attn, {})})


class WindowAttention(nn.Module):
    """Self-attention inside windows, cyclically shifted by `shift` pixels, with a relative position bias.

    Maps are padded right and bottom with zeros to whole windows; the padding is attended to, as published. An axis
    that fits into one window is not shifted, unless always_shift. Shapes: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim, num_heads, window_size, shift, always_shift=False):
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads, self.window_size = num_heads, window_size
        self.shift, self.always_shift = shift, always_shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = _bias_table((2 * window_size - 1) ** 2, num_heads)  # of query minus key
        self.register_buffer("relative_position_index", self.index(), persistent=False)

    def index(self, device=None):
        """Which entry of the table is of query and key: (N, N), queries x keys."""
        offsets = 2 * self.window_size - 1
        side = torch.arange(self.window_size, device=device)
        positions = (side[:, None] * offsets + side).flatten()  # (N,)
        return positions[:, None] - positions + offsets ** 2 // 2  # of offset (0, 0) the entry in the middle

    def _apply(self, fn, recurse=True):
        """Wherever the tensors go: to_empty would leave an index without numbers."""
        super()._apply(fn, recurse)
        self.relative_position_index = self.index(self.relative_position_index.device)
        return self

    def forward(self, x):
        B, H, W, C = x.shape
        w, G = self.window_size, self.num_heads
        rows, columns = (H + w - 1) // w, (W + w - 1) // w  # of windows
        x = F.pad(x, (0, 0, 0, columns * w - W, 0, rows * w - H))
        # 0 along an axis of one window, by arithmetic: in an exported file the number of windows may be open.
        shifts = [self.shift if self.always_shift else self.shift * (1 - 1 // count) for count in (rows, columns)]
        shifted = any(shift if isinstance(shift, int) else True for shift in shifts)
        if shifted:
            x = x.roll((-shifts[0], -shifts[1]), (1, 2))

        qkv = self.qkv(x).reshape(B, rows, w, columns, w, 3, G, C // G)
        # Windows join the heads: one bias for all images is then broadcast over the batch instead of copied.
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B, rows * columns * G, w * w, C // G)
        q, k, v = qkv  # (B, windows * G, N, D)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (G, N, N)
        if shifted:
            bias = bias + self.shift_mask(rows, columns, shifts, x.device)[:, None]  # (windows, G, N, N)
        else:
            bias = bias.expand(rows * columns, -1, -1, -1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None].to(q.dtype))

        x = x.reshape(B, rows, columns, G, w, w, C // G).permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows, w, columns, w, G, D)
        x = x.reshape(B, rows * w, columns * w, C)
        if shifted:
            x = x.roll(shifts, (1, 2))
        return self.proj(x[:, :H, :W])

    def shift_mask(self, rows, columns, shifts, device):
        """(windows, N, N): -100 where the shift brought query and key from opposite edges into one window, else 0."""
        w = self.window_size
        wrapped = []
        for count, shift in zip((rows, columns), shifts):
            positions = torch.arange(count * w, device=device)
            wrapped.append((positions >= count * w - shift).reshape(count, w))  # came round the edge
        y, x = wrapped
        region = (2 * y[:, None, :, None] + x[None, :, None]).reshape(rows * columns, w * w)  # (windows, N)
        return (region[:, None] != region[:, :, None]) * -100.0


class OutlookAttention(nn.Module):
    """Attention weights straight from the centre of a window, for all pairs of pixels in it.

    3 x 3 windows lie around every second pixel of every second row. The mean of the 2 x 2 pixels there gives, by one
    linear layer, 9 x 9 weights a head: how much of each pixel of the window goes to each. A pixel of an odd row or
    column lies in several windows and adds up what they send it. Shapes: (B, H, W, C) -> (B, H, W, C).
    Source: arXiv 2106.13112, section 3.1.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.v = nn.Linear(dim, dim, bias=False)
        self.attn = nn.Linear(dim, 81 * num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, H, W, C = x.shape
        G = self.num_heads
        centers = F.avg_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1)  # (B, h, w, C)
        h, w = centers.shape[1:3]
        weights = (self.attn(centers) * (C // G) ** -0.5).view(B, h, w, G, 9, 9).softmax(-1)

        v = F.pad(self.v(x), (0, 0, 0, W % 2, 0, H % 2)).view(B, h, 2, w, 2, G, C // G)
        v = self.unfold(self.unfold(v, 1), 3).permute(0, 1, 3, 5, 2, 4, 6)  # (B, h, w, G, 3, 3, D)
        out = (weights @ v.flatten(4, 5)).view_as(v)
        out = self.fold(*out.unbind(4), dim=1)  # (B, 2h, w, G, 3, D)
        out = self.fold(*out.unbind(4), dim=2)  # (B, 2h, 2w, G, D)
        return self.proj(out.flatten(3)[:, :H, :W])

    @staticmethod
    def unfold(v, dim):
        """Pairs of pixels 2i, 2i + 1 along `dim` and `dim` + 1 -> triples 2i - 1, 2i, 2i + 1; pixel -1 is zero."""
        odd = v.narrow(dim + 1, 1, 1)
        before = [torch.zeros_like(odd.narrow(dim, 0, 1)), odd.narrow(dim, 0, odd.shape[dim] - 1)]
        return torch.cat([torch.cat(before, dim), v], dim + 1)

    @staticmethod
    def fold(before, center, after, dim):
        """The reverse, adding where windows meet: what triples i send to 2i - 1, 2i, 2i + 1 -> pixels along `dim`."""
        n = before.shape[dim]
        from_next = torch.cat([before.narrow(dim, 1, n - 1), torch.zeros_like(before.narrow(dim, 0, 1))], dim)
        return torch.stack([center, from_next + after], dim + 1).flatten(dim, dim + 1)


class NeighborhoodAttention(nn.Module):
    """Self-attention of every pixel to the k x k pixels around it, with a relative position bias.

    At the borders the window is cut: the softmax is over the pixels inside the image. (NATTEN moves the window inside
    instead.) Shapes: (B, H, W, C) -> (B, H, W, C). Sources: arXiv 1906.05909, 1904.11491.
    """

    def __init__(self, dim, num_heads, kernel_size):
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = _bias_table(num_heads, kernel_size ** 2)

    def forward(self, x):
        B, H, W, C = x.shape
        G, k = self.num_heads, self.kernel_size
        q, keys, v = self.qkv(x).split(C, -1)
        q = (q * (C // G) ** -0.5).unflatten(-1, (G, -1))  # (B, H, W, G, D)
        keys = F.pad(keys, (0, 0, k // 2, k // 2, k // 2, k // 2)).unflatten(-1, (G, -1))
        logits = [(q * keys[:, i:i + H, j:j + W]).sum(-1) for i in range(k) for j in range(k)]  # K times (B, H, W, G)
        bias = self.relative_position_bias_table[..., None, None].to(x.dtype)
        logits = torch.stack(logits, 1).permute(0, 4, 1, 2, 3) + bias  # (B, G, K, H, W)
        logits = logits.masked_fill(self.outside(H, W, x.device), float("-inf")).flatten(1, 2)
        return self.proj(elsa_attention(v, logits, kernel_size=k))

    def outside(self, H, W, device):
        """Which taps leave the image: (K, H, W) bool."""
        k, outside = self.kernel_size, []
        for size in (H, W):
            taps = torch.arange(k, device=device)[:, None] - k // 2
            positions = torch.arange(size, device=device) + taps  # (k, size)
            outside.append((positions < 0) | (positions >= size))
        rows, columns = outside
        return (rows[:, None, :, None] | columns[None, :, None, :]).flatten(0, 1)


class DepthwiseConvolution(nn.Module):
    """One learnt k x k filter a channel, between two linear layers: (B, H, W, C) -> (B, H, W, C).

    Source: arXiv 2106.04263.
    """

    def __init__(self, dim, kernel_size):
        super().__init__()
        self.kernel_size = kernel_size
        self.v = nn.Linear(dim, dim)
        weight = nn.init.kaiming_uniform_(torch.empty(dim, 1, kernel_size, kernel_size), a=5 ** 0.5)  # as nn.Conv2d
        self.filter = nn.Parameter(weight[:, 0])
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(elsa_attention(self.v(x), None, None, self.filter, kernel_size=self.kernel_size))


class DecoupledDynamicFilter(nn.Module):
    """Filters of two parts that depend on the input: one a pixel and head, one a channel, combined by "mul" or "add".

    The pixels' part is a linear layer; the channels' part two, with a fifth of the width between, of the mean pixel.
    Both are normalised over their k x k taps, to a learnt standard deviation the latter.
    Shapes: (B, H, W, C) -> (B, H, W, C). Source: arXiv 2104.14107, sections 3.2 and 3.3.
    """

    def __init__(self, dim, num_heads, kernel_size, combine):
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads, self.kernel_size, self.combine = num_heads, kernel_size, combine
        self.scale = 2 ** 0.5 / kernel_size  # of a normalised filter, as published
        hidden = max(1, dim // 5)
        self.v = nn.Linear(dim, dim)
        self.spatial = nn.Linear(dim, num_heads * kernel_size ** 2)
        self.channel = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim * kernel_size ** 2))
        self.deviation = nn.Parameter(self.scale * torch.randn(dim, kernel_size ** 2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        C, G, k = x.shape[3], self.num_heads, self.kernel_size
        spatial = self.spatial(x).permute(0, 3, 1, 2).unflatten(1, (G, k * k))  # (B, G, K, H, W)
        spatial = self.normalised(spatial, 2) * self.scale
        channel = self.channel(x.mean((1, 2))).unflatten(1, (C, k * k))  # (B, C, K)
        channel = self.normalised(channel, 2) * self.deviation
        ghost = "ghost_mul" if self.combine == "mul" else "ghost_add"
        filters = {ghost: channel.unflatten(2, (k, k)).to(x.dtype)}
        v = self.v(x)
        logits = spatial.flatten(1, 2).to(v.dtype)
        return self.proj(elsa_attention(v, logits, **filters, kernel_size=k, normalize=False))

    @staticmethod
    def normalised(filters, dim):
        filters = filters - filters.mean(dim, keepdim=True)
        return filters / (filters.std(dim, keepdim=True) + 1e-6)


def _bias_table(*shape):
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))


def _check_heads(dim, num_heads):
    if dim % num_heads:
        raise ValueError(f"num_heads = {num_heads} does not fit a stage of {dim} channels; give a divisor of {dim}")
