"""Launching ELSA's aggregation kernels: what they are given, in which layout, and what the tuner may choose from."""
import torch
import triton
import triton.language as tl

from . import tuning
from .aggregation_kernels import dghost_kernel, dlogits_kernel, dv_kernel, forward_kernel

GROUP_SIZE = 4096  # pixels of several small samples that programs share
SPLIT_SIZE = 512  # strips that one program of dghost_kernel sums
INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were decorated
MAX_TAPS = 64  # of a pixel, a row padded: as many sums of dlogits_kernel as a thread can hold
MAX_BLOCK_J = 7  # taps of a row: sums for eight channels of each of seven are what a thread can hold


def forward(v, logits, mul, add, kernel_size, dilation, stride, normalize):
    """out (B, Ho, Wo, C) and lse (B, G, 2, Ho, Wo), see forward_kernel, empty where no softmax is taken.

    v (B, H, W, C); logits (B, G*K, Ho, Wo) or None; mul, add (C, kernel_size, kernel_size), per sample with a B before,
    or None. They are ready to be used: lam and gamma are already in them.
    """
    args = _LaunchArguments(v, logits, mul, add, kernel_size, dilation, stride, normalize)
    out = torch.empty(args.B, args.Ho, args.Wo, args.C, dtype=v.dtype, device=v.device)
    lse = args.nothing
    if args.flags["NORMALIZE"]:
        lse = torch.empty(args.B, args.G, 2, args.Ho, args.Wo, dtype=args.accumulator, device=v.device)

    def launch(**config):
        forward_kernel[args.grid(args.Ho, args.Wo, config)](
            args.v, args.logits, args.mul, args.add, out, lse,
            *args.sizes, kernel_size, *args.v_strides, *args.logits_strides, args.mul_stride, args.add_stride,
            **args.constants, **args.flags, **config)

    tuning.launch(forward_kernel, args.key, args.candidates(args.Ho, args.Wo, None, 255), launch, v.device)
    return out, lse


def backward(grad_out, v, logits, mul, add, lse, kernel_size, dilation, stride, normalize, needs):
    """(dv, dlogits, dmul, dadd), None where `needs`, four booleans, says so.

    dv, dmul and dadd are contiguous, dlogits is laid out as torch.empty_like(logits); each has the dtype of what it is
    the gradient of.
    """
    args = _LaunchArguments(v, logits, mul, add, kernel_size, dilation, stride, normalize)
    go = grad_out.contiguous()
    dv = _dv(args, go, lse) if needs[0] else None
    dlogits = _dlogits(args, go, lse, logits) if needs[1] else None
    dmul, dadd = _dghost(args, go, lse, mul, add, needs[2:]) if needs[2] or needs[3] else (None, None)
    return dv, dlogits, dmul, dadd


def _dv(args, go, lse):
    dv = torch.empty(args.B, args.H, args.W, args.C, dtype=args.v.dtype, device=go.device)

    def launch(**config):
        dv_kernel[args.grid(args.H, args.W, config)](
            go, args.logits, args.mul, args.add, lse, dv,
            *args.sizes, args.kernel_size, *args.logits_strides, args.mul_stride, args.add_stride,
            **args.constants, **args.flags, **config)

    limit = 255 if go.dtype == torch.float32 else None  # left to itself, the compiler spills a few bytes of float32
    tuning.launch(dv_kernel, args.key, args.candidates(args.H, args.W, limit), launch, go.device)
    return dv


def _dlogits(args, go, lse, logits):
    result = torch.empty_like(logits)
    dlogits = result if _pixel_strides(result) else torch.empty(logits.shape, dtype=logits.dtype, device=go.device)
    strides = _pixel_strides(dlogits)
    flags = {name: args.flags[name] for name in ("NORMALIZE", "MUL", "ACC", "PAIRS")}
    BLOCK_T = triton.next_power_of_2(args.kernel_size)

    def launch(**config):
        dlogits_kernel[args.grid(args.Ho, args.Wo, config)](
            args.v, go, args.logits, args.mul, lse, dlogits,
            *args.sizes, args.kernel_size, *args.v_strides, *args.logits_strides, *strides, args.mul_stride,
            **args.constants, **flags, BLOCK_T=BLOCK_T, ALL=args.kernel_size * BLOCK_T <= MAX_TAPS, **config)

    tuning.launch(dlogits_kernel, args.key, args.candidates(args.Ho, args.Wo, 255), launch, go.device)
    return result if dlogits is result else result.copy_(dlogits)


def _dghost(args, go, lse, mul, add, needs):
    kernel_size = args.kernel_size
    strips = args.strips(args.Ho, args.Wo)
    num_splits = triton.cdiv(strips, SPLIT_SIZE)
    split_size = triton.cdiv(strips, num_splits)
    groups = triton.cdiv(args.B, args.num_samples)
    BLOCK_J = triton.cdiv(kernel_size, triton.cdiv(kernel_size, MAX_BLOCK_J))
    blocks_per_row = triton.cdiv(kernel_size, BLOCK_J)
    shape = groups, num_splits, kernel_size, blocks_per_row * BLOCK_J, args.C
    parts = [torch.empty(shape, dtype=args.accumulator, device=go.device) if need else args.nothing for need in needs]
    flags = dict(args.flags, MUL=needs[0], ADD=needs[1])

    def launch(**config):
        dghost_kernel[(groups * num_splits * kernel_size * blocks_per_row, args.G)](
            args.v, go, args.logits, lse, *parts,
            *args.sizes, split_size, num_splits, *args.v_strides, *args.logits_strides,
            **args.constants, **flags, BLOCK_J=BLOCK_J, **config)

    configs = tuning.for_sums_over_pixels(args.candidates(args.Ho, args.Wo, 255))
    tuning.launch(dghost_kernel, dict(args.key, dmul=needs[0], dadd=needs[1]), configs, launch, go.device)
    grads = []
    for need, part, ghost in zip(needs, parts, (mul, add)):
        if need:
            # (groups, num_splits, kernel_size, kernel_size.., C) -> (C, kernel_size, kernel_size), before it the groups
            # where each is a sample with a filter of its own; in one launch, in the memory of the result
            part = part[:, :, :, :kernel_size].movedim(-1, 2)
            grad = torch.empty(ghost.shape, dtype=part.dtype, device=go.device)
            grads.append(torch.sum(part, (0, 1) if ghost.ndim == 3 else 1, out=grad).to(ghost.dtype))
        else:
            grads.append(None)
    return grads


def candidates(per_thread, BLOCK_D, strips, *limits):
    """Of the tuner; the first is taken where nothing can be measured: the larger tile, unless it leaves more idle.

    per_thread: channels of one strip that a thread has. strips: of a group of samples. limits: of registers a thread,
    see :func:`kernels.tuning.registers`.
    """
    tiles = [(max(1, size // BLOCK_D), size // per_thread // tuning.WARP_SIZE) for size in (1024, 512)]
    tiles.sort(key=lambda tile: 16 * triton.cdiv(strips, tile[0]) * tile[0] // strips)  # to a sixteenth
    return [dict(BLOCK_S=BLOCK_S, num_warps=num_warps, **tuning.registers(limit))
            for BLOCK_S, num_warps in tiles for limit in limits]


class _LaunchArguments:
    """What every launch needs: sizes, strides, tensors in the layout that the kernels read, compile-time constants."""

    def __init__(self, v, logits, mul, add, kernel_size, dilation, stride, normalize):
        self.B, self.H, self.W, self.C = v.shape
        self.kernel_size = kernel_size
        self.Ho, self.Wo = self.H // stride, self.W // stride
        self.G = 1 if logits is None else logits.shape[1] // kernel_size ** 2
        double = v.dtype == torch.float64
        self.accumulator = torch.float64 if double else torch.float32
        self.nothing = torch.empty(0, dtype=self.accumulator, device=v.device)
        self.v = v if v.stride(-1) == 1 else v.contiguous()
        self.v_strides = self.v.stride()[:3]
        self.logits, self.logits_strides = self.nothing, (0, 0, 0)
        if logits is not None:
            self.logits = logits if _pixel_strides(logits) else logits.contiguous()
            self.logits_strides = _pixel_strides(self.logits)
        self.mul, self.mul_stride = self._taps_first(mul)
        self.add, self.add_stride = self._taps_first(add)
        head_dim = self.C // self.G
        self.constants = dict(
            # From max(H, W) on every tap beside the centre is outside; its distance has to fit into 32 bits.
            KERNEL_SIZE=kernel_size, DILATION=min(dilation, max(self.H, self.W)), STRIDE=stride,
            HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
            # Neighbours share pixels only when both are 1; and no strip is longer than a row.
            STRIP=4 if dilation == stride == 1 and not double and self.W >= 4 else 1,
            enable_fp_fusion=True)  # without it, the default from Triton 3.10 on, a multiply-add is two instructions
        # Small samples share programs, unless each has filters of its own.
        static = all(ghost is None or ghost.ndim == 3 for ghost in (mul, add))
        self.num_samples = min(self.B, max(1, GROUP_SIZE // (self.Ho * self.Wo))) if static else 1
        self.sizes = (self.B, self.num_samples, self.H, self.W, self.Ho, self.Wo, self.G)
        self.flags = dict(
            ATTENTION=logits is not None, NORMALIZE=normalize and logits is not None,
            MUL=mul is not None, ADD=add is not None,
            ACC=tl.float64 if double else tl.float32,
            PAIRS=v.dtype == torch.bfloat16 and tuning.WARP_SIZE == 32 and not INTERPRETED)
        self.key = dict(
            dtype=str(v.dtype)[6:], k=kernel_size, dilation=dilation, stride=stride, heads=self.G, width=head_dim,
            batch=triton.next_power_of_2(self.B), pixels=triton.next_power_of_2(max(1, self.Ho * self.Wo)),
            mul=mul is not None, add=add is not None, attn=logits is not None, normalize=self.flags["NORMALIZE"],
            channels_first=self.logits_strides[2] == 1)

    def strips(self, H, W):
        """Of a group of samples."""
        return self.num_samples * H * triton.cdiv(W, self.constants["STRIP"])

    def candidates(self, H, W, *limits):
        # Eight channels are one 16-byte load of 16-bit values; as many sums of float64 would not fit into registers.
        per_thread = 4 if self.accumulator == torch.float64 else 8
        return candidates(per_thread, self.constants["BLOCK_D"], self.strips(H, W), *limits)

    def grid(self, H, W, config):
        return triton.cdiv(self.B, self.num_samples) * triton.cdiv(self.strips(H, W), config["BLOCK_S"]), self.G

    def _taps_first(self, ghost):
        """(..., C, kernel_size, kernel_size) -> (..., K, C), and the stride from sample to sample.

        So the channels that neighbouring threads hold lie side by side.
        """
        if ghost is None:
            return self.nothing, 0
        ghost = ghost.flatten(-2).transpose(-1, -2).contiguous().to(self.accumulator)
        return ghost, 0 if ghost.ndim == 2 else ghost.stride(0)


def _pixel_strides(logits):
    """(sample, channel, pixel) strides if rows follow each other at the pixel stride, as in NCHW and NHWC memory."""
    s_b, s_c, s_y, s_x = logits.stride()
    Ho, Wo = logits.shape[2:]
    s_p = s_x if Wo > 1 else s_y
    return (s_b, s_c, s_p) if Ho <= 1 or Wo <= 1 or s_y == Wo * s_x else None
