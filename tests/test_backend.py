"""Which path a call takes, and that the folder works without triton."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends import BACKENDS
from kernels import backend, cpu

WITHOUT_TRITON = """
import os, sys, torch
sys.modules["triton"] = None  # as if it were not installed
import kernels
v, logits, q = torch.randn(1, 4, 4, 6), torch.randn(1, 18, 4, 4), torch.randn(1, 4, 4, 8)
print(kernels.elsa_attention(v, logits, kernel_size=3).shape)
print(kernels.hadamard(q, q, torch.randn(8, 4, 3, 3), q[0, 0, 0]).shape)
os.environ["ELSA_BACKEND"] = "triton"
for call in (lambda: kernels.elsa_attention(v, logits, kernel_size=3),
             lambda: kernels.hadamard(q, q, torch.randn(8, 4, 3, 3), q[0, 0, 0])):
    try:
        call()
    except ModuleNotFoundError as error:
        print("pip install triton" in str(error) and "unset ELSA_BACKEND" in str(error))
"""


def test_works_without_triton():
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON], cwd=Path(__file__).parent.parent,
                             capture_output=True, text=True)
    assert process.stdout == "torch.Size([1, 4, 4, 6])\ntorch.Size([1, 4, 4, 8])\nTrue\nTrue\n", process.stderr


def test_cpu_tensors_take_the_kernels_only_when_asked(monkeypatch):
    monkeypatch.delenv("ELSA_BACKEND", raising=False)
    x = torch.zeros(1, 2, 2, 8)
    assert backend.aggregation(x) is cpu and not backend.has_convolution(x, torch.zeros(8, 4, 3, 3))
    monkeypatch.setenv("ELSA_BACKEND", "triton")
    assert backend.has_convolution(x, torch.zeros(8, 4, 3, 3))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # asks for the interpreter, not for the kernels
    monkeypatch.setenv("ELSA_BACKEND", "")
    assert backend.aggregation(x) is cpu
    monkeypatch.setenv("ELSA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="ELSA_BACKEND: got 'cuda', expected triton"):
        backend.aggregation(x)
    monkeypatch.setenv("ELSA_BACKEND", "triton")
    if "triton" in BACKENDS:
        from kernels import aggregation, convolution
        assert backend.aggregation(x) is aggregation and backend.convolution() is convolution


@pytest.mark.parametrize("q,width,taken", [
    (torch.zeros(1, 1, 1, 128), 128, True), (torch.zeros(1, 1, 1, 129), 129, False),
    (torch.zeros(0, 1, 1, 8), 8, False), (torch.zeros(1, 1, 1, 8, dtype=torch.float64), 8, False),
    (torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), 8, True)], ids=str)
def test_what_the_convolution_takes(q, width, taken, monkeypatch):
    monkeypatch.setenv("ELSA_BACKEND", "triton")
    assert backend.has_convolution(q, torch.zeros(q.shape[3], width, 3, 3)) == taken
