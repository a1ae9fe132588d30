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
GENERATOR = ("hadamard_kernel", "dqk_kernel", "dweight_kernel")
BUILDS = [(target, "bfloat16", shape) for target in ("sm_80", "sm_90", "sm_100", "gfx942") for shape in ("swin_t stage 1", "volo_d1 stage 1")]
BUILDS += [("sm_90", "float32", "swin_t stage 1"), ("sm_80", "float16", "volo_d1 stage 1")]


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
    assert {name for name, _ in reports[build]} == {"forward_kernel", "dv_kernel", "dlogits_kernel", "dghost_kernel", *GENERATOR}
    assert len(reports[build]) == 20  # three configurations each, two of dqk_kernel
    for name, used in reports[build]:
        assert used["spilled"] == 0, (name, used)


@pytest.mark.parametrize("build", [build for build in BUILDS if build[0].startswith("sm_")], ids=" ".join)
def test_v_is_loaded_16_bytes_at_a_time(build, reports):
    """In the kernels that walk the taps in a loop there is at least one 128-bit load a tap of an unrolled row."""
    taps = 7 if "swin" in build[2] else 5
    for name, used in reports[build]:
        if name not in ("dghost_kernel", *GENERATOR):
            assert used["loads"]["128-bit"] >= taps, (name, used)


@pytest.mark.parametrize("build", [build for build in BUILDS if build[0].startswith("sm_") and build[1] != "float32"], ids=" ".join)
def test_the_convolution_of_the_generator_runs_on_tensor_cores(build, reports):
    for name, used in reports[build]:
        if name in GENERATOR:
            assert used["tensor_cores"] > 0 and used["loads"]["128-bit"] > 0, (name, used)
