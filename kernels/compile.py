"""Compiling the kernels for GPUs that are not there, and reading what they cost from the result.

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
KERNELS = {aggregation: ("forward_kernel", "dv_kernel", "dlogits_kernel", "dghost_kernel"),
           generator: ("hadamard_kernel", "dqk_kernel", "dweight_kernel")}
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
        generator.backward(u, q, keys, weight, 1.0, 1)
    return recorded


def resources(kernel, arguments, constants, target):
    """What one launch costs on one of TARGETS: registers a thread, bytes spilled or on the stack, bytes of shared memory, and, on
    NVIDIA, how many global loads of each width in bits, products on tensor cores and instructions the kernel has."""
    names = [parameter.name for parameter in kernel.params]
    options = {name: constants[name] for name in constants if name not in names}
    constants = {name: value for name, value in constants.items() if name in names}
    signature, attrs = {}, {}
    for i, (name, value) in enumerate(zip(names, arguments)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(value.dtype)[6:]]
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
    return _amd(compiled) if target.startswith("gfx") else _nvidia(compiled)


def _nvidia(compiled):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    loads = [opcode.split(".") for opcode in re.findall(r"\bLDG(?:STS)?\.[\w.]+", sass)]
    widths = {f"{bits}-bit": sum(bits in parts for parts in loads) for bits in ("64", "128")}
    return dict(registers=used["REG"], spilled=used["STACK"] + used["LOCAL"], shared=compiled.metadata.shared, loads=widths,
                tensor_cores=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", sass)),
                instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[^\s]", sass)))


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
        tuning.launch = lambda kernel, problem, configs, run, device: [run(**config) for config in configs if not config.get("library")]
        yield
    finally:
        aggregation.WARP_SIZE = host_warp_size
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
        tuning.launch = launch
