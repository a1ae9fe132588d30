"""Small kernels in PTX for the simulated GPU, written by hand."""
import numpy as np
import torch

from simulator import executing
from simulator.decoding import Program

REGISTER = {1: "%p", 2: "%rs", 4: "%r", 8: "%rd"}  # by bytes
START = "mov.u32 %r0, %tid.x; "


def run(body, *arrays, threads=32, shared=0, grid=(1, 1, 1)):
    """Runs a kernel on NumPy arrays, whose addresses it finds in %rd90, %rd91, ..., and its thread's number in %r0."""
    parameters = ", ".join(f".param .u64 k_param_{n}" for n in range(len(arrays)))
    loads = "".join(f"ld.param.b64 %rd{90 + n}, [k_param_{n}];\n" for n in range(len(arrays)))
    program = Program(f".visible .entry k({parameters})\n{{\n{loads}{START}\n{body}\nret;\n}}\n")
    tensors = [torch.from_numpy(array) for array in arrays]
    return executing.launch(program, grid, threads, shared, [x.data_ptr() for x in tensors], tensors)


def place(n, width, register="%rd99"):
    """Text that puts the address of the thread's element of array n, of so many bytes, into a register."""
    return f"mad.wide.u32 {register}, %r0, {width}, %rd{90 + n};"


def each(text, *inputs, result):
    """What an instruction gives for every element of the inputs, arrays of equal length, one thread each.

    text: with {0}, {1}, ... for the inputs' registers and {d} for the result's. result: its dtype.
    """
    count, threads = len(inputs[0]), -(-len(inputs[0]) // 32) * 32
    padded = [np.ascontiguousarray(np.resize(x, threads)) for x in inputs]
    out = np.zeros(threads, result)
    names, lines = [], []
    for n, x in enumerate(padded):
        width = x.dtype.itemsize
        names.append(f"{REGISTER[width]}{10 + n}")
        lines += [place(n, width), f"ld.global.b{8 * width} {names[-1]}, [%rd99];"]
    width = out.dtype.itemsize
    target = f"{REGISTER[width]}20"
    lines += [f"mov.b{8 * width} {target}, 0;", text.format(*names, d=target)]
    lines += [place(len(inputs), width), f"st.global.b{8 * width} [%rd99], {target};"]
    run("\n".join(lines), *padded, out, threads=threads)
    return out[:count]
