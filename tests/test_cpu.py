"""The aggregation's CPU path against its naive reference."""
import pytest
import torch
from hypothesis import given

import limits
from backends import backend
from cases import Case, hypothesis_settings, problems
from kernels import cpu, elsa_attention, elsa_attention_reference


@hypothesis_settings(150)
@given(problems())
def test_cpu_equals_reference(problem):
    with backend("cpu") as device:
        Case(**problem, device=device).check()


@pytest.mark.parametrize("filters", ("static", "per-sample"))
def test_cpu_in_chunks_of_the_batch(filters, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 2 * 5 * 6 * 6)  # two samples
    Case(B=5, mul=filters, add=filters).check()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_16_bit_inputs_are_computed_in_float32(dtype):
    """So that only the results are rounded, once."""
    case = Case(mul="static", kernel_size=5, dtype=dtype)
    exact = case.run(elsa_attention, torch.float32)
    for name, result in case.run(elsa_attention).items():
        assert torch.equal(result, exact[name].to(dtype)), name


@pytest.mark.parametrize("filters", ("static", "per-sample"))
@pytest.mark.parametrize("side", (2, 5))  # of an image: smaller than the window, and larger
def test_gradients_of_filters_whose_taps_do_not_follow_each_other(filters, side):
    layouts = [lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
               lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3),
               lambda x: torch.cat([x, x], -1)[..., 2:5]]
    for layout in layouts:
        case = Case(B=2, H=side, W=side, mul=filters, add=filters)
        v, logits, *ghosts = case.tensors.values()
        leaves = [v.requires_grad_(), logits.requires_grad_(), *(layout(x).requires_grad_() for x in ghosts)]
        results = [torch.autograd.grad(operator(*leaves, kernel_size=3), leaves, case.grad_out)
                   for operator in (elsa_attention, elsa_attention_reference)]
        torch.testing.assert_close(*results, rtol=0, atol=1e-11)


def test_each_element_is_checked_closely_enough_to_see_a_dropped_tap():
    """In bfloat16, where a tap of 49 is less than the largest element is rounded; and a column that is another's."""
    case = Case(H=9, W=8, width=8, kernel_size=7, dtype=torch.bfloat16)
    wanted = limits.aggregation_and_limits(case.tensors, case.options, case.grad_out)
    results = case.run(elsa_attention)
    limits.assert_each_element_close(results, *wanted)
    case.tensors["ghost_add"] = case.tensors["ghost_add"].clone()
    case.tensors["ghost_add"][:, 6, 6] = 0
    dropped = case.run(elsa_attention)
    for name, wrong in (("out", dropped["out"]), ("dv", dropped["dv"]), ("dv", results["dv"].roll(1, 2)),
                        ("dlogits", results["dlogits"].roll(1, 1))):
        with pytest.raises(AssertionError, match=f"{name}: "):
            limits.assert_each_element_close({name: wrong}, *wanted)
