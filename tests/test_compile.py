"""Every kernel in every configuration of the tuner, compiled for GPUs that are not here: nothing spills, loads are wide.

Compiling needs the kernels undecorated by the interpreter, so the work is done in child processes, two at a time.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, sys, torch
from kernels import compile
target, dtype, shape = sys.argv[1:]
for kernel, arguments, constants in compile.launches(compile.SHAPES[shape], getattr(torch, dtype), target):
    print(json.dumps([kernel.__name__, compile.resources(kernel, arguments, constants, target)]), flush=True)
"""
PRODUCTS = ("hadamard_kernel", "dqk_kernel", "dweight_kernel")  # what runs on tensor cores
BUILDS = [(target, "bfloat16", shape) for target in ("sm_80", "sm_90", "sm_100") for shape in ("swin_t stage 1", "volo_d1 stage 1")]
BUILDS += [("sm_90", "float32", "swin_t stage 1"), ("gfx942", "float16", "volo_d1 stage 1")]


@pytest.fixture(scope="module")
def reports():
    """{build: [(kernel, resources), ...]} for all BUILDS."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = lambda build: subprocess.Popen([sys.executable, "-W", "ignore", "-c", SCRIPT, *build], env=environment, text=True,
                                           cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    results = {}
    for pair in zip(BUILDS[::2], BUILDS[1::2]):
        for build, process in [(build, start(build)) for build in pair]:
            out, error = process.communicate()
            assert process.returncode == 0, f"{build}: {error[-2000:]}"
            results[build] = [json.loads(line) for line in out.splitlines()]
    return results


@pytest.mark.parametrize("build", BUILDS, ids=" ".join)
def test_compiles_without_spills(build, reports):
    assert {name for name, _ in reports[build]} == {"forward_kernel", "dv_kernel", "dlogits_kernel", "dghost_kernel", "pad_kernel", *PRODUCTS}
    assert len(reports[build]) == 4 + 2 + 2 + 2 + 3 * 3 + 3  # pad_kernel is launched three times
    for name, used in reports[build]:
        assert used["spilled"] == 0, (name, used)


@pytest.mark.parametrize("build", [build for build in BUILDS if build[0].startswith("sm_")], ids=" ".join)
def test_pixels_are_loaded_16_bytes_at_a_time(build, reports):
    """At least one 128-bit load for each pixel of a row's window: of v or of the gradient for the aggregation, of the product otherwise."""
    side = 7 if "swin" in build[2] else 5
    for name, used in reports[build]:
        least = {"pad_kernel": 2, "dghost_kernel": side + 2 * 4 - 1}.get(name, 8 if name in PRODUCTS else side + 4 - 1)
        assert used["loads"]["128-bit"] >= least, (name, used)


@pytest.mark.parametrize("build", [build for build in BUILDS if build[0].startswith("sm_") and build[1] != "float32"], ids=" ".join)
def test_the_convolution_of_the_generator_runs_on_tensor_cores(build, reports):
    for name, used in reports[build]:
        assert (used["tensor_cores"] > 0) == (name in PRODUCTS), (name, used)


@pytest.mark.parametrize("build", [build for build in BUILDS if build[0].startswith("sm_")], ids=" ".join)
def test_instructions_for_a_tap_of_a_channel(build, reports):
    """Without tensor cores, for float32, a product of 16 channels by 16 takes an instruction for every multiply-add."""
    limits = {"forward_kernel": 6, "dv_kernel": 6, "dlogits_kernel": 12, "dghost_kernel": 6, "pad_kernel": None}
    for name, used in reports[build]:
        limit = limits.get(name, 30 if build[1] == "float32" else 8)
        assert used["per_tap"] is None if limit is None else 0.5 < used["per_tap"] <= limit, (name, used)
