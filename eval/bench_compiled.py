"""Compiling the kernels for GPUs that are not there, and reading what they cost: `python run.py bench --compile-only`.

The launchers themselves are run, on CPU tensors, with the kernels replaced by recorders; so what is compiled here is
what a GPU would be given: every configuration of the tuner, with the divisibility of the true sizes and strides.
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

from kernels import aggregation, convolution, tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # bytes of a multiprocessor
KERNELS = {
    aggregation: ("forward_kernel", "dv_kernel", "dlogits_kernel", "dghost_kernel"),
    convolution: ("multiply_kernel", "spread_kernel", "hadamard_kernel", "dqk_kernel", "dweight_kernel",
                  "gather_kernel"),
}
# name: (height, width, heads, head width, kernel size, ghost_mul?, channels of q and of k, of a group)
SHAPES = {
    "swin_t stage 1": (56, 56, 3, 32, 7, False, 64, 4),
    "volo_d1 stage 1": (28, 28, 6, 32, 5, True, 128, 8),
}
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
LOADS = (128, 64, 32, 16)  # bits
COLUMNS = {  # of the table: widths
    "shape": 15, "kernel": 15, "configuration": 58, "registers": 9, "spilled": 7, "shared": 6, "occupancy": 9,
    "loads": 11, "mma": 3, "per tap": 7,
}


def launches(shape, dtype, target):
    """Every different launch (kernel, arguments, constants) of one forward and backward pass on one of TARGETS.

    Once per configuration; those that would compile to the same are one.
    """
    H, W, G, head_dim, kernel_size, multiplicative, Q, width = shape
    C = G * head_dim
    v = torch.zeros(1, H, W, C, dtype=dtype)
    logits = torch.zeros(1, G * kernel_size ** 2, H, W, dtype=dtype)
    add = torch.zeros(C, kernel_size, kernel_size)
    mul = add.clone() if multiplicative else None
    numbers = kernel_size, 1, 1, True
    projection = torch.zeros(1, H, W, 2 * Q + C, dtype=dtype)
    q, k, _ = projection.split((Q, Q, C), -1)
    weight, bias = torch.zeros(Q, width, kernel_size, kernel_size), torch.zeros(Q)
    recorded = []
    with _recording(recorded, TARGETS[target].warp_size):
        _, lse = aggregation.forward(v, logits, mul, add, *numbers)
        aggregation.backward(v, v, logits, mul, add, lse, *numbers, (True, True, multiplicative, True))
        z, slope = convolution.forward(q, k, weight, bias, 1.0, 1)
        convolution.backward(z, slope, q, k, weight, 1.0, 1)
    different = {}
    for kernel, arguments, constants in recorded:
        identity = kernel.__name__, str(_signature(kernel, arguments, constants)), str(constants)
        different.setdefault(identity, (kernel, arguments, constants))
    return list(different.values())


def main(target, dtype):
    """Prints what every kernel costs, in every configuration and for all SHAPES."""
    if target not in TARGETS:
        raise ValueError(f"--arch: got {target!r}, expected one of {', '.join(TARGETS)}")
    if dtype == "float64":
        raise ValueError("--dtype: got float64, expected float32, float16 or bfloat16")
    print(f"{target}, {dtype}, triton {triton.__version__}; occupancy: share of a multiprocessor's warps; "
          "loads: wide ones of 128, 64, 32 and 16 bits in the code; mma: products on tensor cores in the code; "
          "per tap: instructions a tap, pixel and channel")
    _print_row(COLUMNS)
    _print_row("-" * width for width in COLUMNS.values())
    for shape in SHAPES:
        for kernel, arguments, constants in launches(SHAPES[shape], getattr(torch, dtype), target):
            chosen = ("STRIP", "BLOCK_S", "BLOCK_J", "BLOCK_P", "MIRRORED", "num_warps", "num_stages", "maxnreg")
            configuration = " ".join(f"{name}={constants[name]}" for name in chosen if name in constants)
            used = resources(kernel, arguments, constants, target)
            known = lambda name, form: form.format(used[name]) if used.get(name) is not None else ""
            loads = "/".join(str(used["loads"][f"{bits}-bit"]) for bits in LOADS) if "loads" in used else ""
            _print_row((shape, kernel.__name__, configuration, used["registers"], used["spilled"], used["shared"],
                        known("occupancy", "{:.0%}"), loads, known("tensor_cores", "{}"), known("per_tap", "{:.2f}")))


def _print_row(cells):
    cells = (str(cell).ljust(width) for cell, width in zip(cells, COLUMNS.values()))
    print("| " + " | ".join(cells) + " |", flush=True)


def resources(kernel, arguments, constants, target):
    """What one launch costs on one of TARGETS.

    registers a thread; bytes spilled or on the stack; bytes of shared memory; and, on NVIDIA: occupancy, the share of a
    multiprocessor's warps that fit at a time; loads, how many global ones of each width in bits the kernel has;
    tensor_cores, how many products; per_tap, the instructions that a thread executes for each tap of each pixel and
    channel, everything counted (dghost_kernel and dweight_kernel: those of their loop).
    """
    names = [parameter.name for parameter in kernel.params]
    signature, attrs, constexprs = _signature(kernel, arguments, constants)
    source = ASTSource(fn=kernel, signature=signature, attrs=attrs,
                       constexprs={(names.index(name),): value for name, value in constexprs.items()})
    options = {name: value for name, value in constants.items() if name not in names}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        return _amd(compiled)
    return _nvidia(compiled, target, kernel.__name__, constexprs)


def _signature(kernel, arguments, constants):
    """What Triton's launcher makes of the arguments: types, divisibility by 16 and compile-time constants."""
    names = [parameter.name for parameter in kernel.params]
    constexprs = {name: value for name, value in constants.items() if name in names}
    signature, attrs = {}, {}
    for index, (name, value) in enumerate(zip(names, arguments)):
        if isinstance(value, torch.Tensor):
            signature[name], divisible = POINTERS[value.dtype], True
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        elif value == 1:  # the launcher compiles strides of one in
            constexprs[name], divisible = 1, False
        else:
            signature[name], divisible = "i32", value % 16 == 0
        if divisible:
            attrs[(index,)] = [["tt.divisibility", 16]]
    signature |= {name: "constexpr" for name in constexprs}
    return {name: signature[name] for name in names}, attrs, constexprs


def _nvidia(compiled, target, name, constants):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [tool, "--dump-resource-usage", "-sass", cubin]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", listing)}
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", listing)
    loads = [opcode.split(".") for opcode in re.findall(r"\bLDG(?:STS)?\.[\w.]+", listing)]
    marks = ("U8", "U16", "S16", "64", "128")  # none: 32
    bits = [next((part.strip("US") for part in parts if part in marks), "32") for parts in loads]
    products = [bool(re.search(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", instruction)) for _, instruction in code]
    warps = compiled.metadata.num_warps
    return dict(registers=used["REG"], spilled=used["STACK"] + used["LOCAL"], shared=compiled.metadata.shared,
                occupancy=_occupancy(used["REG"], used["SHARED"] + compiled.metadata.shared, warps, target),
                loads={f"{width}-bit": bits.count(str(width)) for width in LOADS},
                tensor_cores=sum(products), per_tap=_per_tap(code, name, constants, warps * 32))


def _per_tap(code, name, constants, threads):
    """Instructions that all threads of a program execute, over the taps, pixels and channels that it computes."""
    if name in ("multiply_kernel", "spread_kernel", "gather_kernel"):
        return None  # they have no taps
    loops = []
    for address, instruction in code:
        if re.match("EXIT", instruction):  # behind it wait those that found a barrier closed
            break
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if jump and 256 <= int(address, 16) - int(jump[1], 16):  # others, of under 16 instructions, wait for a barrier
            loops.append((int(jump[1], 16), int(address, 16)))
    depths = [sum(first <= int(address, 16) <= last for first, last in loops) for address, _ in code]
    kernel_size = constants["KERNEL_SIZE"]
    if "BLOCK_S" in constants:
        elements = constants["BLOCK_S"] * constants["STRIP"] * constants["HEAD_DIM"]
    else:
        elements = constants["BLOCK_P"] * constants.get("PATCH_H", 1) * constants["PATCH_W"] * constants["BLOCK_C"]
    if name in ("dghost_kernel", "dweight_kernel"):  # loops over pixels: one turn, for some taps
        taps = min(constants["BLOCK_J"], kernel_size) * min(constants.get("BLOCK_I", 1), kernel_size)
        return threads * sum(depth > 0 for depth in depths) / (elements * taps)
    rows = constants.get("PATCH_H", 1) - 1 + kernel_size  # all loops are over those that a pixel or a patch reads
    return threads * sum(rows ** depth for depth in depths) / (elements * kernel_size ** 2)


def _occupancy(registers, shared, warps, target):
    """CUDA's rules: registers are given out by 8 a thread, 64 K of them, 64 warps and 32 blocks a multiprocessor."""
    per_block = shared + 1024
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    blocks = min(32, 64 // warps, by_registers, SHARED_MEMORY[target] // per_block)
    return blocks * warps / 64


def _amd(compiled):
    read = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"]).group(1))
    spilled = read("vgpr_spill_count") + read("sgpr_spill_count")
    return dict(registers=read("vgpr_count"), spilled=spilled, shared=compiled.metadata.shared)


@contextlib.contextmanager
def _recording(recorded, warp_size):
    """In this block a launch is noted down instead of done, and the tuner tries every configuration."""
    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **constants: recorded.append((self.kernel, arguments, constants))

    kernels = [(module, name, getattr(module, name)) for module, names in KERNELS.items() for name in names]
    launch, host_warp_size = tuning.launch, tuning.WARP_SIZE
    try:
        tuning.WARP_SIZE = warp_size
        for module, name, kernel in kernels:
            setattr(module, name, Recorder(kernel))
        tuning.launch = lambda kernel, problem, configs, run, device: [run(**config) for config in configs]
        yield
    finally:
        tuning.WARP_SIZE = host_warp_size
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
        tuning.launch = launch
