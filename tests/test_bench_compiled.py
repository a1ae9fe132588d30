"""Every kernel in every configuration of the tuner, compiled for GPUs that are not here: no spills, wide loads.

Compiling needs the kernels undecorated by the interpreter, so each build is done in a process of its own.
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
from eval.bench_compiled import SHAPES, launches, resources
target, dtype, shape, *only = sys.argv[1:]
shapes = SHAPES | {"heads of 256": (8, 8, 1, 256, 7, True, 64, 4)}
for kernel, arguments, constants in launches(shapes[shape], getattr(torch, dtype), target):
    if kernel.__name__ in only or not only:
        print(json.dumps([kernel.__name__, resources(kernel, arguments, constants, target)]), flush=True)
"""
AGGREGATION = ("forward_kernel", "dv_kernel", "dlogits_kernel", "dghost_kernel")
PRODUCTS = ("hadamard_kernel", "dqk_kernel", "dweight_kernel")  # what runs on tensor cores
BUILDS = [(target, "bfloat16", shape)
          for target in ("sm_80", "sm_90", "sm_100") for shape in ("swin_t stage 1", "volo_d1 stage 1")]
BUILDS += [("sm_90", "float32", "swin_t stage 1"), ("gfx942", "float16", "volo_d1 stage 1")]
USUAL = BUILDS[2], BUILDS[-1]  # one of each maker; each takes half a minute


@pytest.mark.parametrize("target,dtype,shape", [
    pytest.param(*build, marks=[] if build in USUAL else [pytest.mark.slow], id=" ".join(build))
    for build in BUILDS])
def test_build(target, dtype, shape, tmp_path):
    report = compiled(target, dtype, shape, tmp_path)
    every_kernel_is_there(report, target, dtype)
    nothing_spills(report)
    if target.startswith("sm_"):
        pixels_are_loaded_16_bytes_at_a_time(report, shape)
        instructions_for_a_tap_of_a_channel(report, dtype)
        if dtype != "float32":
            products_run_on_tensor_cores(report)


@pytest.mark.slow
@pytest.mark.parametrize("dtype,shape", [
    ("float64", "swin_t stage 1"), ("float64", "volo_d1 stage 1"), ("bfloat16", "heads of 256")])
def test_nothing_spills_where_sums_take_more_registers(dtype, shape, tmp_path):
    report = compiled("sm_90", dtype, shape, tmp_path, *AGGREGATION)
    assert {name for name, _ in report} == set(AGGREGATION)
    nothing_spills(report)


def compiled(target, dtype, shape, folder, *only):
    """[(kernel, resources), ...]; only: names of kernels, all if there are none."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)  # nothing of an earlier run
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, target, dtype, shape, *only]
    process = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def every_kernel_is_there(report, target, dtype):
    limits = 1 if target == "gfx942" else 2  # of registers, which forward_kernel is tried with
    products = 2 if dtype == "float32" else 3
    kernels = [name for name, _ in report]
    assert {name: kernels.count(name) for name in kernels} == {
        "forward_kernel": 2 * limits, "dv_kernel": 2, "dlogits_kernel": 2, "dghost_kernel": 2,
        "multiply_kernel": 1, "spread_kernel": 2, "gather_kernel": 1, **dict.fromkeys(PRODUCTS, products)}


def nothing_spills(report):
    for name, used in report:
        assert used["spilled"] == 0, (name, used)


def pixels_are_loaded_16_bytes_at_a_time(report, shape):
    """At least one 128-bit load for each pixel of a row's window, of v or of the gradient; 8 for a tile of products."""
    side = 7 if "swin" in shape else 5
    window = side + 4 - 1
    least = dict.fromkeys(PRODUCTS, 8) | dict.fromkeys(AGGREGATION, window)
    least |= {"multiply_kernel": 2, "spread_kernel": 0, "gather_kernel": 0, "dghost_kernel": window + 4}
    for name, used in report:
        assert used["loads"]["128-bit"] >= least[name], (name, used)


def products_run_on_tensor_cores(report):
    for name, used in report:
        assert (used["tensor_cores"] > 0) == (name in PRODUCTS), (name, used)


def instructions_for_a_tap_of_a_channel(report, dtype):
    """Without tensor cores, for float32, a product of 16 channels by 16 takes an instruction for every multiply-add."""
    limits = dict.fromkeys(PRODUCTS, 30 if dtype == "float32" else 8) | dict.fromkeys(AGGREGATION, 6)
    limits |= {"multiply_kernel": None, "spread_kernel": None, "gather_kernel": None}
    for name, used in report:
        limit = limits[name]
        assert used["per_tap"] is None if limit is None else 0.5 < used["per_tap"] <= limit, (name, used)
