"""models/attention.py: every counterpart against a loop over pixels and its costs against the published ones."""
import math

import pytest
import torch
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
    local_attention,
)
from models.info import info, stages
from published import assert_close
from run import main

sizes = dict(H=st.integers(1, 5), W=st.integers(1, 5), heads=st.integers(1, 3), width=st.integers(1, 4), k=st.sampled_from([1, 3, 5]),
             seed=st.integers(0, 999))


def neighbours(y, x, k, H, W):
    """(tap, y, x) of those of the k x k neighbours that are in the image."""
    r = k // 2
    return [(i * k + j, y + i - r, x + j - r) for i in range(k) for j in range(k) if 0 <= y + i - r < H and 0 <= x + j - r < W]


def made(layer, seed):
    """The layer in float64, every parameter random."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return layer


def check(layer, naive, shape, seed, ratio=1e-9, backends=("cpu",)):
    """Output and all gradients of a layer against those of a naive function of the input."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    wanted = naive(x)
    towards = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad((wanted * towards).sum(), leaves, allow_unused=True)
    for kind in backends:
        with backend(kind) as device:
            out = layer.to(device)(x.to(device))
            assert_close(f"output, {kind}", wanted, out.cpu(), ratio)
            for reference, result in zip(expected, torch.autograd.grad((out.cpu() * towards).sum(), leaves, allow_unused=True)):
                reference, result = (torch.zeros(1) if grad is None else grad for grad in (reference, result))
                scale = reference.abs().max().clamp_min(1e-3)
                assert (reference - result.cpu()).abs().max() <= 1e3 * ratio * scale, f"gradient of {tuple(result.shape)}, {kind}"


def naive_neighborhood(layer):
    def run(x):
        B, H, W, C = x.shape
        G, k = layer.num_heads, layer.kernel_size
        q, keys, v = (part.unflatten(-1, (G, -1)) for part in layer.qkv(x).split(C, -1))
        rows = []
        for b in range(B):
            for y in range(H):
                for col in range(W):
                    near = neighbours(y, col, k, H, W)
                    scores = torch.stack([(q[b, y, col] * keys[b, i, j]).sum(-1) / math.sqrt(C // G) + layer.relative_position_bias_table[:, t]
                                          for t, i, j in near], -1)  # (G, neighbours)
                    values = torch.stack([v[b, i, j] for _, i, j in near], 1)  # (G, neighbours, D)
                    rows.append((scores.softmax(-1)[..., None] * values).sum(1).flatten())
        return layer.proj(torch.stack(rows).view(B, H, W, C))
    return run


@settings(deadline=None, max_examples=12)
@given(**sizes)
def test_neighborhood_attention_of_a_loop_over_pixels(H, W, heads, width, k, seed):
    layer = made(NeighborhoodAttention(heads * width, heads, k), seed)
    check(layer, naive_neighborhood(layer), (1, H, W, heads * width), seed)


def naive_dwconv(layer):
    def run(x):
        B, H, W, C = x.shape
        v = layer.v(x)
        pixels = [sum((v[b, i, j] * layer.filter.flatten(1)[:, t] for t, i, j in neighbours(y, col, layer.kernel_size, H, W)))
                  for b in range(B) for y in range(H) for col in range(W)]
        return layer.proj(torch.stack(pixels).view(B, H, W, C))
    return run


@settings(deadline=None, max_examples=12)
@given(**sizes)
def test_depthwise_convolution_of_a_loop_over_pixels(H, W, heads, width, k, seed):
    layer = made(DepthwiseConvolution(heads * width, k), seed)
    check(layer, naive_dwconv(layer), (2, H, W, heads * width), seed)


def naive_ddf(layer):
    def run(x):
        B, H, W, C = x.shape
        G, K = layer.num_heads, layer.kernel_size ** 2
        v, pixels = layer.v(x), []
        for b in range(B):
            channel = layer.channel(x[b].mean((0, 1))).view(C, K)
            channel = torch.stack([(row - row.mean()) / (row.std() + 1e-6) for row in channel]) * layer.deviation
            for y in range(H):
                for col in range(W):
                    spatial = layer.spatial(x[b, y, col]).view(G, K)
                    spatial = torch.stack([(row - row.mean()) / (row.std() + 1e-6) for row in spatial]) * math.sqrt(2) / layer.kernel_size
                    spatial = spatial.repeat_interleave(C // G, 0)  # (C, K)
                    filters = spatial * channel if layer.combine == "mul" else spatial + channel
                    pixels.append(sum(v[b, i, j] * filters[:, t] for t, i, j in neighbours(y, col, layer.kernel_size, H, W)))
        return layer.proj(torch.stack(pixels).view(B, H, W, C))
    return run


@pytest.mark.parametrize("combine", ["mul", "add"])
@settings(deadline=None, max_examples=12)
@given(**{**sizes, "k": st.sampled_from([3, 5])})
def test_decoupled_dynamic_filters_of_a_loop_over_pixels(combine, H, W, heads, width, k, seed):
    layer = made(DecoupledDynamicFilter(heads * width, heads, k, combine), seed)
    check(layer, naive_ddf(layer), (1, H, W, heads * width), seed, 1e-8)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("layer, naive", [(NeighborhoodAttention(4, 2, 3), naive_neighborhood), (DepthwiseConvolution(4, 3), naive_dwconv),
                                          (DecoupledDynamicFilter(4, 2, 3, "mul"), naive_ddf), (DecoupledDynamicFilter(4, 2, 3, "add"), naive_ddf)])
def test_counterparts_on_the_triton_kernels(layer, naive):
    layer = made(layer, 0)
    check(layer, naive(layer), (1, 3, 4, 4), 0, 1e-8, ["triton"])


@pytest.mark.parametrize("attn", ["elsa_no_hadamard", "elsa_no_softmax", "elsa_no_ghost_mul", "elsa_no_ghost_add"])
def test_ablated_elsa_lacks_what_its_name_says(attn):
    def naive(x):
        *qk, v = (x @ layer.pre_proj.weight[:, :, 0, 0].T).split([layer.dim_qk] * (1 if attn == "elsa_no_hadamard" else 2) + [layer.dim_v], -1)
        logits = layer.attn(math.prod(qk).permute(0, 3, 1, 2))
        ghosts = list(layer.ghost_head.view(-1, 8, 3, 3))
        mul = None if attn == "elsa_no_ghost_mul" else ghosts.pop(0)
        add = None if attn == "elsa_no_ghost_add" else ghosts.pop(0)
        assert not ghosts
        return layer.post_proj(elsa_attention_reference(v, logits, mul, add, kernel_size=3, normalize=attn != "elsa_no_softmax"))

    layer = made(local_attention(attn, 8, 2, kernel_size=3, window={}, elsa=dict(qk_scale=1, group_width=2, lam=1, gamma=1)), 0)
    check(layer, naive, (2, 6, 5, 8), 0)


@pytest.mark.parametrize("model, sizes", [("swin_t", dict(embed_dim=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=2, kernel_size=3)),
                                          ("volo_d1", dict(embed_dim=12, depths=(2, 1, 1, 1), num_heads=(2, 3), stem_dim=8, window_size=3))])
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_every_counterpart_drops_in(model, sizes, attn):
    torch.manual_seed(0)
    net = create_model(model, attn=attn, num_classes=5, img_size=32, **sizes).eval()
    for H, W in ((32, 32), (37, 21), (5, 64)):
        images = torch.randn(2, 3, H, W)
        logits = net(images)
        assert logits.shape == (2, 5) and logits.isfinite().all()
        assert_close("one at a time", logits, torch.cat([net(image[None]) for image in images]), 1e-4)


def test_heads_that_do_not_fit_are_refused():
    for attn in ("neighborhood", "ddf", "window", "outlook"):
        with pytest.raises(ValueError, match="num_heads = 5 does not fit"):
            create_model("swin_t", attn=attn, num_heads=(5, 6, 12, 24))


# Costs

@pytest.mark.parametrize("name, attn, parameters, macs", [
    ("swin_t", "window", 28_288_354, 4.5), ("swin_t", "elsa", 29_140_978, 4.71), ("swin_s", "elsa", 52_874_626, 9.44),
    ("swin_b", "elsa", 92_682_464, 16.52), ("volo_d1", "outlook", 26_632_040, 6.94)])
def test_costs_are_the_published_ones(name, attn, parameters, macs):
    total, *_ = info(name, (224, 224), attn=attn)
    assert total["parameters"] == parameters and total["macs"] / 1e9 == pytest.approx(macs, rel=5e-3)


@pytest.mark.parametrize("name", ["swin_t", "volo_d1", "upernet_swin_t", "mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"])
def test_the_stages_are_the_whole_model(name):
    *parts, total = stages(info(name, (64, 96)))
    for key in ("parameters", "macs", "memory"):
        outside = total[key] - sum(row[key] for row in parts)
        assert 0 <= outside <= (0.02 if key == "parameters" else 0.1) * total[key], key  # position embeddings, sums between the parts


def test_memory_is_what_autograd_keeps():
    rows = {row["layer"]: row for row in info("swin_t", (64, 64), embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), num_classes=3)}
    fc1 = rows["layers.0.blocks.0.mlp.fc1"]
    assert fc1["output"] == (16, 16, 48) and fc1["macs"] == 16 * 16 * 12 * 48 and fc1["memory"] == 4 * 16 * 16 * 12  # its input
    assert rows["head"]["memory"] == 4 * 96 and rows[""]["memory"] > sum(rows[f"layers.{i}"]["memory"] for i in range(4))


@pytest.mark.parametrize("attn", ["neighborhood", "dwconv", "ddf"])
def test_multiply_adds_count_every_tap(attn):
    rows = {row["layer"]: row for row in info("swin_t", (32, 32), attn=attn, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))}
    layer, pixels, C, K = rows["layers.0.blocks.0.attn"], 64, 12, 49
    linear = {"neighborhood": 4 * C * C, "dwconv": 2 * C * C, "ddf": 2 * C * C + C * K}[attn] * pixels
    channel = C * 2 + 2 * C * K if attn == "ddf" else 0
    assert layer["macs"] == linear + channel + pixels * C * K * (2 if attn == "neighborhood" else 1)


# The commands

def test_info_prints_a_table(capsys):
    assert main(["info", "swin_t", "--attn", "elsa"]) == 0
    printed = capsys.readouterr().out
    assert "29,140,978" in printed and "4.704 G" in printed and "56 x 56 x 96" in printed and "blocks" not in printed
    assert main(["info", "volo_d1", "--layers", "--img-size", "64"]) == 0
    assert "network.0.1.attn" in capsys.readouterr().out
    assert main(["info", "swin_t", "--attn", "dwconf"]) == 2
    assert "Did you mean 'dwconv'?" in capsys.readouterr().err
