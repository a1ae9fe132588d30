"""eval/providers.py: what the benchmark times beside this project's kernels computes what its name says."""
import pytest
import torch
import torch.nn as nn

import models.elsa
from eval import providers


def test_forward_is_timed_without_gradients_and_backward_with_all():
    seen = []
    weight = torch.full((3,), 2.0, requires_grad=True)
    x, still = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)

    def function(x, still):
        seen.append(torch.is_grad_enabled())
        return x * weight + still

    provider = providers.Provider(function, (x, still), (weight,))
    (out,) = provider(None)
    assert seen == [False] and not out.requires_grad and out.tolist() == [[3.0] * 3] * 2
    out, of_x, of_weight = provider(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert seen == [False, True] and not out.requires_grad
    assert of_x.tolist() == [[2, 4, 6], [8, 10, 12]] and of_weight.tolist() == [5, 7, 9]
    inputs = 4 * (6 + 6 + 3)
    assert provider.bytes(out, backward=False) == inputs + 4 * 6
    assert provider.bytes(out.bfloat16(), backward=True) == 3 * inputs + 2 * 2 * 6
    assert providers.Provider(function, (still.bfloat16(),)).bytes(out, backward=False) == 2 * 6 + 4 * 6


@pytest.mark.parametrize("level", ["operator", "layer"])
@pytest.mark.parametrize("shape", [(9, 8, 2, 3, 1, 8), (7, 10, 1, 5, 0, 4)])
def test_what_is_called_the_same_is_the_same(level, shape):
    builders, grad_out = providers.LEVELS[level](providers.Shape(*shape), 2, torch.float32, torch.device("cpu"), True)
    naive = builders["naive"]()(grad_out)
    for name in ("ours", "unfold") if level == "operator" else ("ours",):
        for x, y in zip(builders[name]()(grad_out), naive, strict=True):
            assert torch.allclose(x, y, atol=1e-4 * y.abs().max())


@pytest.mark.parametrize("model, shape", [("swin_t", "swin_t stage 1"), ("swin_b", "swin_b stage 1"),
                                          ("volo_d1", "volo_d1 stage 1")])
def test_layers_are_set_up_as_in_their_model(model, shape):
    """Shapes of the parameters and plain settings, such as the scale, are those of the model's first layer."""
    def first(module):
        elsa = next(part for part in module.modules() if isinstance(part, models.elsa.ELSA))
        plain = {name: value for name, value in vars(elsa).items() if isinstance(value, (int, float))}
        return {name: value.shape for name, value in elsa.state_dict().items()}, {**plain, "training": None}

    meta = torch.device("meta")
    builders, _ = providers.layer(providers.SHAPES[shape], 1, torch.float32, torch.device("cpu"), False)
    with meta:
        whole = models.create_model(model, attn="elsa")
    assert first(builders["ours"]().function) == first(whole)


def test_naive_layer_uses_none_of_the_kernels(monkeypatch):
    builders, grad_out = providers.layer(providers.Shape(5, 5, 1, 3, 0, 4), 1, torch.float32, torch.device("cpu"), True)
    fail = lambda *_, **__: pytest.fail("a kernel")
    for name in ("elsa_attention", "hadamard"):
        monkeypatch.setattr(models.elsa, name, fail)
    assert len(builders["naive"]()(grad_out)) > 2
    assert models.elsa.elsa_attention is models.elsa.hadamard is fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_run_under_autocast(monkeypatch, dtype):
    seen = []
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    monkeypatch.setattr(providers, "create_model", lambda name, attn: model)
    out, *_ = providers.model("swin_t", 1, dtype, torch.device("cpu"), False)[0]["elsa"]()(None)
    assert seen == [dtype] and out.dtype == torch.float32


def test_windows_attend_within_themselves():
    q, k, v = torch.randn(3, 2, 9, 15, 8, generator=torch.Generator().manual_seed(0))
    out = providers.window(q, k, v, heads=2)
    assert out.shape == v.shape
    q, k, v = (x.view(2, 9, 15, 2, 4) for x in (q, k, v))
    for y, x, head in ((0, 0, 0), (6, 6, 1), (3, 8, 0)):  # windows that are whole
        i, j = y // 7 * 7, x // 7 * 7
        inside = slice(i, i + 7), slice(j, j + 7), head
        a = (k[1][inside] @ q[1, y, x, head] / 2).flatten().softmax(0)  # 2: the root of 4 channels
        assert torch.allclose(out.view(2, 9, 15, 2, 4)[1, y, x, head], a @ v[1][inside].reshape(49, 4), atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attends_to_the_neighbourhood(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v = torch.randn(3, 1, 6, 9, 32, generator=torch.Generator().manual_seed(0))
    out = providers.flex(6, 9, 2, 3, torch.device("cpu"))(q, k, v)
    q, k, v, out = (x.view(6, 9, 2, 16) for x in (q, k, v, out))
    for y, x, head in ((0, 0, 0), (3, 8, 1), (5, 4, 0), (2, 2, 1)):
        near = slice(max(0, y - 1), y + 2), slice(max(0, x - 1), x + 2), head
        a = (k[near] @ q[y, x, head] / 4).flatten().softmax(0)
        assert torch.allclose(out[y, x, head], a @ v[near].reshape(-1, 16), atol=1e-5)


def test_depthwise_filters_each_channel():
    v, filters = torch.randn(1, 5, 6, 3), torch.randn(3, 3, 3)
    out = providers.depthwise(v, filters)
    assert torch.allclose(out[0, 2, 3, 1], (v[0, 1:4, 2:5, 1] * filters[1]).sum(), atol=1e-5)
    assert torch.allclose(out[0, 0, 0, 2], (v[0, :2, :2, 2] * filters[2, 1:, 1:]).sum(), atol=1e-5)


@pytest.mark.parametrize("name, plain", [("swin_t", "window"), ("volo_d1", "outlook")])
def test_naive_model_computes_what_elsa_computes(monkeypatch, name, plain):
    create, cpu, made = providers.create_model, torch.device("cpu"), []
    small = dict(swin_t=dict(embed_dim=4, depths=(1, 1), num_heads=(1, 2), patch_size=16),
                 volo_d1=dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(2, 4), stem_dim=4, patch_size=32))[name]
    monkeypatch.setattr(providers, "create_model",
                        lambda name, attn: made.append(create(name, attn=attn, **small)) or made[-1])
    builders, one = providers.model(name, 2, torch.float32, cpu, backward=True)
    assert list(builders) == ["elsa", plain, "elsa naive", "elsa compiled", f"{plain} compiled"]
    elsa, naive = builders["elsa"]()(one), builders["elsa naive"]()(one)
    assert all(model.training for model in made) and elsa[0].shape == () and len(elsa) > 10
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(elsa, naive, strict=True))
    assert builders[plain]()(one)[0] != elsa[0]
    provider = providers.model(name, 2, torch.float32, cpu, backward=False)[0]["elsa"]()
    assert not made[-1].training and len(provider(None)) == 1


def test_batches_and_cases_of_the_defaults():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [providers.default_batch_size("detector stage 1", device) for device in (cpu, gpu)] == [1, 2]
    assert [providers.default_batch_size("swin_t", device) for device in (cpu, gpu)] == [4, 128]
    assert dict(providers.cases("operator", ["swin_t"]))["swin_t/s stage 3"] == (14, 14, 12, 7, 0, 4)
    assert [name for name, _ in providers.cases("operator", ["swin_t", "swin_s stage 1", "swin_b stage 2"])] == [
        "swin_t/s stage 1", "swin_t/s stage 2", "swin_t/s stage 3", "swin_b stage 2"]
    assert providers.cases("layer", ["volo_d1", "detector stage 3"]) == [
        ("volo_d1 stage 1", (28, 28, 6, 5, 1, 8)), ("detector stage 3", (50, 84, 12, 7, 0, 4))]
    assert providers.cases("model", ["volo_d1", "swin_b stage 1"]) == [("swin_b", "swin_b"), ("volo_d1", "volo_d1")]
