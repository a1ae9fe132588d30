"""Which path a call takes, and that the folder works without triton, and elsewhere under another name."""
import os
import shutil
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


LIFTED = """
import importlib, os, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import torch
from mylib import elsa_kernels as lifted

def gradients(backend):
    os.environ["ELSA_BACKEND"] = backend
    torch.manual_seed(0)
    v, logits, add, q, weight, bias = leaves = [torch.randn(shape, requires_grad=True) for shape in (
        (1, 3, 4, 6), (1, 18, 3, 4), (6, 3, 3), (1, 3, 4, 8), (8, 4, 3, 3), (8,))]
    out = lifted.elsa_attention(v, logits, None, add, kernel_size=3), lifted.hadamard(q, q, weight, bias)
    return [*out, *torch.autograd.grad(out, leaves, [torch.randn_like(x) for x in out])]

if lifted.backend.HAS_TRITON:
    for module in pkgutil.iter_modules(lifted.__path__):
        importlib.import_module(f"mylib.elsa_kernels.{module.name}")
for backend in ("", "triton") if lifted.backend.HAS_TRITON else ("",):
    results = gradients(backend)
    for result, expected in zip(results, gradients("")):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
ours = {"kernels", "models", "train", "eval", "torchvision"} & sys.modules.keys()
print(len(results), *ours)
"""


def test_works_elsewhere_under_another_name(tmp_path):
    """Of the project nothing but the folder is there, and nothing else is imported than torch and triton."""
    shutil.copytree(Path(backend.__file__).parent, tmp_path / "mylib/elsa_kernels")
    process = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", LIFTED, tmp_path], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"})
    assert process.stdout == "8\n", process.stderr


WITHOUT_TORCHVISION = """
import sys, torch
sys.modules["torchvision"] = None
from models import create_model
print(create_model("swin_t", attn="elsa", depths=(1, 1, 1, 1), num_classes=3)(torch.zeros(1, 3, 32, 32)).shape)
"""


def test_classifiers_need_no_torchvision():
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_TORCHVISION],
                             cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert process.stdout == "torch.Size([1, 3])\n", process.stderr


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
