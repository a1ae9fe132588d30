"""The aggregation on the CPU path and on the Triton kernels: its naive reference, golden values, what always holds."""
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from backends import BACKENDS, backend
from cases import SMALL, Case, hypothesis_settings, problems
from kernels import elsa_attention, elsa_attention_reference
from published import assert_close

GOLDEN = Path(__file__).parent / "golden"
on_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")


@on_triton
@hypothesis_settings(20)
@given(problems(SMALL))
def test_triton_equals_reference(problem):
    with backend("triton") as device:
        Case(**problem, device=device).check()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("problem", [
    dict(heads=1, stride=2, dtype=torch.float32), dict(heads=1, dilation=2, dtype=torch.float32),
    dict(B=2, heads=1, stride=2), dict(H=7, W=7, heads=1, stride=2, dilation=3), dict(dilation=2, mul="static"),
    dict(dtype=torch.float32, logits_layout="nhwc"), dict(logits_layout="cropped"), dict(v_layout="nchw"),
    dict(B=2, heads=1, v_layout="slice of a projection", logits_layout="nhwc"),
    dict(B=2, heads=1, logits_layout="slice of a projection"), dict(heads=2, logits_layout="expanded"),
    dict(B=2, heads=1, mul="per-sample", add="per-sample", normalize=False, dtype=torch.float32),
    dict(B=2, heads=1, mul="per-sample", add=None, stride=2), dict(B=2, heads=1, attention=False, add="per-sample"),
    dict(mul="static", lam=2, gamma=-0.5), dict(heads=1, kernel_size=5, dtype=torch.bfloat16, mul="static")], ids=str)
def test_layouts_strides_dilations_and_filters(name, problem):
    with backend(name) as device:
        Case(**problem, device=device).check()


@pytest.mark.parametrize("name", BACKENDS)
def test_more_taps_in_a_row_than_one_program_sums(name):
    with backend(name) as device:
        for normalize in (True, False):
            Case(H=2, W=5, heads=1, width=2, kernel_size=9, mul="static", normalize=normalize, dtype=torch.float32,
                 device=device).check()


@on_triton
def test_several_splits_of_the_filters_gradients(monkeypatch):
    """The splits' borders lie inside rows, and the last one is shorter than the others."""
    from kernels import aggregation
    monkeypatch.setattr(aggregation, "SPLIT_SIZE", 3)
    with backend("triton") as device:
        for filters in ("static", "per-sample"):
            Case(B=2, heads=1, mul=filters, add=filters, dtype=torch.float32, device=device).check()


@on_triton
def test_samples_that_share_programs(monkeypatch):
    """Two samples a group, of which the last has one; a program's strips begin in one sample and end in the next."""
    from kernels import aggregation
    monkeypatch.setattr(aggregation, "GROUP_SIZE", 2 * 2 * 5)
    monkeypatch.setattr(aggregation, "candidates", lambda *_: [dict(BLOCK_S=4, num_warps=1)])
    with backend("triton") as device:
        for filters in ("static", "per-sample"):
            Case(B=3, H=2, W=5, heads=1, mul=filters, dtype=torch.float32, device=device).check()


@on_triton
def test_several_programs_of_one_sample_and_head(monkeypatch):
    from kernels import aggregation
    smallest = dict(BLOCK_S=4, num_warps=1)
    monkeypatch.setattr(aggregation, "candidates", lambda *_: [smallest])
    with backend("triton") as device:
        Case(H=5, W=6, heads=1, mul="static", dtype=torch.float32, device=device).check()
        Case(B=2, H=4, W=3, heads=1, dtype=torch.float64, device=device).check()


@pytest.mark.parametrize("name,dtype", list(itertools.product(BACKENDS, (torch.float32, torch.bfloat16))))
def test_logits_of_a_few_hundred(name, dtype):
    """Their exponentials are beyond float32. Rounding the log-sum-exp costs half a unit in the last place of 1,000."""
    with backend(name) as device:
        case = Case(heads=1, mul="static", dtype=dtype, device=device)
        case.tensors["logits"] = case.tensors["logits"] * 300
        wanted = case.run(elsa_attention_reference, torch.float64)
        for key, result in case.run(elsa_attention).items():
            assert_close(key, wanted[key], result.double(), 1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("index", range(9))
def test_golden(name, index):
    """Values and gradients of the published implementation, float64."""
    with backend(name) as device:
        spec = json.loads((GOLDEN / "op_cases.json").read_text())[index]
        arrays = np.load(GOLDEN / "op.npz")
        B, G, D, H, W, k = (spec[key] for key in ("B", "heads", "head_dim", "H", "W", "kernel_size"))
        read = lambda key: torch.from_numpy(arrays[f"case{index}_{key}"]).to(device)
        last = lambda key: read(key).view(B, G * D, H, W).permute(0, 2, 3, 1)
        v, logits = last("v").requires_grad_(), read("logits").view(B, G * k * k, H, W).requires_grad_()
        filters = [read(key).requires_grad_() for key in ("ghost_mul", "ghost_add")]
        options = {key: spec[key] for key in ("kernel_size", "dilation", "lam", "gamma")}
        out = elsa_attention(v, logits, *filters, **options)
        grads = torch.autograd.grad(out, (v, logits, *filters), last("grad_out"), allow_unused=True)
        expected = [last("out"), last("dv"), read("dlogits").view_as(logits), read("dghost_mul"), read("dghost_add")]
        for name, got, want in zip(("out", "dv", "dlogits", "dghost_mul", "dghost_add"), (out, *grads), expected):
            got = torch.zeros_like(want) if got is None else got
            assert (got - want).abs().max() <= 1e-9 * want.abs().max(), name


@pytest.mark.parametrize("name", BACKENDS)
def test_linear_in_v(name):
    with backend(name) as device:
        case = Case(mul="static", dtype=torch.float64, device=device)
        v, *rest = case.tensors.values()
        w = torch.flip(v, [1])
        run = lambda x: elsa_attention(x, *rest, **case.options)
        torch.testing.assert_close(run(2 * v - 3 * w), 2 * run(v) - 3 * run(w), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BACKENDS)
def test_constant_added_to_all_logits_of_a_pixel_changes_nothing(name):
    with backend(name) as device:
        case = Case(heads=2, device=device)
        before = case.run(elsa_attention)
        added = torch.randn(1, 2, 1, 5, 6, dtype=torch.float64, device=device) * 50
        case.tensors["logits"] = (case.tensors["logits"].unflatten(1, (2, 9)) + added).flatten(1, 2)
        for key, value in case.run(elsa_attention).items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BACKENDS)
def test_heads_permute(name):
    with backend(name) as device:
        case = Case(heads=3, width=4, mul="static", device=device)
        out = case.run(elsa_attention)["out"]
        order = torch.tensor([2, 0, 1], device=device)
        swap = lambda x, dim: x.unflatten(dim, (3, -1)).index_select(dim, order).flatten(dim, dim + 1)
        swapped = [swap(x, dim) for x, dim in zip(case.tensors.values(), (3, 1, 0, 0))]
        # The CPU's vectorised softmax rounds the end of an image otherwise than its middle.
        tolerance = 1e-14 if name == "cpu" else 0
        torch.testing.assert_close(elsa_attention(*swapped, **case.options), swap(out, 3), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name,filters", list(itertools.product(BACKENDS, ("static", "per-sample"))))
def test_batch_entries_do_not_touch_each_other(name, filters):
    with backend(name) as device:
        case = Case(B=3, mul=filters, add=filters, device=device)
        together = case.run(elsa_attention)
        one = slice(1, 2)
        case.tensors = {key: x[one] if x.ndim == 4 else x for key, x in case.tensors.items()}
        case.grad_out = case.grad_out[one]
        alone = case.run(elsa_attention)
        for key in ("out", "dv", "dlogits", *(("dghost_mul", "dghost_add") if filters == "per-sample" else ())):
            torch.testing.assert_close(alone[key], together[key][one], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name,stride", list(itertools.product(BACKENDS, (1, 2))))
def test_nan_spreads_only_to_the_pixels_whose_taps_reach_it(name, stride):
    with backend(name) as device:
        case = Case(H=9, W=8, dilation=2, stride=stride, device=device)
        case.tensors["v"][0, 4, 4, 1] = float("nan")
        got = elsa_attention(*case.tensors.values(), **case.options)
        reaches = torch.zeros(9 // stride, 8 // stride, dtype=torch.bool, device=device)
        for y, x in itertools.product(range(9 // stride), range(8 // stride)):
            reaches[y, x] = abs(4 - y * stride) in (0, 2) and abs(4 - x * stride) in (0, 2)
        expected = torch.zeros_like(got, dtype=torch.bool)
        expected[0, :, :, 1] = reaches
        assert reaches.any() and torch.equal(got.isnan(), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_that_no_output_reads_reaches_no_gradient(name):
    """The last row and column, beside what a stride of two takes in steps, and for all taps but those at the end."""
    with backend(name) as device:
        case = Case(H=7, W=7, stride=2, mul="static", device=device)
        plain = case.run(elsa_attention)
        case.tensors["v"][0, 6] = case.tensors["v"][0, :, 6] = float("nan")
        got = case.run(elsa_attention)
        assert all(torch.equal(got[key], plain[key]) for key in ("out", "dv", "dlogits", "dghost_mul", "dghost_add"))
        case.tensors["v"][0, 5] = float("nan")  # read by the last row of taps alone
        got = case.run(elsa_attention)
        for key in ("dghost_mul", "dghost_add"):
            assert got[key][:, :2].isfinite().all() and got[key][:, 2].isnan().any()


@pytest.mark.parametrize("name", BACKENDS)
def test_logits_of_minus_infinity_mask_their_taps(name):
    with backend(name) as device:
        case = Case(device=device)
        case.tensors["logits"][:, 0:4] = -float("inf")
        case.check()


@pytest.mark.parametrize("name,dtype", list(itertools.product(BACKENDS, (torch.float32, torch.bfloat16))))
def test_two_runs_are_bit_identical(name, dtype):
    with backend(name) as device:
        case = Case(B=2, W=7, heads=1, mul="static", dtype=dtype, device=device)
        first, second = case.run(elsa_attention), case.run(elsa_attention)
        assert all(torch.equal(first[key], second[key]) for key in first)


# The registered operator
