"""models/swin.py: against the published numbers, against timm, and what the model does with images of any size."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import create_model, load_weights
from models.attention import WindowAttention
from models.elsa import ELSA
from models.swin import PatchEmbed, PatchMerging, StochasticDepth
from published import GOLDEN, assert_close, published_state

TINY = dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=4, patch_size=2, group_width=4,
            kernel_size=3, num_classes=5)


def tiny(attn, **overrides):
    torch.manual_seed(0)
    return create_model("swin_t", attn=attn, **{**TINY, **overrides}).eval()


@pytest.mark.parametrize("attn, golden", [("window", "swin_tiny"), ("elsa", "elsa_swin_tiny")])
def test_logits_equal_the_published_ones(attn, golden):
    model = load_weights(create_model("swin_t", attn=attn), published_state(golden)).eval()
    images = torch.tensor(np.random.RandomState(0).standard_normal((2, 3, 224, 224)), dtype=torch.float32)
    published = torch.tensor(np.load(GOLDEN / f"{golden}.npz")["logits"])
    with torch.no_grad():
        error = (model(images) - published).abs().max() / published.std()
    assert error <= 1e-4  # float32, another order of summation; measured 2e-6


@pytest.mark.parametrize("name, window, elsa", [
    ("swin_t", 28_288_354, 29_140_978),
    ("swin_s", 49_606_258, 52_874_626),
    ("swin_b", 87_768_224, 92_682_464),
])
def test_published_parameter_counts(name, window, elsa):
    with torch.device("meta"):
        models = create_model(name), create_model(name, attn="window"), create_model(name, attn="elsa")
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [window, window, elsa]


def test_logits_and_gradients_equal_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    shape = dict(num_classes=10, depths=(2, 1, 1, 1))
    oracle = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **shape).eval()
    for parameter in oracle.parameters():  # fresh biases and norms are 0 and 1, which would hide a mix-up
        parameter.data += 0.05 * torch.randn_like(parameter)
    model = load_weights(create_model("swin_t", **shape), oracle.state_dict()).eval()
    images = torch.randn(1, 3, 224, 224)
    target = torch.randn(1, 10)
    expected, result = oracle(images), model(images)
    assert_close("logits", expected, result, 1e-4)
    (expected * target).sum().backward()
    (result * target).sum().backward()
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    gradients = dict(load_weights(create_model("swin_t", **shape), gradients).named_parameters())  # under our names
    for name, parameter in model.named_parameters():
        assert_close(name, gradients[name].detach(), parameter.grad, 1e-3)


def test_padding_is_right_and_bottom_with_zeros():
    merge, embed = PatchMerging(4), PatchEmbed(4, 8)
    x, images = torch.randn(2, 5, 7, 4), torch.randn(2, 3, 6, 13)
    assert torch.equal(merge(x), merge(F.pad(x, (0, 0, 0, 1, 0, 1))))
    assert torch.equal(embed(images), embed(F.pad(images, (0, 3, 0, 2))))


@settings(deadline=None, max_examples=15)
@given(H=st.integers(1, 70), W=st.integers(1, 70), attn=st.sampled_from(["window", "elsa"]))
def test_images_of_any_size(H, W, attn):
    model = tiny(attn)
    images = torch.randn(2, 3, H, W)
    with torch.no_grad():
        stages = model.forward_features(images)
        logits = model(images)
        alone = model(images[1:])
    size = [-(-H // 2), -(-W // 2)]
    for i, stage in enumerate(stages):
        assert stage.shape == (2, 12 * 2 ** i, *size)
        size = [-(-side // 2) for side in size]
    assert logits.shape == (2, 5)
    assert_close("an image alone", logits[1:], alone, 1e-5)


def test_size_may_change_between_calls_and_published_patch_sizes():
    for attn in ("window", "elsa"):
        model = create_model("swin_t", attn=attn, depths=(1, 1, 1, 2), num_classes=0).eval()
        with torch.no_grad():
            shapes = {size: [tuple(x.shape[1:]) for x in model.forward_features(torch.randn(1, 3, *size))]
                      for size in ((37, 61), (64, 32))}
            assert shapes[37, 61] == [(96, 10, 16), (192, 5, 8), (384, 3, 4), (768, 2, 2)]
            assert shapes[64, 32] == [(96, 16, 8), (192, 8, 4), (384, 4, 2), (768, 2, 1)]
            assert model(torch.randn(1, 3, 37, 61)).shape == (1, 768)
            cifar = create_model("swin_t", attn=attn, depths=(1, 1, 1, 1), patch_size=2, num_classes=10).eval()
            assert cifar(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_only_the_last_stage_of_elsa_swin_is_windowed():
    kinds = [[type(block.attn) for block in stage.blocks] for stage in tiny("elsa").layers]
    assert kinds == [[ELSA] * 2] * 3 + [[WindowAttention] * 2]
    assert all(block.attn.scale == 1 and block.attn.lam == 0 and block.attn.pre_proj.bias is not None
               for stage in tiny("elsa").layers[:3] for block in stage.blocks)


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    layer = create_model("swin_t", attn="elsa", depths=(1, 1, 1, 1)).layers[0].blocks[0].attn
    both = ELSA(96, 3).ghost_head
    for name, weight, std in (
            ("pre_proj", layer.pre_proj.weight, (3 * 96) ** -0.5),  # uniform up to fan_in ** -0.5, as convolutions
            ("logits", layer.attn[2].weight, (3 * 64) ** -0.5),
            ("post_proj", layer.post_proj.weight, 0.02),
            ("ghost_add", layer.ghost_head, 0.02),
            ("ghost_mul of both", both[0], 1),
            ("ghost_add of both", both[1], 0.02)):
        # five standard errors of a standard deviation; a uniform distribution's is smaller
        assert abs(weight.std() / std - 1) < 5 / (2 * weight.numel()) ** 0.5, name
    assert not layer.post_proj.bias.any() and both.shape == (2, 1, 96, 5, 5) and layer.ghost_head.shape == (1, 96, 7, 7)


def loss_gradients(model, images):
    model.zero_grad()
    torch.manual_seed(1)
    model(images).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attn", ["window", "elsa"])
def test_checkpointing_gives_equal_gradients_and_every_parameter_one(attn):
    images = torch.randn(2, 3, 24, 20)
    kept = loss_gradients(tiny(attn, drop_path_rate=0.5).train(), images)
    model, runs = tiny(attn, drop_path_rate=0.5, checkpointing=True).train(), []
    for stage in model.layers:
        for block in stage.blocks:
            block.register_forward_pre_hook(lambda *_: runs.append(1))
    recomputed = loss_gradients(model, images)
    assert len(runs) == 2 * 8
    for name, gradient in kept.items():
        assert gradient is not None, f"{name} is unused: DistributedDataParallel would wait for it"
        assert_close(name, gradient, recomputed[name], 1e-6)


def test_stochastic_depth():
    torch.manual_seed(0)
    drop = StochasticDepth(0.25).train()
    kept = drop(torch.ones(20_000, 1, 2))
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(kept[:, 0, 0], kept[:, 0, 1])  # an image is dropped as a whole
    assert abs((kept == 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5  # five standard errors
    model = tiny("elsa", drop_path_rate=0.7)
    rates = [block.drop_path.rate for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.1 * n for n in range(8)])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        assert torch.equal(model(images), tiny("elsa")(images))
        model.train()
        assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("attn", ["window", "elsa"])
def test_compiles_as_one_graph(attn):
    model = tiny(attn, depths=(1, 2), num_heads=(1, 2))
    images = torch.randn(2, 3, 24, 20)
    expected, gradients = model(images), loss_gradients(model, images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(images)
    assert_close("logits", expected, result, 1e-5)
    model.zero_grad()
    result.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(name, gradients[name], parameter.grad, 1e-5)
    if attn == "elsa":  # images of another size: sizes are now symbols
        images = torch.randn(2, 3, 31, 46)
        with torch.no_grad():
            assert_close("logits of another size", model(images), compiled(images), 1e-5)


@pytest.mark.parametrize("attn", ["window", "elsa"])
def test_autocast_stays_close_to_float32(attn):
    model = tiny(attn)
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(images)
        result.float().square().sum().backward()
    assert result.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    # 8 blocks of two branches, each rounded to 8 bits a few times: errors add like a random walk of 16 * 4 roundings
    assert_close("logits", expected, result.float(), 2 ** -8 * 64 ** 0.5)
