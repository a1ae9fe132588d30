"""models/attention.py: every layer against a loop over pixels, and each of them in the models."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import BACKENDS, backend
from kernels import elsa_attention_reference
from models import create_model
from models.attention import (
    ATTENTIONS,
    DecoupledDynamicFilter,
    DepthwiseConvolution,
    NeighborhoodAttention,
    OutlookAttention,
    WindowAttention,
    local_attention,
)
from published import assert_close

SMALL = {
    "swin_t": dict(embed_dim=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=2, kernel_size=3),
    "volo_d1": dict(embed_dim=12, depths=(2, 1, 1, 1), num_heads=(2, 3), stem_dim=8, window_size=3),
}
sizes = dict(H=st.integers(1, 5), W=st.integers(1, 5), heads=st.integers(1, 3), width=st.integers(1, 4),
             k=st.sampled_from([1, 3, 5]), seed=st.integers(0, 999))


def neighbours(y, x, k, H, W):
    """(tap, y, x) of those of the k x k neighbours that are in the image."""
    r = k // 2
    taps = [(i * k + j, y + i - r, x + j - r) for i in range(k) for j in range(k)]
    return [(t, i, j) for t, i, j in taps if 0 <= i < H and 0 <= j < W]


def randomised(layer, seed):
    """The layer in float64, every parameter random."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return layer


def check(layer, naive, shape, seed, ratio=1e-9, backends=("cpu",)):
    """Output and all gradients of a layer against those of a naive function of the input."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    expected = naive(x)
    generator = torch.Generator().manual_seed(seed + 1)
    grad_out = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    inputs = [x, *layer.parameters()]
    references = torch.autograd.grad((expected * grad_out).sum(), inputs, allow_unused=True)
    for kind in backends:
        with backend(kind) as device:
            out = layer.to(device)(x.to(device))
            assert_close(f"output, {kind}", expected, out.cpu(), ratio)
            gradients = torch.autograd.grad((out.cpu() * grad_out).sum(), inputs, allow_unused=True)
            for reference, gradient in zip(references, gradients):
                reference, gradient = (torch.zeros(1) if grad is None else grad for grad in (reference, gradient))
                scale = reference.abs().max().clamp_min(1e-3)
                error = (reference - gradient.cpu()).abs().max()
                assert error <= 1e3 * ratio * scale, f"gradient of {tuple(gradient.shape)}, {kind}"


# Windows

def naive_window_attention(layer, x):
    """Every padded pixel against every other, with a mask from the definition of a shifted window."""
    B, H, W, C = x.shape
    w, G = layer.window_size, layer.num_heads
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
    Hp, Wp = x.shape[1:3]
    allowed, offset = torch.ones(1, 1, dtype=torch.bool), []
    y, x_ = torch.meshgrid(torch.arange(Hp), torch.arange(Wp), indexing="ij")
    for size, padded, position in ((H, Hp, y.flatten()), (W, Wp, x_.flatten())):
        shift = layer.shift if size > w or layer.always_shift else 0
        window = (position - shift) % padded // w
        wrapped = position < shift
        allowed = allowed & (window[:, None] == window) & (wrapped[:, None] == wrapped)
        offset.append((position[:, None] - position).clamp(1 - w, w - 1) + w - 1)
    bias = layer.relative_position_bias_table[offset[0] * (2 * w - 1) + offset[1]].permute(2, 0, 1)
    q, k, v = layer.qkv(x).reshape(B, Hp * Wp, 3, G, C // G).permute(2, 0, 3, 1, 4)
    attention = q @ k.transpose(-1, -2) * (C // G) ** -0.5 + bias
    out = attention.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
    return layer.proj(out.transpose(1, 2).reshape(B, Hp, Wp, C))[:, :H, :W]


@settings(deadline=None, max_examples=40)
@given(H=st.integers(1, 13), W=st.integers(1, 13), window_size=st.integers(2, 5), shifted=st.booleans(),
       always_shift=st.booleans())
def test_window_attention_equals_its_definition(H, W, window_size, shifted, always_shift):
    torch.manual_seed(H * 100 + W)
    layer = WindowAttention(8, 2, window_size, window_size // 2 if shifted else 0, always_shift).double()
    layer.relative_position_bias_table.data.normal_()
    x = torch.randn(2, H, W, 8, dtype=torch.float64)
    assert_close("out", naive_window_attention(layer, x), layer(x), 1e-12)


# Outlook

def naive_outlook(layer, x):
    """One window, one pair of its pixels at a time."""
    B, H, W, C = x.shape
    G, v = layer.num_heads, layer.v(x)
    D = C // G
    out = [[[torch.zeros(C, dtype=x.dtype) for _ in range(W)] for _ in range(H)] for _ in range(B)]
    for b in range(B):
        for i in range(0, H, 2):
            for j in range(0, W, 2):
                centre = x[b, i:i + 2, j:j + 2].flatten(0, 1).mean(0)
                a = (layer.attn(centre).view(G, 9, 9) / D ** 0.5).softmax(-1)
                window = neighbours(i, j, 3, H, W)
                for target, y, z in window:
                    for source, y_from, z_from in window:
                        sent = a[:, target, source, None] * v[b, y_from, z_from].view(G, D)
                        out[b][y][z] = out[b][y][z] + sent.flatten()
    return layer.proj(torch.stack([torch.stack([torch.stack(row) for row in image]) for image in out]))


@settings(deadline=None, max_examples=25)
@given(B=st.integers(1, 2), H=st.integers(1, 6), W=st.integers(1, 6), G=st.integers(1, 3), D=st.integers(1, 5))
def test_outlook_attention_equals_its_definition(B, H, W, G, D):
    torch.manual_seed(0)
    layer = OutlookAttention(G * D, G).double()
    x = torch.randn(B, H, W, G * D, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected, result = naive_outlook(layer, x), layer(x)
    assert_close("out", expected, result, 1e-12)
    grad_out = torch.randn_like(expected)
    references = torch.autograd.grad(expected, inputs, grad_out)
    gradients = torch.autograd.grad(result, inputs, grad_out)
    for name, reference, gradient in zip(["x", *dict(layer.named_parameters())], references, gradients):
        if reference.abs().max() > 1e-12:
            assert_close(name, reference, gradient, 1e-11)
        else:  # zero, as that of a softmax over one pixel: there is no largest entry to compare with
            assert gradient.abs().max() <= 1e-12, name


def test_a_nan_stays_in_the_windows_of_its_pixel():
    layer = OutlookAttention(4, 2).double()
    x = torch.randn(1, 8, 8, 4, dtype=torch.float64)
    clean = layer(x)
    x[0, 3, 3] = float("nan")  # an odd pixel: in four windows, around (2 or 4, 2 or 4)
    spread = layer(x).isnan().any(-1)[0]
    assert spread[1:6, 1:6].all() and spread.sum() == 25
    assert torch.equal(layer(x)[0][~spread], clean[0][~spread])


# On ELSA's operator

def naive_neighborhood(layer):
    def run(x):
        B, H, W, C = x.shape
        G, k, bias = layer.num_heads, layer.kernel_size, layer.relative_position_bias_table
        q, keys, v = (part.unflatten(-1, (G, -1)) for part in layer.qkv(x).split(C, -1))
        pixels = []
        for b in range(B):
            for y in range(H):
                for col in range(W):
                    near = neighbours(y, col, k, H, W)
                    scores = [(q[b, y, col] * keys[b, i, j]).sum(-1) / math.sqrt(C // G) + bias[:, t]
                              for t, i, j in near]
                    weights = torch.stack(scores, -1).softmax(-1)  # (G, neighbours)
                    values = torch.stack([v[b, i, j] for _, i, j in near], 1)  # (G, neighbours, D)
                    pixels.append((weights[..., None] * values).sum(1).flatten())
        return layer.proj(torch.stack(pixels).view(B, H, W, C))
    return run


@settings(deadline=None, max_examples=12)
@given(**sizes)
def test_neighborhood_attention_of_a_loop_over_pixels(H, W, heads, width, k, seed):
    layer = randomised(NeighborhoodAttention(heads * width, heads, k), seed)
    check(layer, naive_neighborhood(layer), (1, H, W, heads * width), seed)


def naive_dwconv(layer):
    def run(x):
        B, H, W, C = x.shape
        v, weight, pixels = layer.v(x), layer.filter.flatten(1), []
        for b in range(B):
            for y in range(H):
                for col in range(W):
                    near = neighbours(y, col, layer.kernel_size, H, W)
                    pixels.append(sum(v[b, i, j] * weight[:, t] for t, i, j in near))
        return layer.proj(torch.stack(pixels).view(B, H, W, C))
    return run


@settings(deadline=None, max_examples=12)
@given(**sizes)
def test_depthwise_convolution_of_a_loop_over_pixels(H, W, heads, width, k, seed):
    layer = randomised(DepthwiseConvolution(heads * width, k), seed)
    check(layer, naive_dwconv(layer), (2, H, W, heads * width), seed)


def naive_ddf(layer):
    def normalised(rows):
        return torch.stack([(row - row.mean()) / (row.std() + 1e-6) for row in rows])

    def run(x):
        B, H, W, C = x.shape
        G, k = layer.num_heads, layer.kernel_size
        v, pixels = layer.v(x), []
        for b in range(B):
            channel = normalised(layer.channel(x[b].mean((0, 1))).view(C, k * k)) * layer.deviation
            for y in range(H):
                for col in range(W):
                    spatial = normalised(layer.spatial(x[b, y, col]).view(G, k * k)) * math.sqrt(2) / k
                    spatial = spatial.repeat_interleave(C // G, 0)  # (C, K)
                    filters = spatial * channel if layer.combine == "mul" else spatial + channel
                    pixels.append(sum(v[b, i, j] * filters[:, t] for t, i, j in neighbours(y, col, k, H, W)))
        return layer.proj(torch.stack(pixels).view(B, H, W, C))
    return run


@pytest.mark.parametrize("combine", ["mul", "add"])
@settings(deadline=None, max_examples=12)
@given(**{**sizes, "k": st.sampled_from([3, 5])})
def test_decoupled_dynamic_filters_of_a_loop_over_pixels(combine, H, W, heads, width, k, seed):
    layer = randomised(DecoupledDynamicFilter(heads * width, heads, k, combine), seed)
    check(layer, naive_ddf(layer), (1, H, W, heads * width), seed, 1e-8)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("layer, naive", [
    (NeighborhoodAttention(4, 2, 3), naive_neighborhood),
    (DepthwiseConvolution(4, 3), naive_dwconv),
    (DecoupledDynamicFilter(4, 2, 3, "mul"), naive_ddf),
    (DecoupledDynamicFilter(4, 2, 3, "add"), naive_ddf),
])
def test_counterparts_on_the_triton_kernels(layer, naive):
    layer = randomised(layer, 0)
    check(layer, naive(layer), (1, 3, 4, 4), 0, 1e-8, ["triton"])


@pytest.mark.parametrize("attn", ["elsa_no_hadamard", "elsa_no_softmax", "elsa_no_ghost_mul", "elsa_no_ghost_add"])
def test_ablated_elsa_lacks_what_its_name_says(attn):
    def naive(x):
        widths = [layer.dim_qk] * (1 if attn == "elsa_no_hadamard" else 2) + [layer.dim_v]
        *qk, v = (x @ layer.pre_proj.weight.T).split(widths, -1)
        u = F.conv2d(math.prod(qk).permute(0, 3, 1, 2), layer.attn[0].weight, layer.attn[0].bias, padding=1, groups=2)
        logits = F.conv2d(F.gelu(u), layer.attn[2].weight[:, :, None, None], layer.attn[2].bias)
        ghosts = list(layer.ghost_head.view(-1, 8, 3, 3))
        mul = None if attn == "elsa_no_ghost_mul" else ghosts.pop(0)
        add = None if attn == "elsa_no_ghost_add" else ghosts.pop(0)
        assert not ghosts
        normalize = attn != "elsa_no_softmax"
        return layer.post_proj(elsa_attention_reference(v, logits, mul, add, kernel_size=3, normalize=normalize))

    options = dict(qk_scale=1, group_width=2, lam=1, gamma=1)
    layer = randomised(local_attention(attn, 8, 2, kernel_size=3, window={}, elsa=options), 0)
    check(layer, naive, (2, 6, 5, 8), 0)


# In the models

@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_every_counterpart_drops_in(name, attn):
    torch.manual_seed(0)
    model = create_model(name, attn=attn, num_classes=5, img_size=32, **SMALL[name]).eval()
    for H, W in ((32, 32), (37, 21), (5, 64)):
        images = torch.randn(2, 3, H, W)
        logits = model(images)
        assert logits.shape == (2, 5) and logits.isfinite().all()
        assert_close("one at a time", logits, torch.cat([model(image[None]) for image in images]), 1e-4)


def test_heads_that_do_not_fit_are_refused():
    for attn in ("neighborhood", "ddf", "window", "outlook"):
        with pytest.raises(ValueError, match="num_heads = 5 does not fit"):
            create_model("swin_t", attn=attn, num_heads=(5, 6, 12, 24))
