"""models/elsa.py: the layer against the published numbers and against its definition written out naively."""
import copy
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard

from kernels import backend, elsa_attention
from models.elsa import ELSA, LogitsProjection, Pointwise
from published import GOLDEN, assert_close
from train.state import TrainingState
from training import tiny


@pytest.mark.parametrize("case", range(4))
def test_elsa_layer_equals_the_published_one(case):
    options = json.loads((GOLDEN / "module_cases.json").read_text())[case]
    arrays = np.load(GOLDEN / "module.npz")

    def array(name):
        return torch.tensor(arrays[f"m{case}_{name}"], dtype=torch.float64)

    layer = ELSA(**options).double()
    layer.load_state_dict({name: array(f"param.{name}") for name, _ in layer.named_parameters()})
    assert {name: x.shape for name, x in layer.state_dict().items()} == {
        name: array(f"param.{name}").shape for name, _ in layer.named_parameters()}
    assert sum(key.startswith(f"m{case}_param.") for key in arrays.files) == len(list(layer.parameters()))
    x = array("x").requires_grad_()
    out = layer(x)
    out.backward(array("grad_out"))
    assert_close("out", array("out"), out.detach(), 1e-9)
    assert_close("dx", array("dx"), x.grad, 1e-9)
    for name, parameter in layer.named_parameters():
        assert_close(name, array(f"grad.{name}").reshape(parameter.shape), parameter.grad, 1e-9)


def naive_elsa(layer, x, scale, group_width, lam, gamma):
    """The layer from its parameters, with a copy of v per tap. Channels-first inside."""
    k, s, d, G, Q = layer.kernel_size, layer.stride, layer.dilation, layer.num_heads, layer.dim_qk
    pad = k // 2 * d
    qkv = F.conv2d(x.permute(0, 3, 1, 2), layer.pre_proj.weight[:, :, None, None], layer.pre_proj.bias)
    q, k_, v = qkv.split((Q, Q, layer.dim_v), dim=1)
    h = F.avg_pool2d(q * k_ * scale, s)
    z = F.gelu(F.conv2d(h, layer.attn[0].weight, layer.attn[0].bias, padding=pad, dilation=d, groups=Q // group_width))
    last = layer.attn[2]
    logits = F.conv2d(z, last.weight.flatten(1)[..., None, None], last.bias, groups=getattr(last, "groups", 1))
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
    excess = layer.dim_qk - options.get("dim_qk", options["dim"] // 3 * 2)
    assert layer.dim_qk % group_width == 0 and 0 <= excess < group_width
    x = torch.randn(2, 9, 11, options["dim"], dtype=torch.float64, requires_grad=True)
    scale = options.get("qk_scale", (layer.dim_v / options["num_heads"]) ** -0.5)
    inputs = [x, *layer.parameters()]
    expected = naive_elsa(layer, x, scale, group_width, options.get("lam", 1), options.get("gamma", 1))
    result = layer(x)
    grad_out = torch.randn_like(expected)
    assert_close("out", expected, result, 1e-12)
    references = torch.autograd.grad(expected, inputs, grad_out)
    gradients = torch.autograd.grad(result, inputs, grad_out)
    for name, reference, gradient in zip(["x", *dict(layer.named_parameters())], references, gradients):
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


class LowRank(nn.Module):
    """Another module and a product of two narrow matrices beside it, as adapters are."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


LAYERS = [dict(kernel_size=3), dict(kernel_size=7), dict(kernel_size=3, stride=2), dict(kernel_size=3, hadamard=False),
          dict(kernel_size=3, groups=2)]


@pytest.mark.parametrize("options", LAYERS)
def test_modules_are_called(options):
    """So hooks fire, and what takes a module's place acts."""
    torch.manual_seed(0)
    layer, x, called = ELSA(16, 2, **options), torch.randn(2, 6, 5, 16), []
    modules = {name: module for name, module in layer.named_modules()
               if name and list(module.parameters(recurse=False))}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    plain = layer(x)
    assert called == ["pre_proj", "attn.0", "attn.2", "post_proj"] == list(modules)
    if options.get("groups"):
        return
    for place in ("pre_proj", "attn.2"):
        adapted = copy.deepcopy(layer)
        adapter = LowRank(adapted.get_submodule(place))
        adapted.set_submodule(place, adapter)
        out = adapted(x)
        out.square().sum().backward()
        assert (out - plain).abs().max() > 1e-4 and adapter.down.weight.grad.any()
        with torch.no_grad():  # merged
            adapter.base.weight += adapter.up.weight @ adapter.down.weight
            adapter.base.bias = nn.Parameter(
                adapter.up(adapter.down.bias) + (0 if adapter.base.bias is None else adapter.base.bias))
        adapted.set_submodule(place, adapter.base)
        assert_close(place, out, adapted(x), 1e-5)


def test_other_parts_are_called_where_they_are_not_in_an_operator(monkeypatch):
    called, normalized = [], []
    for options in (dict(stride=2), dict(hadamard=False), dict(attn_drop=0.1), {}):
        layer = ELSA(16, 2, kernel_size=3, **options)
        layer.attn[1].register_forward_hook(lambda *_: called.append({**options}))
        with monkeypatch.context() as patch:
            patch.setattr("models.elsa.elsa_attention", lambda *tensors, normalize, **rest: normalized.append(
                normalize) or elsa_attention(*tensors, normalize=normalize, **rest))
            layer(torch.ones(1, 4, 4, 16))
    assert called == [{"stride": 2}, {"hadamard": False}] and normalized == [True, True, False, True]


def test_small_maps_alone_have_the_taps_of_a_pixel_side_by_side():
    projection = LogitsProjection(8, 18, window=20)
    for height, stride in ((4, 18), (5, 1), (6, 1)):  # 16, 20 and 24 pixels: those of one tap then
        logits = projection(torch.randn(2, height, 4, 8))
        assert logits.shape == (2, height, 4, 18) and logits.stride(2) == stride


@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
def test_triton_kernels_get_logits_of_one_product(monkeypatch):
    """Pixels of a tap side by side, of all images; the gradient of what it is made of needs no copy either."""
    torch.manual_seed(0)
    projection, z, grad = LogitsProjection(8, 18, window=20), torch.randn(2, 3, 4, 8), torch.randn(18, 2, 3, 4)
    leaves = [z.requires_grad_(), *projection.parameters()]
    want = F.linear(*leaves)
    monkeypatch.setenv("ELSA_BACKEND", "triton")
    logits = projection(z)
    assert logits.shape == (2, 3, 4, 18) and logits.permute(3, 0, 1, 2).is_contiguous()
    grads = torch.autograd.grad(logits, leaves, grad.permute(1, 2, 3, 0))
    assert grads[0].is_contiguous()
    wanted = torch.autograd.grad(want, leaves, grad.permute(1, 2, 3, 0))
    for name, reference, result in zip(("logits", "dz", "dweight", "dbias"), (want, *wanted), (logits, *grads)):
        assert_close(name, reference, result, 1e-6)


@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("batch, whole", [(2 ** 15 - 1, True), (2 ** 15, False)])
def test_logits_of_a_batch_of_2_to_the_31_lie_image_by_image(monkeypatch, batch, whole):
    """The kernels take distances inside a sample, from tap to tap here, in 32 bits."""
    monkeypatch.setenv("ELSA_BACKEND", "triton")
    with torch.device("meta"):
        logits = LogitsProjection(8, 16, window=9)(torch.empty(batch, 64, 64, 8))
    assert logits.permute(3, 0, 1, 2).is_contiguous() == whole
    assert logits.permute(0, 3, 1, 2).is_contiguous() != whole


def test_saved_shapes_are_a_convolutions_and_both_are_loaded():
    layer = ELSA(16, 2, kernel_size=3)
    state = layer.state_dict()
    assert state["pre_proj.weight"].shape == (2 * layer.dim_qk + 16, 16, 1, 1)
    assert state["attn.2.weight"].shape == (18, layer.dim_qk, 1, 1)
    state["pre_proj.weight"].fill_(3)
    assert (layer.pre_proj.weight == 3).all()  # what is saved is no copy
    parameters = {name: torch.zeros_like(value) for name, value in layer.named_parameters()}
    for saved in (state, parameters):
        other = ELSA(16, 2, kernel_size=3)
        other.load_state_dict(saved)
        assert torch.equal(other.pre_proj.weight, saved["pre_proj.weight"].flatten(1))
    with pytest.raises(RuntimeError, match="pre_proj.weight"):  # of as many numbers
        layer.load_state_dict({**state, "pre_proj.weight": torch.zeros(2 * layer.dim_qk + 16, 4, 2, 2)})
    with torch.device("meta"):
        empty = ELSA(16, 2, kernel_size=3)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(torch.ones(1, 4, 4, 16)), layer(torch.ones(1, 4, 4, 16)))


def test_every_module_can_be_sharded():
    torch.manual_seed(0)
    layer, x = ELSA(16, 2, kernel_size=3), torch.randn(2, 6, 5, 16)
    layer(x).square().sum().backward()
    sharded = ELSA(16, 2, kernel_size=3)
    sharded.load_state_dict(layer.state_dict())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for module in (sharded.pre_proj, sharded.attn[0], sharded.attn[2], sharded.post_proj, sharded):
            fully_shard(module, mesh=mesh)
        sharded(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            gradient = sharded.get_parameter(name).grad.full_tensor()
            assert_close(name, parameter.grad, gradient, 1e-6)
        assert {name: x.shape for name, x in sharded.state_dict().items()} == {
            name: x.shape for name, x in layer.state_dict().items()}
    finally:
        dist.destroy_process_group()


def test_moments_of_checkpoints_with_convolutions_are_taken_over():
    def moved(state):
        for parameter in state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step()
        return state

    start = lambda: TrainingState(tiny(), world=1, device=torch.device("cpu"))
    first = moved(start())
    checkpoint = copy.deepcopy(first.checkpoint(["a"]))
    places = [i for i, parameter in enumerate(sum((group["params"] for group in first.optimizer.param_groups), []))
              if any(parameter is layer.weight for layer in first.model.modules() if isinstance(layer, Pointwise))]
    assert len(places) == 6
    for i in places:
        for name in ("exp_avg", "exp_avg_sq"):
            moments = checkpoint["optimizer"]["state"][i]
            moments[name] = moments[name][:, :, None, None]
    second = start()
    second.load(checkpoint, ["a"], steps=1)
    assert all(moments["exp_avg"].shape == parameter.shape for parameter, moments in second.optimizer.state.items())
    for ours, want in zip(moved(second).model.parameters(), moved(first).model.parameters()):
        assert torch.equal(ours, want)
