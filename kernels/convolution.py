"""Launching Hadamard attention's kernels: which pixels and channels make a product, and what the tuner may choose."""
import torch
import triton

from . import tuning
from .convolution_kernels import (
    dqk_kernel,
    dweight_kernel,
    gather_kernel,
    hadamard_kernel,
    multiply_kernel,
    spread_kernel,
)

MIN_BLOCK_C = 8  # channels: what one side of a matrix unit's product has at least
MAX_COLUMNS = 128  # of a tile, neighbours times channels: it has to fit into shared memory
MAX_OUTPUTS = 64  # columns of a product, pixels of a patch times channels, unless a block is wider
MAX_PATCH_H = 4  # rows of a patch: with more, too much of a product is zeros
MAX_BLOCK_P = 128  # patches of a product
THREADS = 256
SPLIT_SIZE = 1024  # patches that a program of dweight_kernel sums at least, to be worth a tile of sums
MAX_PROGRAMS = 512  # of dweight_kernel, which keep any GPU busy
INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were decorated


def forward(q, k, weight, bias, scale, dilation):
    """z, slope (B, H, W, Q), GELU and its derivative.

    q, k (B, H, W, Q), their channels side by side; weight (Q, width, kernel_size, kernel_size); bias (Q,).
    """
    geometry = _Geometry(q, weight, dilation)
    z, slope = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    h, matrices, bias = geometry.product(q, k), geometry.matrices(weight, MIRRORED=False), bias.contiguous()

    def launch(**config):
        hadamard_kernel[geometry.grid(config)](
            h, matrices, bias, z, slope, *geometry.sizes, scale, **geometry.patches, **config)

    tuning.launch(hadamard_kernel, geometry.key, candidates(geometry), launch, q.device)
    return z, slope


def backward(dz, slope, q, k, weight, scale, dilation):
    """dq, dk (B, H, W, Q), dweight (Q, width, kernel_size, kernel_size) and dbias (Q,), both float32.

    dz (B, H, W, Q), its channels side by side.
    """
    geometry = _Geometry(q, weight, dilation)
    du, h = geometry.product(dz, slope), geometry.product(q, k)
    dq, dk = _dqk(geometry, du, q, k, weight, scale)
    dweight = _dweight(geometry, du, h, weight, scale)
    dbias = du.sum(1, dtype=torch.float32)[:, :geometry.channels].flatten()[:geometry.Q]
    return dq, dk, dweight, dbias


def _dqk(geometry, du, q, k, weight, scale):
    dq, dk = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    matrices = geometry.matrices(weight, MIRRORED=True)

    def launch(**config):
        dqk_kernel[geometry.grid(config)](
            du, matrices, q, k, dq, dk, *geometry.sizes, *q.stride()[:3], *k.stride()[:3], scale,
            **geometry.patches, **config)

    tuning.launch(dqk_kernel, geometry.key, candidates(geometry), launch, q.device)
    return dq, dk


def _dweight(geometry, du, h, weight, scale):
    num_patches = geometry.num_patches(PATCH_H=1)
    num_tiles = geometry.num_blocks * triton.cdiv(geometry.kernel_size, geometry.BLOCK_I) * geometry.CHUNKS
    most = max(1, MAX_PROGRAMS // num_tiles)
    split_size = max(SPLIT_SIZE, triton.cdiv(num_patches, most * MAX_BLOCK_P) * MAX_BLOCK_P)
    num_splits = triton.cdiv(num_patches, split_size)
    tile = geometry.BLOCK_J * geometry.BLOCK_C, geometry.BLOCK_I * geometry.PATCH_W * geometry.BLOCK_C
    parts = torch.empty(num_splits, num_tiles, *tile, dtype=torch.float32, device=du.device)

    def launch(**config):
        dweight_kernel[(num_splits * num_tiles,)](
            du, h, parts, *geometry.image, geometry.num_blocks, split_size, num_patches,
            DILATION=geometry.dilation, **geometry.sums, **config)

    configs = tuning.for_sums_over_pixels(candidates(geometry))
    tuning.launch(dweight_kernel, geometry.key, configs, launch, du.device)
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=du.device)
    BLOCK_E, BLOCK_S = 256, min(16, triton.next_power_of_2(num_splits))
    gather_kernel[(triton.cdiv(dweight.numel(), BLOCK_E),)](
        parts, dweight, dweight.numel(), parts.stride(0), num_splits, scale,
        BLOCK_E=BLOCK_E, BLOCK_S=BLOCK_S, WIDTH=geometry.width, CHANNELS=geometry.channels, num_warps=8,
        **geometry.sums)
    return dweight


def candidates(geometry):
    """Of the tuner, for every kernel with products; the first is taken where nothing can be measured.

    With the most registers that spill nothing.
    """
    shapes, limit = ((128, 2), (64, 3), (64, 2)), 128  # patches and stages; registers
    if geometry.dtype == torch.float32:  # without matrix units a thread holds whole rows and columns of its products
        shapes, limit = ((32, 2), (32, 3)), 255
    elif geometry.BLOCK_C > MAX_OUTPUTS:
        shapes = shapes[1:]
    return [dict(BLOCK_P=patches, num_warps=THREADS // tuning.WARP_SIZE, num_stages=stages, **tuning.registers(limit))
            for patches, stages in shapes]


class _Geometry:
    """What every launch needs: sizes and compile-time constants, and tensors as the kernels read them."""

    def __init__(self, q, weight, dilation):
        self.image, self.Q = q.shape[:3], q.shape[3]
        self.width, self.kernel_size = weight.shape[1:3]
        self.dilation = dilation = min(dilation, max(self.image[1:]))  # from there on all taps beside it are outside
        self.channels = max(1, MIN_BLOCK_C // self.width) * self.width  # of a block
        self.num_blocks = triton.cdiv(self.Q, self.channels)
        self.dtype = torch.float32 if INTERPRETED else q.dtype  # the interpreter gets 16-bit products wrong
        self.BLOCK_C = max(MIN_BLOCK_C, triton.next_power_of_2(self.width))
        self.BLOCK_J = min(triton.next_power_of_2(self.kernel_size + 1), MAX_COLUMNS // self.BLOCK_C)
        self.PATCH_W = _power_of_2(min(self.BLOCK_J - self.kernel_size + 1, MAX_OUTPUTS // self.BLOCK_C))
        self.PATCH_H = _power_of_2(min(MAX_PATCH_H, MAX_OUTPUTS // (self.PATCH_W * self.BLOCK_C)))
        self.BLOCK_I = min(triton.next_power_of_2(self.kernel_size),
                           _power_of_2(MAX_COLUMNS // (self.PATCH_W * self.BLOCK_C)))
        self.CHUNKS = triton.cdiv(self.PATCH_W - 1 + self.kernel_size, self.BLOCK_J)
        self.sizes = *self.image, self.Q, self.num_blocks, (self.PATCH_H - 1 + self.kernel_size) * self.CHUNKS
        self.window = dict(KERNEL_SIZE=self.kernel_size, BLOCK_C=self.BLOCK_C, BLOCK_J=self.BLOCK_J,
                           CHUNKS=self.CHUNKS, PATCH_W=self.PATCH_W, enable_fp_fusion=True)
        self.patches = dict(DILATION=dilation, CHANNELS=self.channels, PATCH_H=self.PATCH_H, **self.window)
        self.groups = dict(WIDTH=self.width, CHANNELS=self.channels, **self.window)
        self.sums = dict(BLOCK_I=self.BLOCK_I, **self.window)
        self.key = dict(
            dtype=str(q.dtype)[6:], k=self.kernel_size, dilation=dilation, width=self.width, channels=self.Q,
            batch=triton.next_power_of_2(q.shape[0]), pixels=triton.next_power_of_2(max(1, q.shape[1] * q.shape[2])))

    def num_patches(self, PATCH_H):
        """Of all samples; see kernels.convolution_kernels._patches."""
        B, H, W = self.image
        along = lambda side, size: triton.cdiv(side, size * self.dilation) * self.dilation
        return B * along(H, PATCH_H) * along(W, self.PATCH_W)

    def grid(self, config):
        return triton.cdiv(self.num_patches(self.PATCH_H), config["BLOCK_P"]) * self.num_blocks,

    def product(self, x1, x2):
        """x1 * x2, (B, H, W, Q) both, as (num_blocks, B * H * W, BLOCK_C)."""
        B, H, W = self.image
        channels = self.num_blocks * self.BLOCK_C
        out = torch.empty(self.num_blocks, B * H * W, self.BLOCK_C, dtype=self.dtype, device=x1.device)
        BLOCK_P, BLOCK_Q = 64, min(64, triton.next_power_of_2(channels))
        multiply_kernel[triton.cdiv(B * H * W, BLOCK_P), triton.cdiv(channels, BLOCK_Q)](
            x1, x2, out, H, W, self.Q, B * H * W, self.num_blocks, *x1.stride()[:3], *x2.stride()[:3],
            CHANNELS=self.channels, BLOCK_C=self.BLOCK_C, BLOCK_Q=BLOCK_Q, BLOCK_P=BLOCK_P, enable_fp_fusion=True)
        return out

    def matrices(self, weight, MIRRORED):
        """What the convolution multiplies with or, MIRRORED, its transpose; see spread_kernel."""
        shape = (self.num_blocks, self.kernel_size, self.CHUNKS,
                 self.BLOCK_J * self.BLOCK_C, self.PATCH_W * self.BLOCK_C)
        out = torch.empty(shape, dtype=self.dtype, device=weight.device)
        spread_kernel[(self.num_blocks * self.kernel_size * self.CHUNKS,)](
            weight.contiguous(), out, self.Q, MIRRORED=MIRRORED, **self.groups)
        return out


def _power_of_2(limit):
    """The largest up to the limit, at least 1."""
    return 1 << max(1, limit).bit_length() - 1
