"""Hadamard attention in Triton: the product q * k, a grouped convolution, bias and GELU, and their gradients.

convolution.py launches them. A block of channels is as many whole groups as fill the 16 that a matrix unit takes at
least. The product q * k is first laid out block by block, with zeros between the rows of the image (pad_kernel): there
a tap is one distance for all pixels, so the kernels that read it need no masks and hardly any address arithmetic.

A program computes BLOCK_P consecutive pixels of one block of channels. A row of the window is one product, or
BLOCKS_PER_ROW of them where it is long or its blocks are wide: of (BLOCK_P, BLOCK_J * BLOCK_C), each pixel's neighbours
and a few more to a power of two, with a matrix that has the groups' weights on the diagonals of its BLOCK_J blocks. For
groups of 4 channels that is four times the work, at the rate of matrix units instead of vector units.

Padded images: pixel (y, x) lies at (y + edge) * pitch + x + edge, pitch = W + edge, so that what is left of a row is
right of the row before; `length` pixels in all. Sums are float32. Nothing is added atomically: the gradient of q * k
gathers, that of the weights is partial sums, one per program.
"""
import triton
import triton.language as tl


@triton.jit
def pad_kernel(p_x1, p_x2, p_out, H, W, Q, length, pitch, edge, s_1b, s_1y, s_1x, s_2b, s_2y, s_2x,
               CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, GELU: tl.constexpr, BLOCK_P: tl.constexpr):
    """out (B, blocks, length, BLOCK_C), the product of x1 and x2, (B, H, W, Q) both, padded.

        h[b, y, x, c]  = q[b, y, x, c] * k[b, y, x, c]             x1 = q, x2 = k
        du[b, y, x, c] = dz[b, y, x, c] * GELU'(u[b, y, x, c])     x1 = dz, x2 = u, with GELU
        out            = that at the padded place of (y, x), in block c // CHANNELS; zero where there is no such pixel
    """
    num_tiles = tl.cdiv(length, BLOCK_P)
    b = (tl.program_id(0) // num_tiles).to(tl.int64)
    o_p = tl.program_id(0) % num_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    o_y, o_x = o_p // pitch - edge, o_p % pitch - edge
    o_in = tl.arange(0, BLOCK_C)
    o_c = tl.program_id(1) * CHANNELS + o_in
    m_p = (o_y >= 0) & (o_y < H) & (o_x >= 0)  # o_x < W, since pitch - edge = W
    mask = m_p[:, None] & ((o_in < CHANNELS) & (o_c < Q))[None, :]
    p_1 = p_x1 + b * s_1b + (o_y * s_1y + o_x * s_1x)[:, None] + o_c[None, :]
    p_2 = p_x2 + b * s_2b + (o_y * s_2y + o_x * s_2x)[:, None] + o_c[None, :]
    b_1 = tl.load(p_1, mask=mask, other=0.0).to(tl.float32)
    b_2 = tl.load(p_2, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        b_2 = 0.5 * (1.0 + tl.erf(b_2 * 0.7071067811865476)) + b_2 * 0.3989422804014327 * tl.exp(-0.5 * b_2 * b_2)
    p_out += (b * tl.num_programs(1) + tl.program_id(1)) * length * BLOCK_C
    p_o = p_out + o_p[:, None] * BLOCK_C + o_in[None, :]
    tl.store(p_o, b_1 * b_2, mask=(o_p < length)[:, None])  # [BLOCK_P, BLOCK_C] * [BLOCK_P, BLOCK_C]


@triton.jit
def hadamard_kernel(p_h, p_weight, p_bias, p_z, p_u, H, W, Q, length, pitch, num_products, scale,
                    KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
                    BLOCKS_PER_ROW: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr):
    """z and u, (B, H, W, Q) both; h padded, weights as :func:`kernels.convolution._Geometry.matrices` lays them out.

        u[y, x] = scale * (sum over t = (i, j) of h[y + (i-r) * DILATION, x + (j-r) * DILATION] @ weight[t]) + bias
        z       = GELU(u)                for each sample and block of channels; h[y, x] (CHANNELS,), weight[t] square
    """
    b_u = _convolution(p_h, p_weight, H, length, pitch, num_products,
                       KERNEL_SIZE, DILATION, BLOCK_C, BLOCKS_PER_ROW, BLOCK_J, BLOCK_P)
    b, o_y, o_x, o_c, m_o, m_c = _pixels(H, W, Q, pitch, CHANNELS, BLOCK_C, BLOCK_P)
    b_u = b_u * scale + tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    o_o = b * H * W * Q + ((o_y * W + o_x) * Q)[:, None] + o_c[None, :]
    tl.store(p_u + o_o, b_u, mask=m_o)
    tl.store(p_z + o_o, b_u * 0.5 * (1.0 + tl.erf(b_u * 0.7071067811865476)), mask=m_o)


@triton.jit
def dqk_kernel(p_du, p_weight, p_q, p_k, p_dq, p_dk, H, W, Q, length, pitch, num_products,
               s_qb, s_qy, s_qx, s_kb, s_ky, s_kx, scale,
               KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
               BLOCKS_PER_ROW: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr):
    """dq and dk, (B, H, W, Q) both; du padded, weights mirrored and transposed.

        dh[y, x] = scale * sum over t = (i, j) of du[y - (i-r) * DILATION, x - (j-r) * DILATION] @ weight[t]^T
        dq, dk   = k * dh, q * dh        for each sample and block of channels; dh (CHANNELS,), weight[t] square
    """
    b_dh = _convolution(p_du, p_weight, H, length, pitch, num_products,
                        KERNEL_SIZE, DILATION, BLOCK_C, BLOCKS_PER_ROW, BLOCK_J, BLOCK_P) * scale
    b, o_y, o_x, o_c, m_o, m_c = _pixels(H, W, Q, pitch, CHANNELS, BLOCK_C, BLOCK_P)
    p_q = p_q + b * s_qb + (o_y * s_qy + o_x * s_qx)[:, None] + o_c[None, :]
    p_k = p_k + b * s_kb + (o_y * s_ky + o_x * s_kx)[:, None] + o_c[None, :]
    b_q = tl.load(p_q, mask=m_o, other=0.0).to(tl.float32)
    b_k = tl.load(p_k, mask=m_o, other=0.0).to(tl.float32)
    o_o = b * H * W * Q + ((o_y * W + o_x) * Q)[:, None] + o_c[None, :]
    # [BLOCK_P, BLOCK_C] * [BLOCK_P, BLOCK_C] -> [BLOCK_P, BLOCK_C]
    tl.store(p_dq + o_o, b_dh * b_k, mask=m_o)
    tl.store(p_dk + o_o, b_dh * b_q, mask=m_o)


@triton.jit
def dweight_kernel(p_du, p_h, p_part, H, length, pitch, edge, split_size, num_splits,
                   KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
                   BLOCKS_PER_ROW: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr):
    """Partial dw, (B * num_splits, blocks, KERNEL_SIZE, BLOCKS_PER_ROW * BLOCK_J, BLOCK_C, BLOCK_C) float32, unscaled.

        dw[t] = sum over (y, x) of h[y + (i-r) * DILATION, x + (j-r) * DILATION]^T @ du[y, x]     t = (i, j)

    for each sample and block of channels. A program sums BLOCK_J taps over split_size pixels. The programs of one split
    follow each other, so that what the first reads the others find in the cache.
    """
    product = tl.program_id(0) % (KERNEL_SIZE * BLOCKS_PER_ROW)
    split = tl.program_id(0) // (KERNEL_SIZE * BLOCKS_PER_ROW)  # of all samples
    block = tl.program_id(1)
    p_image = ((split // num_splits).to(tl.int64) * tl.num_programs(1) + block) * length * BLOCK_C
    first = split % num_splits * split_size
    o_p = tl.arange(0, BLOCK_P)
    o_jc = _neighbours(product, pitch, KERNEL_SIZE, DILATION, BLOCK_C, BLOCKS_PER_ROW, BLOCK_J)
    p_h += p_image + o_p[:, None] * BLOCK_C + o_jc[None, :]
    p_du += p_image + edge * (pitch + 1) * BLOCK_C + o_p[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    b_dw = tl.zeros([BLOCK_J * BLOCK_C, BLOCK_C], dtype=tl.float32)
    for start in range(first, tl.minimum(first + split_size, H * pitch), BLOCK_P):  # beyond the last pixel du is zero
        b_h, b_du = tl.load(p_h + start * BLOCK_C), tl.load(p_du + start * BLOCK_C)
        # [BLOCK_J * BLOCK_C, BLOCK_P] @ [BLOCK_P, BLOCK_C] -> [BLOCK_J * BLOCK_C, BLOCK_C]
        b_dw = tl.dot(tl.trans(b_h), b_du, b_dw, input_precision="ieee")
    o_dw = (split.to(tl.int64) * tl.num_programs(1) + block) * (KERNEL_SIZE * BLOCKS_PER_ROW) + product
    p_part += o_dw * (BLOCK_J * BLOCK_C * BLOCK_C)
    tl.store(p_part + tl.arange(0, BLOCK_J * BLOCK_C)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :], b_dw)


@triton.jit
def _convolution(p_h, p_weight, H, length, pitch, num_products,
                 KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, BLOCK_C: tl.constexpr,
                 BLOCKS_PER_ROW: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_P, BLOCK_C] of this program's pixels. num_products is KERNEL_SIZE * BLOCKS_PER_ROW, not to be unrolled."""
    num_tiles = tl.cdiv(H * pitch, BLOCK_P)
    b = (tl.program_id(0) // num_tiles).to(tl.int64)
    o_p = tl.program_id(0) % num_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    p_h += (b * tl.num_programs(1) + tl.program_id(1)) * length * BLOCK_C + o_p[:, None] * BLOCK_C
    block = tl.program_id(1) * (KERNEL_SIZE * BLOCKS_PER_ROW * BLOCK_J * BLOCK_C * BLOCK_C)
    p_weight += block + tl.arange(0, BLOCK_J * BLOCK_C)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for product in range(num_products):
        o_jc = _neighbours(product, pitch, KERNEL_SIZE, DILATION, BLOCK_C, BLOCKS_PER_ROW, BLOCK_J)
        b_h, b_weight = tl.load(p_h + o_jc[None, :]), tl.load(p_weight + product * (BLOCK_J * BLOCK_C * BLOCK_C))
        # [BLOCK_P, BLOCK_J * BLOCK_C] @ [BLOCK_J * BLOCK_C, BLOCK_C] -> [BLOCK_P, BLOCK_C]
        b_sum = tl.dot(b_h, b_weight, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def _neighbours(product, pitch, KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, BLOCK_C: tl.constexpr,
                BLOCKS_PER_ROW: tl.constexpr, BLOCK_J: tl.constexpr):
    """[BLOCK_J * BLOCK_C]: how far the channels of a product's neighbours are from the first tap's.

    Those behind the last of a row, whose weights are zero, are the last again.
    """
    o_jc = tl.arange(0, BLOCK_J * BLOCK_C)
    i = product // BLOCKS_PER_ROW
    o_j = tl.minimum(product % BLOCKS_PER_ROW * BLOCK_J + o_jc // BLOCK_C, KERNEL_SIZE - 1)
    offsets = (i * pitch + o_j) * (DILATION * BLOCK_C) + o_jc % BLOCK_C
    return tl.max_contiguous(tl.multiple_of(offsets, BLOCK_C), BLOCK_C)


@triton.jit
def _pixels(H, W, Q, pitch, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sample, rows, columns and channels that this program computes, which of all exist, and which of the channels."""
    num_tiles = tl.cdiv(H * pitch, BLOCK_P)
    o_p = tl.program_id(0) % num_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    o_y, o_x = o_p // pitch, o_p % pitch
    o_in = tl.arange(0, BLOCK_C)
    o_c = tl.program_id(1) * CHANNELS + o_in
    m_c = (o_in < CHANNELS) & (o_c < Q)
    b = (tl.program_id(0) // num_tiles).to(tl.int64)
    return b, o_y, o_x, o_c, ((o_y < H) & (o_x < W))[:, None] & m_c[None, :], m_c
