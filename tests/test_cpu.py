"""The aggregation's CPU path against its naive reference."""
import pytest
from cases import Case, hypothesis_settings, problems
from hypothesis import given

from backends import backend
from kernels import cpu


@hypothesis_settings(150)
@given(problems())
def test_cpu_equals_reference(problem):
    with backend("cpu") as device:
        Case(**problem, device=device).check()


@pytest.mark.parametrize("filters", ("static", "per-sample"))
def test_cpu_in_chunks_of_the_batch(filters, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 2 * 5 * 6 * 6)  # two samples
    Case(B=5, mul=filters, add=filters).check()
