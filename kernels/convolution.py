"""Launching Hadamard attention's kernels: padded images, weights as matrices, and what the tuner may choose from."""
import torch
import torch.nn.functional as F
import triton

from . import tuning
from .convolution_kernels import dqk_kernel, dweight_kernel, hadamard_kernel, pad_kernel

MIN_DOT = 16  # side of the smallest product that tl.dot takes
MAX_BLOCK_P = 128  # pixels of a product
MAX_COLUMNS = 128  # of a tile, neighbours times channels: it has to fit into shared memory
INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were decorated
SPLIT_SIZE = 2048  # pixels that one program of dweight_kernel sums, a multiple of MAX_BLOCK_P


def forward(q, k, weight, bias, scale, dilation):
    """z, u (B, H, W, Q), GELU(u) and u.

    q, k (B, H, W, Q), their channels side by side; weight (Q, width, kernel_size, kernel_size); bias (Q,).
    """
    geometry = _Geometry(q, weight, dilation)
    z, u = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    h, matrices, bias = geometry.padded(q, k), geometry.matrices(weight, mirrored=False), bias.contiguous()

    def launch(**config):
        hadamard_kernel[geometry.grid(config)](
            h, matrices, bias, z, u, *geometry.image, geometry.num_products, scale, **geometry.constants, **config)

    configs = candidates((128, 128, 2), (64, 128, 2), (128, 256, 3))
    tuning.launch(hadamard_kernel, geometry.key, configs, launch, q.device)
    return z, u


def backward(dz, u, q, k, weight, scale, dilation):
    """dq, dk (B, H, W, Q), dweight (Q, width, kernel_size, kernel_size) and dbias (Q,), both float32.

    dz (B, H, W, Q), its channels side by side.
    """
    geometry = _Geometry(q, weight, dilation)
    du, h = geometry.padded(dz, u, GELU=True), geometry.padded(q, k)
    dq, dk = _dqk(geometry, du, q, k, weight, scale)
    dweight = _dweight(geometry, du, h) * scale
    dbias = du.sum((0, 2), dtype=torch.float32)[:, :geometry.channels].flatten()[:geometry.Q]
    return dq, dk, dweight, dbias


def _dqk(geometry, du, q, k, weight, scale):
    dq, dk = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    matrices = geometry.matrices(weight, mirrored=True)

    def launch(**config):
        dqk_kernel[geometry.grid(config)](
            du, matrices, q, k, dq, dk, *geometry.image, geometry.num_products, *q.stride()[:3], *k.stride()[:3], scale,
            **geometry.constants, **config)

    configs = candidates((128, 128, 2), (64, 128, 2), (128, 256, 3))
    tuning.launch(dqk_kernel, geometry.key, configs, launch, q.device)
    return dq, dk


def _dweight(geometry, du, h):
    num_splits = triton.cdiv(geometry.H * geometry.pitch, SPLIT_SIZE)
    parts = torch.empty(geometry.B * num_splits, *geometry.matrix_shape, dtype=torch.float32, device=du.device)

    def launch(**config):
        dweight_kernel[(geometry.B * num_splits * geometry.num_products, geometry.num_blocks)](
            du, h, parts, geometry.H, geometry.length, geometry.pitch, geometry.edge, SPLIT_SIZE, num_splits,
            **geometry.constants, **config)

    configs = tuning.for_sums_over_pixels(candidates((128, 128, 2), (128, 256, 2), (64, 128, 3)))
    tuning.launch(dweight_kernel, geometry.key, configs, launch, du.device)
    return geometry.weight(parts.sum(0))


def candidates(*shapes):
    """Of the tuner, of (pixels, threads, stages) each; the first is taken where nothing can be measured."""
    return [dict(BLOCK_P=pixels, num_warps=threads // tuning.WARP_SIZE, num_stages=stages, **tuning.registers(255))
            for pixels, threads, stages in shapes]


class _Geometry:
    """What every launch needs: sizes and compile-time constants, and tensors as the kernels read them."""

    def __init__(self, q, weight, dilation):
        self.B, self.H, self.W, self.Q = q.shape
        self.width, self.kernel_size = weight.shape[1:3]
        self.groups_per_block = max(1, MIN_DOT // self.width)
        self.channels = self.groups_per_block * self.width  # of a block
        self.num_blocks = triton.cdiv(self.Q, self.channels)
        self.edge = self.kernel_size // 2 * dilation
        self.pitch = self.W + self.edge
        tiled = triton.cdiv(self.H * self.pitch, MAX_BLOCK_P) * MAX_BLOCK_P
        self.length = tiled + 2 * self.edge * (self.pitch + 1)  # as far as the last program reads
        self.dtype = torch.float32 if INTERPRETED else q.dtype  # the interpreter gets 16-bit products wrong
        BLOCK_C = max(MIN_DOT, triton.next_power_of_2(self.channels))
        BLOCK_J = min(triton.next_power_of_2(self.kernel_size), max(1, MAX_COLUMNS // BLOCK_C))
        BLOCKS_PER_ROW = triton.cdiv(self.kernel_size, BLOCK_J)
        self.num_products = self.kernel_size * BLOCKS_PER_ROW
        self.matrix_shape = self.num_blocks, self.kernel_size, BLOCKS_PER_ROW * BLOCK_J, BLOCK_C, BLOCK_C
        self.constants = dict(
            KERNEL_SIZE=self.kernel_size, DILATION=dilation, CHANNELS=self.channels,
            BLOCK_C=BLOCK_C, BLOCKS_PER_ROW=BLOCKS_PER_ROW, BLOCK_J=BLOCK_J, enable_fp_fusion=True)
        self.image = self.H, self.W, self.Q, self.length, self.pitch
        self.key = dict(
            dtype=str(q.dtype)[6:], k=self.kernel_size, dilation=dilation, width=self.width, channels=self.Q,
            batch=triton.next_power_of_2(self.B), pixels=triton.next_power_of_2(max(1, self.H * self.W)))

    def grid(self, config):
        return self.B * triton.cdiv(self.H * self.pitch, config["BLOCK_P"]), self.num_blocks

    def padded(self, x1, x2, GELU=False):
        """The product of x1 and x2, or of x1 and the derivative of GELU at x2: (B, num_blocks, length, BLOCK_C)."""
        BLOCK_C, BLOCK_P = self.constants["BLOCK_C"], 64
        out = torch.empty(self.B, self.num_blocks, self.length, BLOCK_C, dtype=self.dtype, device=x1.device)
        pad_kernel[(self.B * triton.cdiv(self.length, BLOCK_P), self.num_blocks)](
            x1, x2, out, *self.image, self.edge, *x1.stride()[:3], *x2.stride()[:3],
            CHANNELS=self.channels, BLOCK_C=BLOCK_C, GELU=GELU, BLOCK_P=BLOCK_P, enable_fp_fusion=True)
        return out

    def matrices(self, weight, mirrored):
        """matrix_shape: tap by tap from input to output channel.

        mirrored: from output to input, the taps in reverse.
        """
        n, w, K = self.groups_per_block, self.width, self.kernel_size ** 2
        groups = weight.new_zeros(self.num_blocks * n, w, w, K)  # (groups, out, in, K)
        groups[:self.Q // w] = weight.reshape(self.Q // w, w, w, K)
        groups = groups.view(self.num_blocks, n, w, w, K)
        if mirrored:
            groups = groups.permute(0, 4, 2, 3, 1).flip(1)  # (num_blocks, K, out, in, n)
        else:
            groups = groups.permute(0, 4, 3, 2, 1)  # (num_blocks, K, in, out, n)
        matrices = weight.new_zeros(self.num_blocks, K, n, w, n, w)
        matrices.diagonal(dim1=2, dim2=4).copy_(groups)
        matrices = matrices.reshape(self.num_blocks, self.kernel_size, self.kernel_size, n * w, n * w)
        extra_taps, extra_channels = self.matrix_shape[2] - self.kernel_size, self.matrix_shape[3] - n * w
        matrices = F.pad(matrices, (0, extra_channels, 0, extra_channels, 0, extra_taps))
        return matrices.to(self.dtype).contiguous()

    def weight(self, matrices):
        """The reverse of matrices: matrix_shape -> (Q, width, kernel_size, kernel_size)."""
        n, w, K = self.groups_per_block, self.width, self.kernel_size ** 2
        matrices = matrices[:, :, :self.kernel_size, :n * w, :n * w].reshape(self.num_blocks, K, n, w, n, w)
        groups = matrices.diagonal(dim1=2, dim2=4).permute(0, 4, 3, 2, 1)  # (num_blocks, n, out, in, K)
        return groups.reshape(-1, w, self.kernel_size, self.kernel_size)[:self.Q].contiguous()
