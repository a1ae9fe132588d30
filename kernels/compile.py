"""Compiling the kernels for GPUs that are not there, and reading what they cost from the result: `python run.py bench --compile-only`.

The launchers themselves are run, on CPU tensors, with the kernels replaced by recorders; so what is compiled here is what
a GPU would be given: every configuration of the tuner, with the divisibility of the true sizes and strides.
"""
import contextlib
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import aggregation, generator, tuning

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # bytes of a multiprocessor
KERNELS = {aggregation: ("forward_kernel", "dv_kernel", "dlogits_kernel", "dghost_kernel"),
           generator: ("pad_kernel", "hadamard_kernel", "dqk_kernel", "dweight_kernel")}
# name: (height, width, heads, head width, kernel size, ghost_mul?, channels of q and of k, of a group)
SHAPES = {"swin_t stage 1": (56, 56, 3, 32, 7, False, 64, 4), "volo_d1 stage 1": (28, 28, 6, 32, 5, True, 128, 8)}


def launches(shape, dtype, target):
    """Every (kernel, arguments, constants) that one forward and backward pass would launch on one of TARGETS, once per configuration."""
    H, W, G, D, k, multiplicative, Q, width = shape
    v = torch.zeros(1, H, W, G * D, dtype=dtype)
    logits = torch.zeros(1, G * k * k, H, W, dtype=dtype)
    add = torch.zeros(G * D, k, k)
    arguments = (v, logits, add.clone() if multiplicative else None, add, k, 1, 1, True)
    recorded = []
    with _recording(recorded, TARGETS[target].warp_size):
        _, lse = aggregation.forward(*arguments)
        aggregation.backward(v, *arguments[:4], lse, *arguments[4:], (True, True, multiplicative, True))
        q, keys, _ = torch.zeros(1, H, W, 2 * Q + G * D, dtype=dtype).split((Q, Q, G * D), -1)  # slices of one projection
        weight, bias = torch.zeros(Q, width, k, k), torch.zeros(Q)
        _, u = generator.forward(q, keys, weight, bias, 1.0, 1)
        generator.backward(u, u, q, keys, weight, 1.0, 1)
    return recorded


def main(target, dtype):
    """Prints what every kernel costs, in every configuration and for all SHAPES."""
    if target not in TARGETS:
        raise ValueError(f"--arch: got {target!r}, expected one of {', '.join(TARGETS)}")
    if dtype == "float64":
        raise ValueError("--dtype: got float64, expected float32, float16 or bfloat16")
    print(f"{target}, {dtype}, triton {triton.__version__}; occupancy: share of a multiprocessor's warps; loads: wide ones of 128, 64, 32 and 16 bits "
          "in the code; mma: products on tensor cores in the code; per tap: instructions a tap, pixel and channel")
    columns = ("shape", "kernel", "configuration", "registers", "spilled", "shared", "occupancy", "loads", "mma", "per tap")
    widths = (15, 15, 45, 9, 7, 6, 9, 11, 3, 7)
    show = lambda cells: print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths)) + " |", flush=True)
    show(columns)
    show("-" * width for width in widths)
    for shape in SHAPES:
        seen = set()
        for kernel, arguments, constants in launches(SHAPES[shape], getattr(torch, dtype), target):
            options = {name: value for name, value in constants.items() if name in ("P", "BP", "BJ", "GELU", "num_warps", "num_stages", "maxnreg")}
            configuration = " ".join(f"{name}={value}" for name, value in options.items())
            if (kernel.__name__, configuration) in seen:
                continue
            seen.add((kernel.__name__, configuration))
            used = resources(kernel, arguments, constants, target)
            known = lambda name, form: form.format(used[name]) if used.get(name) is not None else ""
            loads = "/".join(str(used["loads"][f"{bits}-bit"]) for bits in (128, 64, 32, 16)) if "loads" in used else ""
            show((shape, kernel.__name__, configuration, used["registers"], used["spilled"], used["shared"], known("occupancy", "{:.0%}"), loads,
                  known("tensor_cores", "{}"), known("per_tap", "{:.2f}")))


def resources(kernel, arguments, constants, target):
    """What one launch costs on one of TARGETS: registers a thread, bytes spilled or on the stack, bytes of shared memory, and, on NVIDIA,
    the share of a multiprocessor's warps that fit at a time (occupancy), how many global loads of each width in bits and products on tensor
    cores the kernel has, and the instructions that a thread executes for each tap of each pixel and channel, everything counted
    (dghost_kernel and dweight_kernel: those of their loop)."""
    names = [parameter.name for parameter in kernel.params]
    options = {name: constants[name] for name in constants if name not in names}
    constants = {name: value for name, value in constants.items() if name in names}
    signature, attrs = {}, {}
    for i, (name, value) in enumerate(zip(names, arguments)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(value.dtype)[6:]]
            divisible = True
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        elif value == 1:  # the launcher compiles strides of one in
            constants[name], divisible = 1, False
        else:
            signature[name], divisible = "i32", value % 16 == 0
        if divisible:
            attrs[(i,)] = [["tt.divisibility", 16]]
    signature |= {name: "constexpr" for name in constants}
    compiled = triton.compile(ASTSource(fn=kernel, signature={name: signature[name] for name in names}, attrs=attrs,
                                        constexprs={(names.index(name),): value for name, value in constants.items()}),
                              target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        return _amd(compiled)
    return _nvidia(compiled, target, kernel.__name__, constants)


def _nvidia(compiled, target, name, constants):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)
    loads = [opcode.split(".") for opcode in re.findall(r"\bLDG(?:STS)?\.[\w.]+", sass)]
    bits = [next((part.strip("US") for part in parts if part in ("U8", "U16", "S16", "64", "128")), "32") for parts in loads]
    warps = compiled.metadata.num_warps
    return dict(registers=used["REG"], spilled=used["STACK"] + used["LOCAL"], shared=compiled.metadata.shared,
                occupancy=_occupancy(used["REG"], used["SHARED"] + compiled.metadata.shared, warps, target),
                loads={f"{width}-bit": bits.count(width) for width in ("16", "32", "64", "128")},
                tensor_cores=sum(bool(re.search(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", instruction)) for _, instruction in code),
                per_tap=_per_tap(code, name, constants, warps * 32))


def _per_tap(code, name, constants, threads):
    """Instructions that all threads of a program execute, over the taps times pixels times channels that it computes."""
    loops = []
    for address, instruction in code:
        if re.match("EXIT", instruction):  # behind it wait those that found a barrier closed
            break
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if jump and 256 <= int(address, 16) - int(jump[1], 16):  # others, of under 16 instructions, wait for a barrier
            loops.append((int(jump[1], 16), int(address, 16)))
    depths = [sum(first <= int(address, 16) <= last for first, last in loops) for address, _ in code]
    if "k" not in constants:
        return None  # pad_kernel has no taps
    k = constants["k"]
    elements = constants["BP"] * (constants["P"] * constants["D"] if "P" in constants else constants["R"])
    if name in ("dghost_kernel", "dweight_kernel"):  # loops over pixels: one turn, for some taps
        return threads * sum(depth > 0 for depth in depths) / (elements * constants.get("BJ", k))
    return threads * sum(k ** depth for depth in depths) / (elements * k * k)  # all loops are over the rows of the neighbourhood


def _occupancy(registers, shared, warps, target):
    """CUDA's rules: registers are given out by 8 a thread, 64 K of them, 64 warps and 32 blocks a multiprocessor."""
    per_block = shared + 1024
    blocks = min(32, 64 // warps, 65536 // (-(-registers // 8) * 8 * 32 * warps), SHARED_MEMORY[target] // per_block)
    return blocks * warps / 64


def _amd(compiled):
    read = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"]).group(1))
    return dict(registers=read("vgpr_count"), spilled=read("vgpr_spill_count") + read("sgpr_spill_count"),
                shared=compiled.metadata.shared)


@contextlib.contextmanager
def _recording(recorded, warp_size):
    """In this block a launch is noted down instead of done, and the tuner tries every configuration."""
    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **constants: recorded.append((self.kernel, arguments, constants))

    kernels = [(module, name, getattr(module, name)) for module, names in KERNELS.items() for name in names]
    launch, host_warp_size = tuning.launch, aggregation.WARP_SIZE
    try:
        aggregation.WARP_SIZE = warp_size
        for module, name, kernel in kernels:
            setattr(module, name, Recorder(kernel))
        tuning.launch = lambda kernel, problem, configs, run, device: [run(**config) for config in configs]
        yield
    finally:
        aggregation.WARP_SIZE = host_warp_size
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
        tuning.launch = launch
