"""How kernels are launched, rehearsed on a simulated GPU: what waits for it, what the tuner measures, which device."""
import contextlib
import io
import sys
import tempfile
import types
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")
from cases import Case
from kernels import backend, elsa_attention, hadamard, tuning
from simulated import compiled, simulated
from simulator import __main__ as command
from test_hadamard import ours, problem

WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")  # for a GPU


def call_both():
    """Forward and backward passes of both operators -> their results."""
    results = Case(H=3, W=5, heads=1, width=8, mul="static", dtype=torch.float32).run(elsa_attention)
    case = problem(B=1, H=3, W=5, groups=4, dtype=torch.bfloat16)
    return [*results.values(), *ours(*case, 1.0, 1, torch.device("cpu"))]


@compiled
def test_nothing_waits_for_the_gpu():
    def waits(*_, **__):
        raise AssertionError("a launch waits for the GPU")

    case = Case(H=3, W=5, heads=1, width=8, mul="static", dtype=torch.float32)
    projection, (weight, bias), grad = problem(B=1, H=3, W=5, groups=4, dtype=torch.bfloat16)
    with simulated(90) as device, contextlib.ExitStack() as stack:
        for name in WAITING:
            stack.enter_context(mock.patch.object(torch.Tensor, name, waits))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", waits))
        case.run(elsa_attention)
        leaves = [x.requires_grad_() for x in (projection, weight, bias)]
        z = hadamard(projection[..., :16], projection[..., 16:32], weight, bias)
        torch.autograd.grad(z, leaves, grad)
    assert len(device.launches) >= 8


@compiled
def test_kernels_run_on_their_tensors_device():
    """Device 0 is current, the tensors are on device 1; afterwards 0 is current again."""
    with simulated(90) as gpu:
        @contextlib.contextmanager
        def current(device):
            gpu.index, before = torch.device(device).index, gpu.index
            yield
            gpu.index = before

        with mock.patch.object(torch.cuda, "device", current):
            on_device_of = backend.on_device_of
            second = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
            with mock.patch.object(backend, "on_device_of", lambda x: on_device_of(second)):
                call_both()
    assert {launch["index"] for launch in gpu.launches} == {1} and gpu.index == 0


class Clock:
    """For the tuner instead of a GPU's: the configuration that is measured last was the fastest."""

    def __init__(self):
        self.measured = 0

    def __call__(self, run, **options):
        run()
        self.measured += 1
        return -self.measured


@contextlib.contextmanager
def tuner(folder, capturing=False):
    """In this block CPU tensors count as a GPU's for the tuner, which begins with what is in a folder -> its clock."""
    clock, launch = Clock(), tuning.launch
    on_gpu = lambda kernel, problem, configs, run, device: launch(kernel, problem, configs, run, torch.device("cuda"))
    with mock.patch.dict("os.environ", ELSA_CACHE_DIR=folder), contextlib.ExitStack() as stack:
        for module, name, value in (
                (tuning, "launch", on_gpu), (tuning, "_table", None), (tuning, "_measures", True),
                (tuning, "_stand_ins", {}),
                (torch.cuda, "get_device_name", lambda _: "GPU"),
                (torch.cuda, "is_current_stream_capturing", lambda: capturing)):
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch("triton.testing.do_bench", clock))
        yield clock


@compiled
def test_the_tuner_measures_each_configuration_once():
    """Not for a second call, another process or another rank, in a capture, nor while a call is traced."""
    with simulated(90) as device, tempfile.TemporaryDirectory() as folder:
        with tuner(folder) as clock:
            first = call_both()
            table, measured = tuning.tuned(), clock.measured
            assert measured > len(table) >= 5
            second = call_both()
            assert clock.measured == measured and all(torch.equal(a, b) for a, b in zip(first, second))
        with tuner(folder) as clock:  # another process reads the file
            call_both()
            assert clock.measured == 0
        with tempfile.TemporaryDirectory() as empty:
            with tuner(empty) as clock:
                tuning.set_tuned(table)  # as another rank sent it
                call_both()
                assert clock.measured == 0
            with tuner(empty, capturing=True) as clock:
                call_both()
                assert clock.measured == 0
                tuning.set_tuned(table)
                captured = call_both()
                assert clock.measured == 0 and all(torch.equal(a, b) for a, b in zip(first, captured))
            launches = len(device.launches)
            with tuner(empty) as clock, FakeTensorMode() as fake:
                case = Case(dtype=torch.float32)
                traced = [x if x is None else fake.from_tensor(x) for x in case.tensors.values()]
                assert elsa_attention(*traced, **case.options).shape == case.grad_out.shape
                assert clock.measured == 0 and len(device.launches) == launches


@compiled
def test_the_table_of_what_binds_each_kernel():
    printed = io.StringIO()
    arguments = ["", "--layers", "tiny", "--batch", "2", "--programs", "3"]
    with mock.patch.object(command, "LAYERS", {"tiny": (5, 6, 1, 3, True, 16, 4)}), mock.patch.dict("os.environ"), \
            mock.patch.object(sys, "argv", arguments), contextlib.redirect_stdout(printed):
        command.main()
    rows = printed.getvalue().splitlines()
    kernels = [row.split()[0] for row in rows if "_kernel" in row]
    assert {"forward_kernel", "dv_kernel", "dlogits_kernel", "dghost_kernel"} < set(kernels)
    assert f"of each of {len(kernels)} launches" in rows[-1] and "an estimate" in rows[-1]
    busiest = 0
    for row in rows:
        if "_kernel" in row:
            name, grid, threads, shared, issue, fp32, special, memory_path, _, *parts = row.split()
            assert abs(float(memory_path) - sum(map(float, parts[0:5:2]))) < 0.2
            busiest += max(float(issue), float(special), float(memory_path))
    assert abs(busiest - int(rows[-1].split()[0])) < 2
