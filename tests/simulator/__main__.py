"""python -m tests.simulator: what binds each kernel of ELSA's layers, counted on the simulated GPU.

The operators run forward and backward as a training step calls them. Of each launch some programs are run, and what
they count stands for all. Nothing is measured: cycles are how long a part of a multiprocessor is busy, and the time of
an H100 is an estimate that follows from them.
"""
import argparse
import math
import os
from unittest import mock

import torch

from kernels import elsa_attention, hadamard

from . import Device
from .counting import parts

# name: (height, width, heads of 32, kernel size, ghost_mul?, channels of q and of k, of a group of the convolution)
LAYERS = {
    "swin_t stage 1": (56, 56, 3, 7, False, 64, 4), "swin_t stage 2": (28, 28, 6, 7, False, 128, 4),
    "swin_t stage 3": (14, 14, 12, 7, False, 256, 4), "volo_d1 stage 1": (28, 28, 6, 5, True, 128, 8),
    "28 x 28": (28, 28, 3, 7, False, 64, 4), "14 x 14": (14, 14, 3, 7, False, 64, 4),
}
HEAD_DIM = 32
H100 = dict(multiprocessors=132, hertz=1.7e9, bytes_per_second=3.35e12)


def layer(name, batch, dtype):
    """One forward and backward pass of both operators."""
    H, W, heads, kernel_size, multiplicative, Q, width = LAYERS[name]
    C = heads * HEAD_DIM
    projection = torch.randn(batch, H, W, 2 * Q + C, dtype=dtype, requires_grad=True)
    q, k, v = projection.split((Q, Q, C), -1)
    logits = torch.randn(batch, heads * kernel_size ** 2, H, W, dtype=dtype, requires_grad=True)
    filters = [torch.randn(C, kernel_size, kernel_size, requires_grad=True) for _ in range(2)]
    mul = filters[0] if multiplicative else None
    weight, bias = torch.randn(Q, width, kernel_size, kernel_size, requires_grad=True), torch.randn(Q)
    z = hadamard(q, k, weight, bias.requires_grad_())
    out = elsa_attention(v, logits, mul, filters[1], kernel_size=kernel_size)
    torch.autograd.backward([z, out], [torch.randn_like(z), torch.randn_like(out)])


def bound(launch):
    """Cycles that the busiest of a multiprocessor's parts takes: instructions, special functions, path to memory."""
    cycles = parts(launch)
    return max(cycles["issue"], cycles["special"], cycles["l1"] + cycles["shared"] + cycles["shuffle"])


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--arch", choices=("sm_80", "sm_90"), default="sm_90")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="LAYER")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--programs", type=int, default=24, help="of each launch that are run")
    args = parser.parse_args()
    os.environ["ELSA_BACKEND"] = "triton"
    print(f"{args.arch}, {args.dtype}, batch {args.batch}, {args.programs} programs of each launch. Cycles of one "
          "multiprocessor and bytes, for a pixel of the map; counted on a simulated GPU, not measured.")
    for name in args.layers:
        # Zeros stand for what the programs that are not run would have written: no chance numbers, or NaN, of before.
        zeros = mock.patch.multiple(torch, empty=torch.zeros, empty_like=torch.zeros_like)
        with zeros, Device(int(args.arch[3:]), programs=args.programs) as device:
            layer(name, args.batch, getattr(torch, args.dtype))
        pixels = args.batch * LAYERS[name][0] * LAYERS[name][1]
        share = lambda launch: launch["programs"] / math.prod(launch["grid"])
        units = lambda launch: pixels * share(launch)
        print(f"\n{name}\n{device.table(units)}")
        busy = [bound(launch) / units(launch) for launch in device.launches]
        seconds = sum(max(cycles * pixels / (H100["multiprocessors"] * H100["hertz"]),
                          (launch["read_all"] + launch["written"]) / share(launch) / H100["bytes_per_second"])
                      for cycles, launch in zip(busy, device.launches))
        estimate = f"; {seconds / pixels * 1e9:.2f} ns a pixel on an H100 (an estimate)" if args.arch == "sm_90" else ""
        print(f"{sum(busy):.0f} cycles a pixel, the largest of issue, special and memory path of each of {len(busy)} "
              f"launches{estimate}")


if __name__ == "__main__":
    main()
