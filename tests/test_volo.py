"""models/volo.py: against the published numbers, against timm, and against definitions written out naively."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import create_model, load_weights
from models.attention import OutlookAttention
from models.elsa import ELSA
from models.volo import interpolate_pos_embed
from published import GOLDEN, assert_close, published_state

TINY = dict(embed_dim=12, depths=(2, 1, 1, 1), num_heads=(2, 4), stem_dim=4, patch_size=4, img_size=32, num_classes=5)


def tiny(attn=None, **overrides):
    torch.manual_seed(0)
    model = create_model("volo_d1", attn=attn, **{**TINY, **overrides}).eval()
    for parameter in model.parameters():  # fresh biases and norms are 0 and 1, which would hide a mix-up
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


# Published numbers

def test_logits_equal_the_published_ones():
    model = load_weights(create_model("volo_d1"), published_state("volo_d1")).eval()
    images = torch.tensor(np.random.RandomState(0).standard_normal((2, 3, 224, 224)), dtype=torch.float32)
    published = torch.tensor(np.load(GOLDEN / "volo_d1.npz")["logits"])
    with torch.no_grad():
        error = (model(images) - published).abs().max() / published.std()
    assert error <= 1e-4  # float32, another order of summation


@pytest.mark.parametrize("name, count", [
    ("volo_d1", 26_632_040),
    ("volo_d2", 58_678_336),
    ("volo_d3", 86_325_072),
    ("volo_d4", 192_961_520),
    ("volo_d5", 295_455_584),
])
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        models = create_model(name), create_model(name, attn="outlook"), create_model(name, img_size=448)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    grown = (28 * 28 - 14 * 14) * models[0].pos_embed.shape[-1]
    assert counts == [count, count, count + grown]


@pytest.mark.parametrize("size", [32, 48])
def test_logits_and_gradients_equal_timm(size):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    oracle = timm.models.volo.VOLO(layers=(2, 1, 1, 1), img_size=size, num_classes=10, embed_dims=(192, 384, 384, 384),
                                   num_heads=(6, 12, 12, 12)).eval()
    for parameter in oracle.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model = create_model("volo_d1", img_size=size, depths=(2, 1, 1, 1), num_classes=10)
    model = load_weights(model, oracle.state_dict()).eval()
    images, target = torch.randn(2, 3, size, size), torch.randn(2, 10)
    expected, result = oracle(images), model(images)
    assert_close("logits", expected, result, 1e-4)
    (expected * target).sum().backward()
    (result * target).sum().backward()
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_close(name, gradients[name], parameter.grad, 1e-3)


# Mix-token

def test_swapping_all_tokens_swaps_the_images():
    model = tiny().train()
    images = torch.randn(4, 3, 32, 32)
    logits, tokens = model(images)
    everywhere = torch.ones(4, 4, dtype=torch.bool)
    swapped, swapped_tokens = model(images, everywhere)
    assert_close("logits", logits.flip(0), swapped, 1e-5)
    assert_close("tokens", tokens, swapped_tokens, 1e-5)
    nowhere, nowhere_tokens = model(images, ~everywhere)
    assert torch.equal(nowhere, logits) and torch.equal(nowhere_tokens, tokens)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1 << 16), h=st.integers(1, 4), w=st.integers(1, 4))
def test_every_tokens_logits_return_to_the_image_it_came_from(seed, h, w):
    model = tiny(depths=(0, 0, 0, 0)).train()  # no block lets tokens see each other, so mixing must not show
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, 8 * h, 8 * w, generator=generator)
    swap = torch.rand(h, w, generator=generator) < 0.5
    (_, tokens), (_, mixed) = model(images), model(images, swap)
    assert tokens.shape == (3, h, w, 5)
    assert torch.allclose(tokens, mixed, atol=1e-5)


# Sizes

@settings(deadline=None, max_examples=20)
@given(h=st.integers(1, 20), w=st.integers(1, 20), seed=st.integers(0, 99))
def test_position_embedding_at_its_native_size_is_itself(h, w, seed):
    pos_embed = torch.randn(1, h, w, 3, generator=torch.Generator().manual_seed(seed))
    assert interpolate_pos_embed(pos_embed, h, w) is pos_embed
    larger = interpolate_pos_embed(torch.full_like(pos_embed, 2.5), 2 * h + 1, w + 3)
    assert larger.shape == (1, 2 * h + 1, w + 3, 3) and torch.allclose(larger, torch.tensor(2.5), atol=1e-5)


def cubic_weights(n, m):
    """(m, n): how much each of n cells contributes to each of m, bicubic between centres, borders repeated."""
    weights = torch.zeros(m, n)
    for i in range(m):
        at = (i + 0.5) * n / m - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            d = abs(at - j)
            near = 1.25 * d ** 3 - 2.25 * d ** 2 + 1
            far = -0.75 * (d ** 3 - 5 * d ** 2 + 8 * d - 4)
            weights[i, min(max(j, 0), n - 1)] += near if d <= 1 else far
    return weights


def test_position_embedding_is_interpolated_between_the_centres_of_its_cells():
    pos_embed = torch.randn(1, 6, 5, 3)
    expected = torch.einsum("yi,xj,bijc->byxc", cubic_weights(6, 9), cubic_weights(5, 11), pos_embed)
    assert_close("pos_embed", expected, interpolate_pos_embed(pos_embed, 9, 11), 1e-5)


@pytest.mark.parametrize("attn", ["outlook", "elsa"])
@pytest.mark.parametrize("H, W", [(32, 32), (48, 32), (31, 57), (5, 5), (1, 20)])
def test_images_of_any_size(attn, H, W):
    model = tiny(attn)
    images = torch.randn(2, 3, H, W)
    logits = model(images)
    assert logits.shape == (2, 5)
    assert_close("one at a time", logits, torch.cat([model(image[None]) for image in images]), 1e-4)
    h, w = model.token_grid(H, W)
    padded = torch.zeros(2, 3, 8 * h, 8 * w)
    padded[:, :, :H, :W] = images
    assert torch.equal(model(padded), logits)
    assert model.train()(images)[1].shape == (2, h, w, 5)


# The rest of the model

@pytest.mark.parametrize("attn", ["outlook", "elsa"])
def test_evaluation_adds_half_the_largest_token(attn):
    model = tiny(attn)
    images = torch.randn(2, 3, 32, 32)
    combined = model(images)
    model.training = True  # of the model alone: batch norm goes on evaluating
    logits, tokens = model(images)
    assert_close("logits", logits + 0.5 * tokens.flatten(1, 2).max(1).values, combined, 1e-6)


def test_elsa_takes_the_place_of_every_outlook_attention_and_of_nothing_else():
    outlook, elsa = tiny(), tiny("elsa", embed_dim=24, num_heads=(2, 4))
    assert [type(block.attn) for block in outlook.network[0]] == [OutlookAttention] * 2
    for block in elsa.network[0]:
        layer = block.attn
        assert (type(layer), layer.kernel_size, layer.lam, layer.gamma, layer.scale) == (ELSA, 5, 1, 1, 1)
        assert layer.pre_proj.bias is None and layer.ghost_head.shape == (2, 1, 24, 5, 5)
    other = {name.replace("network.0.", "") for name, _ in outlook.named_parameters() if ".attn." not in name}
    assert other == {name.replace("network.0.", "") for name, _ in elsa.named_parameters() if ".attn." not in name}


def test_stochastic_depth_starts_after_stage_1():
    model = tiny(drop_path_rate=0.4)
    stages = [stage for stage in model.network if isinstance(stage, torch.nn.Sequential)]
    rates = [block.drop_path.rate for stage in stages for block in stage]
    assert rates == pytest.approx([0, 0, 0.2, 0.3, 0.4])
    assert [block.drop_path.rate for block in model.post_network] == [0, 0]


@pytest.mark.parametrize("attn", ["outlook", "elsa"])
def test_checkpointing_gives_equal_gradients_and_every_parameter_one(attn):
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model = tiny(attn, checkpointing=checkpointing).train()
        logits, tokens = model(images, torch.eye(4, dtype=torch.bool))
        (logits.square().sum() + tokens.square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("attn", ["outlook", "elsa"])
def test_compiles_as_one_graph(attn):
    model = tiny(attn).train()
    images, swap = torch.randn(2, 3, 32, 32), torch.eye(4, dtype=torch.bool)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for expected, result in zip(model(images, swap), compiled(images, swap)):
        assert_close("logits", expected, result, 1e-5)


@pytest.mark.parametrize("attn", ["outlook", "elsa"])
def test_autocast_stays_close_to_float32(attn):
    model, images = tiny(attn), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close("logits", model(images), model(images).float(), 1e-6)
        result = model(images)
    assert_close("logits", model(images), result.float(), 0.05)


def test_features_instead_of_logits():
    model = tiny(num_classes=0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    assert not any("head" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("call, words", [
    (lambda: tiny(patch_size=5), ["patch_size = 5", "even"]),
    (lambda: tiny(num_heads=(5, 4)), ["num_heads = 5", "12"]),
    (lambda: tiny(drop_path_rate=1.0), ["drop_path_rate = 1.0", "[0, 1)"]),
    (lambda: tiny()(torch.zeros(1, 1, 32, 32)), ["images", "(1, 1, 32, 32)", "(B, 3, H, W)"]),
    (lambda: tiny().train()(torch.zeros(1, 3, 32, 32), torch.zeros(3, 3, dtype=torch.bool)),
     ["swap", "(3, 3)", "(4, 4)"]),
])
def test_errors_name_the_argument_and_what_to_do(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("attn", ["outlook", "elsa"])
def test_a_batch_of_none(attn):
    model, images = tiny(attn), torch.empty(0, 3, 32, 32)
    assert model(images).shape == (0, 5)
    assert [x.shape[0] for x in model.train()(images)] == [0, 0]
