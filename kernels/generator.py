"""The generator of ELSA's attention maps in Triton: q * k, a grouped k x k convolution, bias and GELU in one kernel, and its gradients.

A program computes a tile of consecutive pixels of one sample for one block of channels. A block is as many whole groups as fill the 16
channels that a matrix unit takes at least, so that a tap is one product of (pixels, 16) with a (16, 16) matrix that has the groups' weights
on its diagonal: for groups of 4 channels that is four times the work, at the rate of matrix units instead of vector units.

Sums are float32. Nothing is added atomically: the gradient of q * k gathers, that of the weights is partial sums, one per program.
Prefixes as in aggregation.py.
"""
import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import aggregation, tuning

SMALLEST = 16  # side of the smallest product that tl.dot takes
CHUNK = 2048  # pixels that one program of dweight_kernel sums


@triton.jit
def hadamard_kernel(p_q, p_k, p_w, p_bias, p_z, p_u, H, W, Q, rows, s_qb, s_qy, s_qx, s_kb, s_ky, s_kx, scale,
                    k: tl.constexpr, DIL: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, DOT: tl.constexpr, BP: tl.constexpr):
    """z = GELU(u), u = scale * convolution(q * k) + bias: both (B, H, W, Q)."""
    b, o_y, o_x, o_c, m_p, m_c = _tile(H, W, Q, R, BC, BP)
    p_q += b * s_qb + o_c
    p_k += b * s_kb + o_c
    p_w += tl.program_id(1) * (k * k * BC * BC)
    o_in, o_out = tl.arange(0, BC)[:, None] * BC, tl.arange(0, BC)[None, :]
    b_u = tl.zeros([BP, BC], dtype=tl.float32)
    for i in range(rows):
        o_vy = o_y + (i - k // 2) * DIL
        m_y = m_p & (o_vy >= 0) & (o_vy < H)
        p_qrow = (p_q[None, :] + (o_vy * s_qy + o_x * s_qx)[:, None])
        p_krow = (p_k[None, :] + (o_vy * s_ky + o_x * s_kx)[:, None])
        for j in tl.static_range(k):
            o_vx = o_x + (j - k // 2) * DIL
            m_v = (m_y & (o_vx >= 0) & (o_vx < W))[:, None] & m_c[None, :]
            b_q = tl.load(p_qrow + (j - k // 2) * DIL * s_qx, mask=m_v, other=0.0).to(DOT)
            b_k = tl.load(p_krow + (j - k // 2) * DIL * s_kx, mask=m_v, other=0.0).to(DOT)
            b_w = tl.load(p_w + (i * k + j) * (BC * BC) + o_in + o_out).to(DOT)
            b_u = tl.dot(b_q * b_k, b_w, b_u, input_precision="ieee")  # [BP, BC] @ [BC, BC] -> [BP, BC]
    m_o = m_p[:, None] & m_c[None, :]
    b_u = b_u * scale + tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    o_o = b * H * W * Q + ((o_y * W + o_x) * Q)[:, None] + o_c[None, :]
    tl.store(p_u + o_o, b_u, mask=m_o)
    tl.store(p_z + o_o, b_u * 0.5 * (1.0 + tl.erf(b_u * 0.7071067811865476)), mask=m_o)


@triton.jit
def dqk_kernel(p_du, p_w, p_q, p_k, p_dq, p_dk, H, W, Q, rows, s_qb, s_qy, s_qx, s_kb, s_ky, s_kx, scale,
               k: tl.constexpr, DIL: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, DOT: tl.constexpr, BP: tl.constexpr):
    """dq = k * dh, dk = q * dh, dh = scale * convolution of du with the mirrored, transposed weights: both (B, H, W, Q)."""
    b, o_y, o_x, o_c, m_p, m_c = _tile(H, W, Q, R, BC, BP)
    p_w += tl.program_id(1) * (k * k * BC * BC)
    o_in, o_out = tl.arange(0, BC)[:, None] * BC, tl.arange(0, BC)[None, :]
    o_o = b * H * W * Q + ((o_y * W + o_x) * Q)[:, None] + o_c[None, :]
    b_dh = tl.zeros([BP, BC], dtype=tl.float32)
    for i in range(rows):
        o_vy = o_y + (i - k // 2) * DIL
        m_y = m_p & (o_vy >= 0) & (o_vy < H)
        p_row = p_du + o_o + (i - k // 2) * DIL * W * Q
        for j in tl.static_range(k):
            o_vx = o_x + (j - k // 2) * DIL
            m_v = (m_y & (o_vx >= 0) & (o_vx < W))[:, None] & m_c[None, :]
            b_du = tl.load(p_row + (j - k // 2) * DIL * Q, mask=m_v, other=0.0).to(DOT)
            b_w = tl.load(p_w + (i * k + j) * (BC * BC) + o_in + o_out).to(DOT)
            b_dh = tl.dot(b_du, b_w, b_dh, input_precision="ieee")  # [BP, BC] @ [BC, BC] -> [BP, BC]
    m_o = m_p[:, None] & m_c[None, :]
    b_q = tl.load(p_q + b * s_qb + (o_y * s_qy + o_x * s_qx)[:, None] + o_c[None, :], mask=m_o, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + b * s_kb + (o_y * s_ky + o_x * s_kx)[:, None] + o_c[None, :], mask=m_o, other=0.0).to(tl.float32)
    tl.store(p_dq + o_o, b_dh * scale * b_k, mask=m_o)
    tl.store(p_dk + o_o, b_dh * scale * b_q, mask=m_o)


@triton.jit
def dweight_kernel(p_du, p_q, p_k, p_part, H, W, Q, chunk, n_chunks, n_blocks, s_qb, s_qy, s_qx, s_kb, s_ky, s_kx,
                   k: tl.constexpr, DIL: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, DOT: tl.constexpr, BP: tl.constexpr):
    """Of one chunk of a sample's pixels and one tap the sum of (q * k)^T du: (B * chunks, blocks, K, BC, BC) float32, not yet scaled."""
    part, block, tap = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = (part // n_chunks).to(tl.int64)
    first = part % n_chunks * chunk
    o_in = tl.arange(0, BC)
    o_c = block * R + o_in
    m_c = (o_in < R) & (o_c < Q)
    dy, dx = (tap // k - k // 2) * DIL, (tap % k - k // 2) * DIL
    b_dw = tl.zeros([BC, BC], dtype=tl.float32)
    for start in range(first, tl.minimum(first + chunk, H * W), BP):
        o_p = start + tl.arange(0, BP)
        o_y, o_x = o_p // W, o_p % W
        m_p = o_p < tl.minimum(first + chunk, H * W)
        m_v = (m_p & (o_y + dy >= 0) & (o_y + dy < H) & (o_x + dx >= 0) & (o_x + dx < W))[:, None] & m_c[None, :]
        b_q = tl.load(p_q + b * s_qb + ((o_y + dy) * s_qy + (o_x + dx) * s_qx)[:, None] + o_c[None, :], mask=m_v, other=0.0).to(DOT)
        b_k = tl.load(p_k + b * s_kb + ((o_y + dy) * s_ky + (o_x + dx) * s_kx)[:, None] + o_c[None, :], mask=m_v, other=0.0).to(DOT)
        b_du = tl.load(p_du + b * H * W * Q + (o_p * Q)[:, None] + o_c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0).to(DOT)
        b_dw = tl.dot(tl.trans(b_q * b_k), b_du, b_dw, input_precision="ieee")  # [BC, BP] @ [BP, BC] -> [BC, BC]
    p_part += ((part.to(tl.int64) * n_blocks + block) * (k * k) + tap) * (BC * BC)
    tl.store(p_part + o_in[:, None] * BC + o_in[None, :], b_dw)


@triton.jit
def _tile(H, W, Q, R: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Sample, rows and columns of this program's pixels, its channels, and which of both exist."""
    n_tiles = tl.cdiv(H * W, BP)
    b = (tl.program_id(0) // n_tiles).to(tl.int64)
    o_p = tl.program_id(0) % n_tiles * BP + tl.arange(0, BP)
    o_in = tl.arange(0, BC)
    o_c = tl.program_id(1) * R + o_in
    return b, o_p // W, o_p % W, o_c, o_p < H * W, (o_in < R) & (o_c < Q)


def configs(*shapes):
    """Of (pixels, threads) each; where it is measured, the library's convolution competes with them."""
    # Two stages: a third, the default, would fill the shared memory with taps to come.
    return [*(dict(BP=pixels, num_warps=threads // aggregation.WARP_SIZE, num_stages=2) for pixels, threads in shapes), dict(library=True)]


def forward(q, k, weight, bias, scale, dilation):
    """z, u (B, H, W, Q). q, k (B, H, W, Q), their channels side by side; weight (Q, width, k, k); bias (Q,)."""
    s = _Setting(q, k, weight, dilation)
    z, u = (torch.empty(s.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    dense = s.dense(weight, mirrored=False)

    def launch(library=False, **config):
        if library:
            u.copy_(s.convolution((q * k * scale).permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1))
            z.copy_(F.gelu(u))
        else:
            hadamard_kernel[s.grid(config)](q, k, dense, bias, z, u, *s.sizes, *s.strides, scale, **s.constants, **config)

    tuning.launch("hadamard", s.key, configs((64, 128), (128, 256), (32, 64)), launch, q.device)
    return z, u


def backward(du, q, k, weight, scale, dilation):
    """dq, dk (B, H, W, Q), dweight (Q, width, k, k) float32 of du (B, H, W, Q), contiguous."""
    s = _Setting(q, k, weight, dilation)
    dq, dk = (torch.empty(s.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    dense = s.dense(weight, mirrored=True)

    def launch(library=False, **config):
        if library:
            dh = s.convolution_backward(du, q * k, weight, (True, False))[0].permute(0, 2, 3, 1)
            torch.mul(dh * scale, k, out=dq)
            torch.mul(dh * scale, q, out=dk)
        else:
            dqk_kernel[s.grid(config)](du, dense, q, k, dq, dk, *s.sizes, *s.strides, scale, **s.constants, **config)

    tuning.launch("dqk", s.key, configs((64, 128), (32, 64)), launch, q.device)
    B, H, W, _ = s.shape
    n_chunks, taps, BC = triton.cdiv(H * W, CHUNK), s.constants["k"] ** 2, s.constants["BC"]
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=q.device)

    def launch_dweight(library=False, **config):
        if library:
            dweight.copy_(s.convolution_backward(du, q * k, weight, (False, True))[1])
        else:
            parts = torch.empty(B * n_chunks, s.blocks, taps, BC, BC, dtype=torch.float32, device=q.device)
            dweight_kernel[(B * n_chunks, s.blocks, taps)](du, q, k, parts, *s.sizes[:3], triton.cdiv(H * W, n_chunks), n_chunks, s.blocks,
                                                           *s.strides, **s.constants, **config)
            dweight.copy_(s.groups(parts.sum(0)))

    tuning.launch("dweight", s.key, configs((64, 128), (64, 64), (32, 64)), launch_dweight, q.device)
    return dq, dk, dweight * scale


class _Setting:
    """What every launch needs: sizes, strides, compile-time constants, and weights as matrices and back."""

    def __init__(self, q, k, weight, dilation):
        B, H, W, Q = self.shape = q.shape
        self.width, side = weight.shape[1:3]
        self.per_block = max(1, SMALLEST // self.width)  # groups
        R = self.per_block * self.width
        self.blocks = triton.cdiv(Q, R)
        dot = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(q.dtype, tl.float32)
        if os.environ.get("TRITON_INTERPRET") == "1":
            dot = tl.float32  # the interpreter gets 16-bit products wrong
        self.constants = dict(k=side, DIL=dilation, R=R, BC=max(SMALLEST, triton.next_power_of_2(R)), DOT=dot)
        self.sizes = (H, W, Q, side)
        self.strides = (*q.stride()[:3], *k.stride()[:3])
        self.key = dict(dtype=str(q.dtype)[6:], k=side, dilation=dilation, width=self.width, channels=Q,
                        pixels=triton.next_power_of_2(max(1, H * W)))

    def convolution(self, h, weight, bias):
        side = self.constants["k"]
        return F.conv2d(h, weight.to(h.dtype), bias.to(h.dtype), 1, side // 2 * self.constants["DIL"], self.constants["DIL"],
                        self.shape[3] // self.width)

    def convolution_backward(self, du, h, weight, wanted):
        """Gradients of h (N, Q, H, W) and of the weight, as far as `wanted`."""
        side, dilation = self.constants["k"], self.constants["DIL"]
        return torch.ops.aten.convolution_backward(
            du.permute(0, 3, 1, 2), h.permute(0, 3, 1, 2), weight.to(du.dtype), None, [1, 1], [side // 2 * dilation] * 2, [dilation] * 2, False,
            [0, 0], self.shape[3] // self.width, [*wanted, False])

    def grid(self, config):
        B, H, W, _ = self.shape
        return B * triton.cdiv(H * W, config["BP"]), self.blocks

    def dense(self, weight, mirrored):
        """(blocks, K, BC, BC): tap by tap from input to output channel; mirrored: from output to input, the taps in reverse."""
        Q, w, K, n = weight.shape[0], self.width, self.constants["k"] ** 2, self.per_block
        groups = weight.new_zeros(self.blocks * n, w, w, K)  # (groups, out, in, K)
        groups[:Q // w] = weight.reshape(Q // w, w, w, K)
        groups = groups.view(self.blocks, n, w, w, K).permute((0, 4, 2, 3, 1) if mirrored else (0, 4, 3, 2, 1))  # (blocks, K, rows, columns, n)
        matrices = weight.new_zeros(self.blocks, K, n, w, n, w)
        matrices.diagonal(dim1=2, dim2=4).copy_(groups.flip(1) if mirrored else groups)
        extra = self.constants["BC"] - n * w
        return F.pad(matrices.reshape(self.blocks, K, n * w, n * w), (0, extra, 0, extra)).contiguous()

    def groups(self, matrices):
        """The reverse of dense: (blocks, K, BC, BC) -> (Q, width, k, k)."""
        w, n, k = self.width, self.per_block, self.constants["k"]
        matrices = matrices[:, :, :n * w, :n * w].reshape(self.blocks, k * k, n, w, n, w).diagonal(dim1=2, dim2=4)  # (blocks, K, in, out, n)
        return matrices.permute(0, 4, 3, 2, 1).reshape(-1, w, k, k)[:self.shape[3]].contiguous()
