"""The compiled kernels on a simulated GPU: right results, and nothing that a GPU would not let pass."""
import functools
import itertools
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from cases import Case
from kernels import elsa_attention, tuning
from models.elsa import ELSA
from published import assert_close
from simulated import compiled, simulated
from test_hadamard import TOLERANCE, expected, ours, problem

CAPABILITIES = (80, 90)
AGGREGATION = {"forward_kernel", "dv_kernel", "dlogits_kernel", "dghost_kernel"}
# Sides that fill no program, and in all of them together every dtype, stride, dilation and kind of filter.
AGGREGATIONS = {
    "swin": dict(B=2, H=5, W=7, heads=3, width=32, kernel_size=7, dtype="bfloat16", v_layout="slice of a projection"),
    "volo": dict(H=6, W=5, heads=2, width=32, kernel_size=5, mul="static", dtype="float16", logits_layout="nhwc"),
    "long window": dict(H=4, W=10, heads=2, width=16, kernel_size=9, mul="static", dtype="bfloat16"),
    "strided": dict(B=2, H=7, W=9, width=24, stride=2, mul="per-sample", add="per-sample", dtype="float32"),
    "dilated": dict(H=9, W=7, width=5, kernel_size=5, dilation=2, normalize=False, mul="static", dtype="float32"),
    "double": dict(H=3, W=5, width=3, mul="static", lam=2, gamma=-0.5, dtype="float64"),
    "no attention": dict(B=2, H=5, W=3, heads=1, width=40, attention=False, add="per-sample", dtype="bfloat16"),
    "one pixel": dict(H=1, W=1, width=8, mul="static", dtype="float32", logits_layout="cropped"),
}
HADAMARDS = {
    "swin": (dict(B=2, H=5, W=7, groups=5, width=4, k=7, dtype=torch.bfloat16), 1),
    "volo": (dict(B=1, H=6, W=5, groups=3, width=8, k=5, dtype=torch.float16), 1),
    "dilated": (dict(B=2, H=5, W=4, groups=2, width=12, k=3, dtype=torch.float32), 2),
    "two products a row": (dict(B=1, H=3, W=9, groups=1, width=16, k=9, dtype=torch.bfloat16), 1),
}
HADAMARD = problem(B=1, H=4, W=9, groups=4, width=4, k=7, dtype=torch.bfloat16)
PARTS = "z", "dprojection", "dweight", "dbias"


def aggregation(name):
    options = AGGREGATIONS[name]
    return Case(**{**options, "dtype": getattr(torch, options["dtype"])})


def kernels_of(device):
    return {launch["kernel"] for launch in device.launches}


@pytest.mark.parametrize("name,capability", list(itertools.product(AGGREGATIONS, CAPABILITIES)))
@compiled
def test_aggregation(name, capability):
    with simulated(capability) as device:
        aggregation(name).check()
    assert kernels_of(device) == AGGREGATION - ({"dlogits_kernel"} if name == "no attention" else set())


@pytest.mark.parametrize("name,capability", list(itertools.product(HADAMARDS, CAPABILITIES)))
@compiled
def test_hadamard(name, capability):
    options, dilation = HADAMARDS[name]
    case = problem(**options)
    with simulated(capability) as device:
        results = ours(*case, 0.3, dilation, torch.device("cpu"))
    for part, want, got in zip(PARTS, expected(*case, 0.3, dilation), results):
        assert_close(part, want, got, TOLERANCE[options["dtype"]])
    assert len(device.launches) >= 4


def every_configuration(index):
    """Instead of tuning.launch: the configuration with this index, from the first again behind the last."""
    return mock.patch.object(
        tuning, "launch", lambda kernel, problem, configs, run, device: run(**configs[index % len(configs)]))


@functools.cache
def results_of(index):
    """Of one aggregation and one Hadamard attention."""
    with simulated(90), every_configuration(index):
        aggregated = Case(H=4, W=9, heads=1, width=32, kernel_size=7, dtype=torch.bfloat16).run(elsa_attention)
        return aggregated | dict(zip(PARTS, ours(*HADAMARD, 1.0, 1, torch.device("cpu"))))


@pytest.mark.parametrize("index", range(1, 4))
@compiled
def test_configurations_that_the_tuner_may_choose(index):
    """They are right, and all but sums over pixels, of which tuning.for_sums_over_pixels speaks, are those of the first
    configuration to the bit."""
    results = results_of(index)
    Case(H=4, W=9, heads=1, width=32, kernel_size=7, dtype=torch.bfloat16).check(
        {name: results[name] for name in results if name not in PARTS})
    for part, want in zip(PARTS, expected(*HADAMARD, 1.0, 1)):
        assert_close(part, want, results[part], TOLERANCE[torch.bfloat16])
    for name, first in results_of(0).items():
        assert torch.equal(results[name], first) or name in ("dghost_add", "dweight"), name


@pytest.mark.parametrize("capability", (pytest.param(80, marks=pytest.mark.slow), 90))
@compiled
def test_a_layer_in_bfloat16(capability):
    """Its output and all gradients are as near to float64 as those of the CPU path in bfloat16."""
    torch.manual_seed(0)
    layer, x = ELSA(64, 2, kernel_size=7, group_width=4, qk_scale=1), torch.randn(2, 7, 7, 64)
    grad = torch.randn(2, 7, 7, 64)

    def run(dtype=torch.float32, autocast=True):
        module, leaf = layer.to(dtype), x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, autocast):
            out = module(leaf)
        names, leaves = zip(*[("dx", leaf), *module.named_parameters()])
        return dict(zip(("out", *names), (out.double(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))))

    exact = run(torch.float64, autocast=False)
    on_cpu = run()
    with simulated(capability) as device:
        on_gpu = run()
    error = lambda result, name: ((result[name].double() - exact[name]).norm() / exact[name].norm()).item()
    for name in exact:
        assert error(on_gpu, name) <= 1.5 * error(on_cpu, name) + 1e-3, (
            name, error(on_gpu, name), error(on_cpu, name))
    assert AGGREGATION < kernels_of(device) and len(kernels_of(device)) >= 7
