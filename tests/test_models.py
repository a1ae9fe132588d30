"""models/: against the published numbers, against timm, and against definitions written out naively."""
import argparse
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import create_model, list_models, load_weights
from models.attention import WindowAttention
from models.elsa import ELSA
from models.swin import PatchEmbed, PatchMerging, StochasticDepth
from published import GOLDEN, assert_close, published_state

TINY = dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=4, patch_size=2, group_width=4, kernel_size=3,
            num_classes=5)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are small: a second thread mostly waits, and on a busy machine it makes the file ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(attn, **overrides):
    torch.manual_seed(0)
    return create_model("swin_t", attn=attn, **{**TINY, **overrides}).eval()


def to_microsoft(timm_state):
    """A state dict with timm's names in those of Microsoft's files: down-sampling ends a stage, head, buffers saved."""
    state = {}
    for key, value in timm_state.items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        state[key.replace("head.fc.", "head.")] = value
        if key.endswith("relative_position_bias_table"):
            state[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return state


# Published numbers

@pytest.mark.parametrize("case", range(4))
def test_elsa_layer_equals_the_published_one(case):
    options = json.loads((GOLDEN / "module_cases.json").read_text())[case]
    arrays = np.load(GOLDEN / "module.npz")

    def array(name):
        return torch.tensor(arrays[f"m{case}_{name}"], dtype=torch.float64)

    layer = ELSA(**options).double()
    layer.load_state_dict({name: array(f"param.{name}") for name, _ in layer.named_parameters()})
    assert sum(key.startswith(f"m{case}_param.") for key in arrays.files) == len(list(layer.parameters()))
    x = array("x").requires_grad_()
    out = layer(x)
    out.backward(array("grad_out"))
    assert_close("out", array("out"), out.detach(), 1e-9)
    assert_close("dx", array("dx"), x.grad, 1e-9)
    for name, parameter in layer.named_parameters():
        assert_close(name, array(f"grad.{name}"), parameter.grad, 1e-9)


@pytest.mark.parametrize("attn, golden", [("window", "swin_tiny"), ("elsa", "elsa_swin_tiny")])
def test_logits_equal_the_published_ones(attn, golden):
    model = load_weights(create_model("swin_t", attn=attn), published_state(golden)).eval()
    images = torch.tensor(np.random.RandomState(0).standard_normal((2, 3, 224, 224)), dtype=torch.float32)
    published = torch.tensor(np.load(GOLDEN / f"{golden}.npz")["logits"])
    with torch.no_grad():
        error = (model(images) - published).abs().max() / published.std()
    assert error <= 1e-4  # float32, another order of summation; measured 2e-6


@pytest.mark.parametrize("name, window, elsa", [("swin_t", 28_288_354, 29_140_978), ("swin_s", 49_606_258, 52_874_626),
                                                ("swin_b", 87_768_224, 92_682_464)])
def test_published_parameter_counts(name, window, elsa):
    with torch.device("meta"):
        models = create_model(name), create_model(name, attn="window"), create_model(name, attn="elsa")
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [window, window, elsa]


def test_logits_and_gradients_equal_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    oracle = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=10, depths=(2, 1, 1, 1)).eval()
    for parameter in oracle.parameters():  # fresh biases and norms are 0 and 1, which would hide a mix-up
        parameter.data += 0.05 * torch.randn_like(parameter)
    model = load_weights(create_model("swin_t", num_classes=10, depths=(2, 1, 1, 1)), oracle.state_dict()).eval()
    images = torch.randn(1, 3, 224, 224)
    target = torch.randn(1, 10)
    expected, result = oracle(images), model(images)
    assert_close("logits", expected, result, 1e-4)
    (expected * target).sum().backward()
    (result * target).sum().backward()
    gradients = load_weights(create_model("swin_t", num_classes=10, depths=(2, 1, 1, 1)),
                             {name: parameter.grad for name, parameter in oracle.named_parameters()})
    gradients = dict(gradients.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(name, gradients[name].detach(), parameter.grad, 1e-3)


# Definitions written out

def naive_elsa(layer, x, scale, group_width, lam, gamma):
    """The layer from its parameters, with a copy of v per tap. Channels-first inside."""
    k, s, d, G, Q = layer.kernel_size, layer.stride, layer.dilation, layer.num_heads, layer.dim_qk
    pad = k // 2 * d
    q, k_, v = F.conv2d(x.permute(0, 3, 1, 2), layer.pre_proj.weight, layer.pre_proj.bias).split((Q, Q, layer.dim_v), dim=1)
    h = F.avg_pool2d(q * k_ * scale, s)
    z = F.gelu(F.conv2d(h, layer.attn[0].weight, layer.attn[0].bias, padding=pad, dilation=d, groups=Q // group_width))
    logits = F.conv2d(z, layer.attn[2].weight, layer.attn[2].bias, groups=layer.attn[2].groups)
    B, _, Ho, Wo = logits.shape
    a = logits.reshape(B, G, k * k, Ho * Wo).softmax(2).repeat_interleave(layer.dim_v // G, dim=1)  # (B, C, K, P)
    ghosts = list(layer.ghost_head.reshape(-1, 1, layer.dim_v, k * k, 1)) if layer.ghost_head is not None else []
    mul = ghosts.pop(0) ** lam if lam else 1
    add = ghosts.pop(0) * gamma if gamma else 0
    taps = F.unfold(v, k, dilation=d, padding=pad).reshape(B, layer.dim_v, k * k, *x.shape[1:3])
    taps = taps[..., ::s, ::s][..., :Ho, :Wo].flatten(3)
    out = (taps * (a * mul + add)).sum(2).reshape(B, -1, Ho, Wo)
    return layer.post_proj(out.permute(0, 2, 3, 1))


@pytest.mark.parametrize("options", [
    dict(dim=16, num_heads=2, kernel_size=3),
    dict(dim=16, num_heads=2, kernel_size=3, stride=2, group_width=4, qkv_bias=True, qk_scale=1),
    dict(dim=16, num_heads=3, dim_qk=10, dim_v=12, kernel_size=5, dilation=2, group_width=4, lam=2, gamma=0.5),
    dict(dim=12, num_heads=2, kernel_size=3, groups=2, lam=0, gamma=-2),
    dict(dim=12, num_heads=2, dim_v=6, kernel_size=3, stride=3, lam=3, gamma=0),
])
def test_elsa_layer_equals_its_definition(options):
    torch.manual_seed(0)
    layer = ELSA(**options).double()
    group_width = options.get("group_width", 8)
    assert layer.dim_qk % group_width == 0 and 0 <= layer.dim_qk - options.get("dim_qk", options["dim"] // 3 * 2) < group_width
    x = torch.randn(2, 9, 11, options["dim"], dtype=torch.float64, requires_grad=True)
    scale = options.get("qk_scale", (layer.dim_v / options["num_heads"]) ** -0.5)
    inputs = [x, *layer.parameters()]
    expected = naive_elsa(layer, x, scale, group_width, options.get("lam", 1), options.get("gamma", 1))
    result = layer(x)
    grad_out = torch.randn_like(expected)
    assert_close("out", expected, result, 1e-12)
    for name, reference, gradient in zip(["x", *dict(layer.named_parameters())], torch.autograd.grad(expected, inputs, grad_out),
                                         torch.autograd.grad(result, inputs, grad_out)):
        assert_close(name, reference, gradient, 1e-11)


def test_attention_dropout_acts_between_softmax_and_aggregation():
    layer = ELSA(16, 2, kernel_size=3, gamma=0, attn_drop=0.5).double()
    x = torch.randn(1, 6, 7, 16, dtype=torch.float64)
    seen = []

    def double(a):
        seen.append(a)
        return 2 * a

    undropped = layer.eval()(x)
    layer.train().attn_drop.forward = double
    bias = layer.post_proj.bias
    assert_close("out", 2 * (undropped - bias) + bias, layer(x), 1e-12)
    assert_close("sum over the taps", torch.ones(1, 2, 6, 7, dtype=torch.float64), seen[0].sum(2), 1e-12)
    assert seen[0].shape == (1, 2, 9, 6, 7)


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
@given(H=st.integers(1, 13), W=st.integers(1, 13), window_size=st.integers(2, 5), shifted=st.booleans(), always_shift=st.booleans())
def test_window_attention_equals_its_definition(H, W, window_size, shifted, always_shift):
    torch.manual_seed(H * 100 + W)
    layer = WindowAttention(8, 2, window_size, window_size // 2 if shifted else 0, always_shift).double()
    layer.relative_position_bias_table.data.normal_()
    x = torch.randn(2, H, W, 8, dtype=torch.float64)
    assert_close("out", naive_window_attention(layer, x), layer(x), 1e-12)


def test_padding_is_right_and_bottom_with_zeros():
    merge, embed = PatchMerging(4), PatchEmbed(4, 8)
    x, images = torch.randn(2, 5, 7, 4), torch.randn(2, 3, 6, 13)
    assert torch.equal(merge(x), merge(F.pad(x, (0, 0, 0, 1, 0, 1))))
    assert torch.equal(embed(images), embed(F.pad(images, (0, 3, 0, 2))))


# The model's behaviour

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
            shapes = [[tuple(s.shape[1:]) for s in model.forward_features(torch.randn(1, 3, *size))] for size in ((37, 61), (64, 32))]
            assert shapes == [[(96, 10, 16), (192, 5, 8), (384, 3, 4), (768, 2, 2)], [(96, 16, 8), (192, 8, 4), (384, 4, 2), (768, 2, 1)]]
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
    for name, weight, std in (("pre_proj", layer.pre_proj.weight, (3 * 96) ** -0.5),  # uniform up to fan_in ** -0.5, as convolutions
                              ("logits", layer.attn[2].weight, (3 * 64) ** -0.5),
                              ("post_proj", layer.post_proj.weight, 0.02), ("ghost_add", layer.ghost_head, 0.02),
                              ("ghost_mul of both", both[0], 1), ("ghost_add of both", both[1], 0.02)):
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
    result = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    assert_close("logits", expected, result, 1e-5)
    model.zero_grad()
    result.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(name, gradients[name], parameter.grad, 1e-5)


def test_compiled_model_takes_images_of_another_size():
    model = tiny("elsa", depths=(1, 2), num_heads=(1, 2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((24, 20), (31, 46)):
            images = torch.randn(2, 3, *size)
            assert_close(f"logits of {size}", model(images), compiled(images), 1e-5)


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
    # 8 blocks of two branches, each rounded to 8 bits a few times: errors add like a random walk of about 16 * 4 roundings
    assert_close("logits", expected, result.float(), 2 ** -8 * 64 ** 0.5)


# Weights

def shallow(state):
    """Two blocks in each stage and no classifier, which is all that a conversion of names needs."""
    return {key: value for key, value in state.items()
            if not key.startswith("head") and not (".blocks." in key and int(key.split(".")[3]) > 1)}


def shallow_model(attn):
    return create_model("swin_t", attn=attn, depths=(2, 2, 2, 2), num_classes=0)


def test_microsoft_names_and_older_timm_names():
    timm_state = published_state("swin_tiny")
    expected = load_weights(shallow_model("window"), shallow(timm_state)).state_dict()
    result = load_weights(shallow_model("window"), {"model": shallow(to_microsoft(timm_state))}).state_dict()
    assert result.keys() == expected.keys() and all(torch.equal(result[key], expected[key]) for key in expected)
    older = {key.replace("head.fc.", "head."): value for key, value in timm_state.items()}
    assert torch.equal(load_weights(create_model("swin_t"), older).head.weight, timm_state["head.fc.weight"])


def test_published_elsa_checkpoint_file(tmp_path):
    state = shallow(published_state("elsa_swin_tiny"))
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": {f"module.{key}": value for key, value in state.items()}},
               tmp_path / "elsa.pth")
    expected = load_weights(shallow_model("elsa"), state).state_dict()
    result = load_weights(shallow_model("elsa"), tmp_path / "elsa.pth").state_dict()
    assert all(torch.equal(result[key], expected[key]) for key in expected)
    # the order q, k, v and the sign of the bias are covered by the golden logits
    assert torch.equal(result["layers.1.blocks.1.attn.pre_proj.weight"], state["layers.1.blocks.1.attn.pre_proj.weight"])


@pytest.mark.parametrize("attn", ["window", "elsa"])
def test_own_checkpoints(attn, tmp_path):
    weights, average = tiny(attn).state_dict(), {key: value + 1 for key, value in tiny(attn).state_dict().items()}
    config = {"name": "swin_t", "epochs": 300}
    for checkpoint, expected in ((weights, weights), ({"model": weights, "ema": None, "config": config}, weights),
                                 ({"model": weights, "config": config, "step": 7}, weights),
                                 ({"model": weights, "ema": average, "config": config}, average)):
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        model = tiny(attn)
        assert load_weights(model, str(tmp_path / "checkpoint.pt")) is model
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_what_does_not_fit_is_listed_and_nothing_is_loaded():
    state = {key: value + 1 for key, value in tiny("elsa").state_dict().items()}
    del state["norm.bias"], state["layers.1.blocks.0.attn.ghost_head"]
    state["head.weight"] = torch.zeros(7, 96)
    state["stray"] = torch.zeros(3)
    model = tiny("elsa")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(model, state)
    for line in ("missing: norm.bias (96,)", "missing: layers.1.blocks.0.attn.ghost_head (1, 24, 3, 3)", "unexpected: stray (3,)",
                 "wrong shape: head.weight is (7, 96), the model has (5, 96)"):
        assert line in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="relative_position_bias_table is .* the model has"):
        load_weights(tiny("window", window_size=3), tiny("window").state_dict())


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_files_that_cannot_be_read(tmp_path):
    model = tiny("elsa")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save({"model": before, "extra": RunsCode(str(tmp_path / "ran"))}, tmp_path / "malicious.pt")
    with pytest.raises(ValueError, match="malicious.pt was refused: reading it would run code"):
        load_weights(model, tmp_path / "malicious.pt")
    assert not (tmp_path / "ran").exists()
    torch.save(before, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for damage in (b"", whole[:len(whole) // 2], whole[:-300], b"hello world, these are no weights"):
        (tmp_path / "damaged.pt").write_bytes(damage)
        with pytest.raises(ValueError, match="damaged.pt cannot be read"):
            load_weights(model, tmp_path / "damaged.pt")
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_weights(model, tmp_path / "nowhere.pt")
    for nothing in ({}, {"epoch": 3}, {"model": [1, 2]}):
        with pytest.raises(ValueError, match="no weights"):
            load_weights(model, nothing)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Errors that help

@pytest.mark.parametrize("call, words", [
    (lambda: create_model("swin_tt"), ["'swin_tt'", "Did you mean 'swin_t'", "swin_b, swin_s, swin_t"]),
    (lambda: create_model("swin_t", attn="elza"), ["attn", "'elza'", "Did you mean 'elsa'", "window, elsa"]),
    (lambda: create_model("swin_t", droppath_rate=0.1), ["'droppath_rate'", "Did you mean 'drop_path_rate'", "patch_size"]),
    (lambda: ELSA(16, 3), ["num_heads = 3", "dim_v = 16"]),
    (lambda: ELSA(16, 2, kernel_size=4), ["kernel_size = 4", "odd"]),
    (lambda: ELSA(16, 2, stride=0), ["stride = 0", "positive"]),
    (lambda: ELSA(16, 2, groups=7), ["groups = 7", "divisor"]),
    (lambda: ELSA(16, 2, lam=0.5), ["lam = 0.5", "whole number"]),
    (lambda: ELSA(16, 2)(torch.zeros(1, 16, 4, 4)), ["x has shape (1, 16, 4, 4)", "(B, H, W, 16)", "permute"]),
    (lambda: tiny("elsa")(torch.zeros(1, 1, 32, 32)), ["images", "(1, 1, 32, 32)", "(B, 3, H, W)"]),
    (lambda: tiny("elsa", drop_path_rate=1.0), ["drop_path_rate = 1.0"]),
    (lambda: tiny("elsa", num_heads=(1, 2, 2)), ["num_heads", "depths"]),
    (lambda: tiny("window", num_heads=(5, 2, 2, 4)), ["num_heads = 5", "12"]),
])
def test_errors_name_the_argument_and_what_to_do(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_list_models():
    assert {"swin_t", "swin_s", "swin_b"} <= set(list_models())
    for name in list_models():
        with torch.device("meta"):
            create_model(name, num_classes=2)
