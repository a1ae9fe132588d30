"""Enhanced local self-attention: the layer.

Source: Zhou et al., "ELSA: Enhanced Local Self-Attention for Vision Transformer", arXiv 2112.12786, section 3.
Names, saved shapes and initialisation of the parameters are those of the published layer, so that its weights load as
they are.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import backend, elsa_attention, hadamard


class Pointwise(nn.Linear):
    """A linear layer over channels, saved as the 1x1 convolution that the published layer has: (out, in, 1, 1)."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"][:, :, None, None]

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        key = f"{prefix}weight"
        if key in state_dict and state_dict[key].shape[2:] == (1, 1):
            state_dict[key] = state_dict[key].flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class HadamardConvolution(nn.Conv2d):
    """GELU(convolution of scale * q * k): q, k (B, H, W, Q) -> the same shape."""

    def __init__(self, scale, *args, **options):
        super().__init__(*args, **options)
        self.scale = scale

    def forward(self, q, k):
        return hadamard(q, k, self.weight, self.bias, scale=self.scale, dilation=self.dilation[0])


class LogitsProjection(Pointwise):
    """(B, Ho, Wo, Q) -> (B, Ho, Wo, G * K), in the memory in which the kernels read the pixels of one tap side by side.

    A linear layer would write the taps of one pixel so. For the Triton kernels one product makes (G * K, B, Ho, Wo),
    and so do its gradients. On a CPU a product an image makes (B, G * K, Ho, Wo), in whose backward pass there is one
    weight gradient an image: maps smaller than a window, where that costs the most, are a linear layer's.
    """

    def __init__(self, dim_qk, num_logits, window):
        super().__init__(dim_qk, num_logits)
        self.window = window  # pixels

    def forward(self, z):
        exporting = torch.compiler.is_exporting()  # a file is for any size, and for any device
        if not exporting and backend.uses_triton(z) and z[..., 0].numel() * self.out_features < 2 ** 31:
            logits = torch.addmm(self.bias[:, None], self.weight, z.flatten(0, 2).T)
            return logits.unflatten(1, z.shape[:3]).permute(1, 2, 3, 0)
        if not exporting and z.shape[1] * z.shape[2] < self.window:
            return super().forward(z)
        weight = self.weight.expand(z.shape[0], -1, -1)  # (B, G * K, Q)
        logits = torch.baddbmm(self.bias[:, None], weight, z.flatten(1, 2).transpose(1, 2))
        return logits.unflatten(2, z.shape[1:3]).permute(0, 2, 3, 1)


class ELSA(nn.Module):
    """Local attention whose logits come from a convolution over the Hadamard product q * k, with ghost filters.

        h      = scale * q * k                              (B, H, W, Q), mean over stride x stride when stride > 1
        logits = conv1x1(GELU(grouped conv kxk(h)))         G * K channels, head-major, then tap row-major
        f      = softmax(logits) * mul**lam + gamma * add   mul, add: the ghost filters, (C, k, k) each
        out    = Linear(sum over the k x k taps of f * v)

    Args:
        dim: channels of input and output.
        num_heads: heads G; must divide dim_v.
        dim_qk: channels Q of q and of k, rounded up to a multiple of group_width; default dim // 3 * 2.
        dim_v: channels C of v; default dim.
        kernel_size: odd side k of the window; K = k * k taps.
        stride: output pixel (y, x) is centred on input pixel (y * stride, x * stride).
        dilation: distance between taps, in pixels.
        qkv_bias: whether the projection to q, k, v has a bias.
        qk_scale: scale; default head_dim ** -0.5 with head_dim = dim_v // num_heads. The published models use 1.
        attn_drop, proj_drop: dropout on the softmax and on the output.
        group_width: channels in a group of the kxk convolution.
        groups: groups of the 1x1 convolution that writes the logits.
        lam: exponent of the multiplicative ghost filter, a whole number because the filter has negative entries; 0: no
            such filter.
        gamma: factor of the additive ghost filter; 0: no such filter.
        hadamard, softmax: False leaves this part out, for ablation: h = scale * q, and no projection to k; f from the
            bare logits.

    Shapes: x (B, H, W, dim), any floating dtype -> (B, H // stride, W // stride, dim).
    Raises ValueError for an argument or an input that does not fit the above.
    """

    def __init__(self, dim, num_heads, dim_qk=None, dim_v=None, kernel_size=5, stride=1, dilation=1, qkv_bias=False,
                 qk_scale=None, attn_drop=0.0, proj_drop=0.0, group_width=8, groups=1, lam=1, gamma=1, hadamard=True,
                 softmax=True):
        super().__init__()
        sizes = dict(dim=dim, num_heads=num_heads, kernel_size=kernel_size, stride=stride, dilation=dilation,
                     group_width=group_width, groups=groups)
        for name, value in sizes.items():
            _check(isinstance(value, int) and value > 0, name, value, "a positive whole number")
        dim_v = dim_v or dim
        dim_qk = math.ceil((dim_qk or dim // 3 * 2) / group_width) * group_width
        num_logits = num_heads * kernel_size ** 2
        _check(kernel_size % 2 == 1, "kernel_size", kernel_size, "an odd number, so that the window has a centre")
        _check(dim_v % num_heads == 0, "num_heads", num_heads, f"a divisor of dim_v = {dim_v}")
        _check(dim_qk > 0, "dim", dim, "at least 3, or dim_qk given explicitly")
        _check(dim_qk % groups == 0 and num_logits % groups == 0, "groups", groups,
               f"a divisor of dim_qk = {dim_qk} and of num_heads * kernel_size ** 2 = {num_logits}")
        _check(lam >= 0 and lam == int(lam), "lam", lam,
               "a whole number >= 0: the multiplicative ghost filter has negative entries")
        self.dim, self.dim_qk, self.dim_v, self.num_heads = dim, dim_qk, dim_v, num_heads
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.lam, self.gamma, self.hadamard, self.softmax = lam, gamma, hadamard, softmax
        self.scale = qk_scale or (dim_v // num_heads) ** -0.5

        self.pre_proj = Pointwise(dim, (1 + hadamard) * dim_qk + dim_v, bias=qkv_bias)
        convolution = dict(padding=kernel_size // 2 * dilation, dilation=dilation, groups=dim_qk // group_width)
        self.attn = nn.Sequential(
            HadamardConvolution(self.scale, dim_qk, dim_qk, kernel_size, **convolution)
            if hadamard and stride == 1 else nn.Conv2d(dim_qk, dim_qk, kernel_size, **convolution),
            nn.GELU(),
            LogitsProjection(dim_qk, num_logits, kernel_size ** 2)
            if groups == 1 else nn.Conv2d(dim_qk, num_logits, 1, groups=groups))
        ghosts = []
        if lam:
            ghosts.append(torch.randn(1, dim_v, kernel_size, kernel_size))
        if gamma:
            ghosts.append(nn.init.trunc_normal_(torch.empty(1, dim_v, kernel_size, kernel_size), std=0.02))
        if len(ghosts) == 2:
            self.ghost_head = nn.Parameter(torch.stack(ghosts))  # (2, 1, C, k, k): mul, add
        else:
            self.ghost_head = nn.Parameter(ghosts[0]) if ghosts else None  # (1, C, k, k)
        self.attn_drop = nn.Dropout(attn_drop)
        self.post_proj = nn.Linear(dim_v, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; ELSA expects (B, H, W, {self.dim}): "
                             "permute channels-first maps first")
        *qk, v = self.pre_proj(x).split([self.dim_qk] * (1 + self.hadamard) + [self.dim_v], dim=-1)
        convolution, gelu, projection = self.attn
        if self.hadamard and self.stride == 1:
            z = convolution(*qk)  # (B, H, W, Q)
        else:
            h = (qk[0] * qk[1] if self.hadamard else qk[0]) * self.scale
            z = gelu(convolution(F.avg_pool2d(h.permute(0, 3, 1, 2), self.stride))).permute(0, 2, 3, 1)
        if isinstance(projection, nn.Conv2d):
            logits = projection(z.permute(0, 3, 1, 2))  # (B, G * K, Ho, Wo)
        else:
            logits = projection(z).permute(0, 3, 1, 2)

        dropping = self.training and self.attn_drop.p > 0
        if dropping:  # between the softmax and the aggregation, so the softmax cannot stay inside the operator
            logits = logits.unflatten(1, (self.num_heads, -1))
            logits = self.attn_drop(logits.softmax(2) if self.softmax else logits).flatten(1, 2)
        mul, add = self.ghost_filters()
        out = elsa_attention(
            v, logits, mul, add, kernel_size=self.kernel_size, dilation=self.dilation, stride=self.stride,
            lam=self.lam, gamma=self.gamma, normalize=self.softmax and not dropping)  # (B, Ho, Wo, C)
        return self.proj_drop(self.post_proj(out))

    def ghost_filters(self):
        """The multiplicative and the additive filter, (C, k, k) each, or None where switched off."""
        if self.lam and self.gamma:
            return self.ghost_head.flatten(0, 1).unbind()
        mul = self.ghost_head.flatten(0, 1) if self.lam else None
        add = self.ghost_head.flatten(0, 1) if self.gamma else None
        return mul, add


def _check(fits, name, value, expected):
    if not fits:
        raise ValueError(f"{name} = {value!r} does not fit ELSA; expected {expected}")
