"""The aggregation's CPU path against its naive reference."""
import pytest
import torch
from hypothesis import given

from backends import backend
from cases import Case, hypothesis_settings, problems
from kernels import cpu, elsa_attention


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
