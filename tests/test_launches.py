"""How many kernels a training step of one ELSA layer launches on a GPU, ours and torch's, counted on a CPU."""
import contextlib
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from kernels.attention import _attention, _attention_backward
from kernels.hadamard import _hadamard, _hadamard_backward
from models.elsa import ELSA
from simulated import compiled

OPERATORS = {operator._opoverload: operator._init_fn for operator in (
    _attention, _attention_backward, _hadamard, _hadamard_backward)}
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view"}
SEVERAL = {"baddbmm": 2, "constant_pad_nd": 2, "select_backward": 2}  # what is added, or zeros, first


class Counting(TorchDispatchMode):
    """launches: the names of the kernels, as far as those of torch have one."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPERATORS:  # what it does inside counts
            with self:
                return OPERATORS[func](*args, **kwargs or {})
        with self:
            result = func.decompose(*args, **kwargs or {})
        if result is not NotImplemented:
            return result
        name = func._overloadpacket.__name__
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if not is_view and name not in NO_LAUNCH:
            self.launched("baddbmm" if name == "addmm" and args[0].ndim == 2 else name)
        return func(*args, **kwargs or {})

    def launched(self, name):
        self.launches += [name] * SEVERAL.get(name, 1)


@contextlib.contextmanager
def counted():
    """In this block launches are counted, and of ours none is made -> their names, in order."""
    mode = Counting()
    run = lambda kernel, *_, **__: mode.launched(kernel.__name__)
    with mock.patch("triton.runtime.jit.JITFunction.run", run), mock.patch.dict("os.environ", ELSA_BACKEND="triton"):
        with mode:
            yield mode.launches


@compiled
def test_what_is_a_launch():
    x, filters = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)
    with counted() as launches:
        torch.promote_types(x.dtype, torch.float64)
        torch.empty_like(x).reshape(6).t()
        x.flatten().contiguous()
    assert launches == []
    with counted() as launches:
        torch.nn.functional.pad(x.t().contiguous(), (1, 1))
        torch.addmm(torch.ones(3), x, x.t() @ x)
        torch.addmm(torch.ones(2, 1), x, x.t())
        filters[0].backward(torch.ones(3))
    assert sorted(launches) == sorted([
        "clone", *2 * ["constant_pad_nd"], "mm", "ones", "ones", "ones", "addmm", *2 * ["baddbmm"],
        *2 * ["select_backward"]])


@pytest.mark.parametrize("options, forward, backward", [
    (dict(dim=96, num_heads=3, kernel_size=7, group_width=4, qk_scale=1, qkv_bias=True, lam=0), 9, 22),
    (dict(dim=192, num_heads=6, kernel_size=5, qk_scale=1), 10, 24)], ids=("swin", "volo"))
@compiled
def test_a_training_step_of_one_layer(options, forward, backward):
    """At most so many beside autocast's own, which casts every parameter, and every gradient of one."""
    layer = ELSA(**options)
    x = torch.randn(2, 14, 14, layer.dim, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), counted() as before:
        out = layer(x)
    grad = torch.ones_like(out)
    with counted() as after:
        out.backward(grad)
    casts = sum(parameter is not None for module in (layer.pre_proj, layer.attn[2], layer.post_proj)
                for parameter in (module.weight, module.bias))
    for launches, limit in ((before, forward), (after, backward)):
        assert launches.count("_to_copy") >= casts and len(launches) - casts <= limit, (len(launches) - casts, launches)
