"""A GPU in NumPy: it runs what Triton compiled, instruction by instruction, and says what a GPU would not let pass.

    with Device(90) as device:             # from here on Triton believes in a GPU of compute capability 9.0
        kernel[grid](cpu_tensor, ..., 7)   # Triton's true launch path: binder, specialisation, compiler, cache, grid
    print(device.table())

The kernel's PTX, the last form before the assembler, runs for all threads of many programs at once, on arrays with one
lane a thread. CPU tensors are the global memory. Unlike Triton's interpreter this sees what the compiler made: layouts,
shared memory and its swizzling, asynchronous copies, ldmatrix, products of 16 bits, vector loads, predicates.

    values.py       PTX's types as NumPy arrays
    decoding.py     text -> instructions
    executing.py    threads: control flow, registers, operands
    arithmetic.py   instructions on registers
    matrices.py     instructions that exchange between threads: shuffles, ldmatrix, mma, wgmma
    moving.py       loads, stores, asynchronous copies
    memory.py       global and shared memory, and what they refuse
    counting.py     what was counted, and the table of what binds a kernel
    driver.py       Device, which Triton takes for its driver

A Fault, with the instruction and the thread, is raised for

- an access to global memory outside of every tensor that was passed, or not aligned to its width; one byte that two
  threads write; a byte that one program writes and another reads or has read;
- an access to shared memory outside of what the kernel asked for, or not aligned; a read of what nobody wrote, or of
  what another warp wrote since the last barrier; a write over what another warp read or wrote since then;
- an asynchronous copy that is read, or written over, before it was waited for;
- a product of four warps (wgmma) whose result is read, or whose matrices are written over, before it was waited for,
  or whose stored matrices no fence has shown to it;
- a barrier that not all threads of a program reach; a shuffle or product of part of a warp;
- an instruction, or a modifier of one, that is not known here.

Not modelled: time and the order of warps; denormals flushed to zero; approximations (ex2.approx and the like are
exact); the rounding inside a product of matrices (float64 here); the second rounding of float32's fma, which goes
through float64; which thread of a warp wins where several write different numbers to one place in shared memory (the
last one here); registers and their spilling, which ptxas decides; a race in global memory between threads of one
program; clusters, tensor memory, bulk copies and atomics, which are not known at all.

Needs torch, numpy and triton, and of the latter nothing that needs a GPU.
"""
from .driver import Device
from .memory import Fault

__all__ = ["Device", "Fault"]
