"""Hadamard attention in Triton: the product q * k, a grouped convolution, bias and GELU, and their gradients.

convolution.py launches them. A block of channels is as many whole groups as fit into 8, or one group that is wider. The
product q * k is first laid out block by block (multiply_kernel): there the neighbours in a row follow each other.

A program computes BLOCK_P patches of one block of channels. A patch is PATCH_H x PATCH_W pixels, DILATION apart, of any
sample, so that small images fill a program, too. A row that it reads, PATCH_W - 1 + KERNEL_SIZE neighbours, is one
product for all of its pixels, or CHUNKS of BLOCK_J neighbours where windows are long or blocks wide:

    (BLOCK_P, BLOCK_J * BLOCK_C) @ (BLOCK_J * BLOCK_C, PATCH_H * PATCH_W * BLOCK_C)

The matrix has a tap's weights where a neighbour is in a pixel's window, elsewhere zeros. That is work in vain, at the
rate of matrix units; in return a neighbour passes through shared memory once for all pixels of a patch. Sums are
float32. Nothing is added atomically: the gradient of q * k gathers, that of the weights is a sum of partial ones.
"""
import triton
import triton.language as tl


@triton.jit
def multiply_kernel(p_x1, p_x2, p_out, H, W, Q, num_pixels, num_blocks, s_1b, s_1y, s_1x, s_2b, s_2y,
                    s_2x, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr):
    """out (blocks, B, H, W, BLOCK_C), the product of x1 and x2, (B, H, W, Q) both, block by block.

        out[n, b, y, x, c] = x1[b, y, x, n * CHANNELS + c] * x2[b, y, x, n * CHANNELS + c], zero from CHANNELS and Q on
    """
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    o_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    block, o_in = o_q // BLOCK_C, o_q % BLOCK_C
    o_c = block * CHANNELS + o_in
    b, o_y, o_x = (o_p // (H * W)).to(tl.int64), o_p // W % H, o_p % W
    mask = (o_p < num_pixels) & (o_in < CHANNELS) & (o_c < Q)
    b_1 = tl.load(p_x1 + b * s_1b + (o_y * s_1y + o_x * s_1x + o_c), mask=mask, other=0.0).to(tl.float32)
    b_2 = tl.load(p_x2 + b * s_2b + (o_y * s_2y + o_x * s_2x + o_c), mask=mask, other=0.0).to(tl.float32)
    p_out += (block.to(tl.int64) * num_pixels + o_p) * BLOCK_C + o_in
    # [BLOCK_P, BLOCK_Q] * [BLOCK_P, BLOCK_Q] -> [BLOCK_P, BLOCK_Q]
    tl.store(p_out, b_1 * b_2, mask=(o_p < num_pixels) & (block < num_blocks))


@triton.jit
def spread_kernel(p_weight, p_out, Q, KERNEL_SIZE: tl.constexpr, WIDTH: tl.constexpr, MIRRORED: tl.constexpr,
                  CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, CHUNKS: tl.constexpr,
                  PATCH_W: tl.constexpr):
    """out (blocks, KERNEL_SIZE, CHUNKS * BLOCK_J, BLOCK_C, PATCH_W, BLOCK_C), the weights as matrices.

        out[n, i, j, c_in, x, c_out] = weight[n * CHANNELS + c_out, c_in - first of c_out's group, i, j - x]
        out[n, i, j, c_out, x, c_in] = the same of i and j - x counted from the last tap, if MIRRORED

    zero where there is no such tap, or no such channel in the group.
    """
    chunk, row = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    i, block = row % KERNEL_SIZE, row // KERNEL_SIZE
    o_jc, o_xc = tl.arange(0, BLOCK_J * BLOCK_C)[:, None], tl.arange(0, PATCH_W * BLOCK_C)[None, :]
    o_j = chunk * BLOCK_J + o_jc // BLOCK_C - o_xc // BLOCK_C
    o_in, o_out = o_jc % BLOCK_C, o_xc % BLOCK_C
    if MIRRORED:
        i, o_j, o_in, o_out = KERNEL_SIZE - 1 - i, KERNEL_SIZE - 1 - o_j, o_out, o_in
    o_c = block * CHANNELS + o_out
    mask = (o_j >= 0) & (o_j < KERNEL_SIZE) & (o_in // WIDTH == o_out // WIDTH) & (o_out < CHANNELS) & (o_c < Q)
    o_weight = ((o_c * WIDTH + o_in % WIDTH) * KERNEL_SIZE + i) * KERNEL_SIZE + o_j
    b_weight = tl.load(p_weight + o_weight, mask=mask, other=0.0)
    p_out += tl.program_id(0).to(tl.int64) * (BLOCK_J * BLOCK_C * PATCH_W * BLOCK_C)
    tl.store(p_out + o_jc * (PATCH_W * BLOCK_C) + o_xc, b_weight)


@triton.jit
def hadamard_kernel(p_h, p_weight, p_bias, p_z, p_slope, B, H, W, Q, num_blocks, num_products, scale,
                    KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
                    BLOCK_J: tl.constexpr, CHUNKS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
                    BLOCK_P: tl.constexpr):
    """z and slope, (B, H, W, Q) both; h and weight as multiply_kernel and spread_kernel lay them out.

        u[y, x] = scale * (sum over t = (i, j) of h[y + (i-r) * DILATION, x + (j-r) * DILATION] @ weight[t]) + bias
        z       = GELU(u)
        slope   = GELU'(u)               for each sample and block of channels; h[y, x] (CHANNELS,), weight[t] square
    """
    block, tile = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    b, o_y, o_x = _patches(tile * BLOCK_P, B, H, W, DILATION, PATCH_H, PATCH_W, BLOCK_P)
    b_u = _convolution(p_h, p_weight, block, b, o_y, o_x, B, H, W, num_products,
                       KERNEL_SIZE, DILATION, BLOCK_C, BLOCK_J, CHUNKS, PATCH_H, PATCH_W, BLOCK_P)
    o_y, o_x, o_in = _pixels(o_y, o_x, DILATION, PATCH_H, PATCH_W, BLOCK_C)
    o_c = block * CHANNELS + o_in
    mask = (o_y < H) & (o_x < W) & (o_in < CHANNELS) & (o_c < Q)
    b_u = b_u * scale + tl.load(p_bias + o_c, mask=(o_in < CHANNELS) & (o_c < Q), other=0.0).to(tl.float32)
    b_cdf = 0.5 * (1.0 + tl.erf(b_u * 0.7071067811865476))
    o_o = b * (H * W * Q) + ((o_y * W + o_x) * Q + o_c)
    tl.store(p_z + o_o, b_u * b_cdf, mask=mask)
    tl.store(p_slope + o_o, b_cdf + b_u * 0.3989422804014327 * tl.exp(-0.5 * b_u * b_u), mask=mask)


@triton.jit
def dqk_kernel(p_du, p_weight, p_q, p_k, p_dq, p_dk, B, H, W, Q, num_blocks, num_products,
               s_qb, s_qy, s_qx, s_kb, s_ky, s_kx, scale,
               KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
               BLOCK_J: tl.constexpr, CHUNKS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
               BLOCK_P: tl.constexpr):
    """dq and dk, (B, H, W, Q) both; du as multiply_kernel lays it out, weight mirrored.

        dh[y, x] = scale * sum over t = (i, j) of du[y - (i-r) * DILATION, x - (j-r) * DILATION] @ weight[t]^T
        dq, dk   = k * dh, q * dh        for each sample and block of channels; dh (CHANNELS,), weight[t] square
    """
    block, tile = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    b, o_y, o_x = _patches(tile * BLOCK_P, B, H, W, DILATION, PATCH_H, PATCH_W, BLOCK_P)
    b_dh = _convolution(p_du, p_weight, block, b, o_y, o_x, B, H, W, num_products,
                        KERNEL_SIZE, DILATION, BLOCK_C, BLOCK_J, CHUNKS, PATCH_H, PATCH_W, BLOCK_P) * scale
    o_y, o_x, o_in = _pixels(o_y, o_x, DILATION, PATCH_H, PATCH_W, BLOCK_C)
    o_c = block * CHANNELS + o_in
    mask = (o_y < H) & (o_x < W) & (o_in < CHANNELS) & (o_c < Q)
    b_q = tl.load(p_q + b * s_qb + (o_y * s_qy + o_x * s_qx + o_c), mask=mask, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + b * s_kb + (o_y * s_ky + o_x * s_kx + o_c), mask=mask, other=0.0).to(tl.float32)
    o_o = b * (H * W * Q) + ((o_y * W + o_x) * Q + o_c)
    # [BLOCK_P, PATCH_H * PATCH_W * BLOCK_C] each
    tl.store(p_dq + o_o, b_dh * b_k, mask=mask)
    tl.store(p_dk + o_o, b_dh * b_q, mask=mask)


@triton.jit
def dweight_kernel(p_du, p_h, p_part, B, H, W, num_blocks, split_size, num_patches,
                   KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
                   CHUNKS: tl.constexpr, BLOCK_I: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_P: tl.constexpr):
    """Partial dw, (splits, blocks, rows of taps, CHUNKS, BLOCK_J * BLOCK_C, BLOCK_I * PATCH_W * BLOCK_C) float32.

        dw[j, c_in, i, x, c_out] = sum over (y, x') of h[y, x' + (j-r) * DILATION, c_in]
                                                       * du[y - (i-r) * DILATION, x' + x * DILATION, c_out]

    where x' is the first column of a patch of one row; tap (i, j) is the sum of dw[j + x, :, i, x], see gather_kernel.
    A program sums split_size patches for BLOCK_I rows of taps and BLOCK_J neighbours. The programs of one block and
    split follow each other, so that what the first reads the others find in the cache.
    """
    ROWS: tl.constexpr = (KERNEL_SIZE + BLOCK_I - 1) // BLOCK_I
    product, rest = tl.program_id(0) % (ROWS * CHUNKS), tl.program_id(0) // (ROWS * CHUNKS)
    chunk, first_i = product % CHUNKS, product // CHUNKS * BLOCK_I
    block, split = rest % num_blocks, rest // num_blocks
    first = split * split_size
    o_i = first_i + tl.arange(0, BLOCK_I * PATCH_W * BLOCK_C)[None, :] // (PATCH_W * BLOCK_C)
    b_dw = tl.zeros([BLOCK_J * BLOCK_C, BLOCK_I * PATCH_W * BLOCK_C], dtype=tl.float32)
    for start in range(first, tl.minimum(first + split_size, num_patches), BLOCK_P):
        b, o_y, o_x = _patches(start, B, H, W, DILATION, 1, PATCH_W, BLOCK_P)
        p_image = (block.to(tl.int64) * B + b) * (H * W * BLOCK_C)
        b_h = _neighbours(p_h + p_image, o_y, o_x, chunk, H, W, KERNEL_SIZE, DILATION, BLOCK_C, BLOCK_J)
        _, x, o_in = _pixels(o_y, o_x, DILATION, BLOCK_I, PATCH_W, BLOCK_C)
        y = o_y - (o_i - KERNEL_SIZE // 2) * DILATION
        mask = (y >= 0) & (y < H) & (x < W) & (o_i < KERNEL_SIZE)  # the last is not needed, but saves loads
        b_du = tl.load(p_du + p_image + ((y * W + x) * BLOCK_C + o_in), mask=mask, other=0.0)
        # [BLOCK_J * BLOCK_C, BLOCK_P] @ [BLOCK_P, BLOCK_I * PATCH_W * BLOCK_C]
        b_dw = tl.dot(tl.trans(b_h), b_du, b_dw, input_precision="ieee")
    o_row, o_column = tl.arange(0, BLOCK_J * BLOCK_C)[:, None], tl.arange(0, BLOCK_I * PATCH_W * BLOCK_C)[None, :]
    p_part += tl.program_id(0).to(tl.int64) * (BLOCK_J * BLOCK_C * BLOCK_I * PATCH_W * BLOCK_C)
    tl.store(p_part + o_row * (BLOCK_I * PATCH_W * BLOCK_C) + o_column, b_dw)


@triton.jit
def gather_kernel(p_part, p_dweight, num_elements, split_stride, num_splits, scale,
                  KERNEL_SIZE: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
                  BLOCK_J: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_I: tl.constexpr, PATCH_W: tl.constexpr,
                  BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """dweight (Q, WIDTH, KERNEL_SIZE, KERNEL_SIZE) float32, scale times the sum of dweight_kernel's parts."""
    ROWS: tl.constexpr = (KERNEL_SIZE + BLOCK_I - 1) // BLOCK_I
    o_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_j, o_i = o_e % KERNEL_SIZE, o_e // KERNEL_SIZE % KERNEL_SIZE
    o_c = o_e // (KERNEL_SIZE * KERNEL_SIZE * WIDTH)
    block, o_out = (o_c // CHANNELS).to(tl.int64), o_c % CHANNELS
    o_in = o_out // WIDTH * WIDTH + o_e // (KERNEL_SIZE * KERNEL_SIZE) % WIDTH
    b_sum = tl.zeros([BLOCK_E], dtype=tl.float32)
    for x in tl.static_range(PATCH_W):
        o_n = o_j + x  # a neighbour
        tile = (block * ROWS + o_i // BLOCK_I) * CHUNKS + o_n // BLOCK_J
        row, column = o_n % BLOCK_J * BLOCK_C + o_in, (o_i % BLOCK_I * PATCH_W + x) * BLOCK_C + o_out
        o_part = (tile * (BLOCK_J * BLOCK_C) + row) * (BLOCK_I * PATCH_W * BLOCK_C) + column
        for first in range(0, num_splits, BLOCK_S):
            split = first + tl.arange(0, BLOCK_S)[:, None]
            mask = (split < num_splits) & (o_e < num_elements)[None, :]
            b_part = tl.load(p_part + (split.to(tl.int64) * split_stride + o_part[None, :]), mask=mask, other=0.0)
            b_sum += tl.sum(b_part, 0)  # [BLOCK_S, BLOCK_E] -> [BLOCK_E]
    tl.store(p_dweight + o_e, b_sum * scale, mask=o_e < num_elements)


@triton.jit
def _convolution(p_x, p_weight, block, b, o_y, o_x, B, H, W, num_products,
                 KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
                 CHUNKS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_P, PATCH_H * PATCH_W * BLOCK_C] of patches, their first pixels given.

    num_products is (PATCH_H - 1 + KERNEL_SIZE) * CHUNKS, not to be unrolled.
    """
    p_x += (block.to(tl.int64) * B + b) * (H * W * BLOCK_C)
    o_jc, o_o = tl.arange(0, BLOCK_J * BLOCK_C)[:, None], tl.arange(0, PATCH_H * PATCH_W * BLOCK_C)[None, :]
    o_row, o_xc = o_o // (PATCH_W * BLOCK_C), o_o % (PATCH_W * BLOCK_C)
    p_weight += block.to(tl.int64) * (KERNEL_SIZE * CHUNKS * BLOCK_J * BLOCK_C * PATCH_W * BLOCK_C)
    b_sum = tl.zeros([BLOCK_P, PATCH_H * PATCH_W * BLOCK_C], dtype=tl.float32)
    for product in range(num_products):
        row, chunk = product // CHUNKS, product % CHUNKS
        y = o_y + (row - KERNEL_SIZE // 2) * DILATION
        b_x = _neighbours(p_x, y, o_x, chunk, H, W, KERNEL_SIZE, DILATION, BLOCK_C, BLOCK_J)
        o_i = row - o_row  # for a patch's row the row of taps that meets this one
        o_weight = ((o_i * CHUNKS + chunk) * (BLOCK_J * BLOCK_C) + o_jc) * (PATCH_W * BLOCK_C) + o_xc
        b_weight = tl.load(p_weight + o_weight, mask=(o_i >= 0) & (o_i < KERNEL_SIZE), other=0.0)
        # [BLOCK_P, BLOCK_J * BLOCK_C] @ [BLOCK_J * BLOCK_C, PATCH_H * PATCH_W * BLOCK_C]
        b_sum = tl.dot(b_x, b_weight, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def _patches(first, B, H, W, DILATION: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
             BLOCK_P: tl.constexpr):
    """[BLOCK_P, 1] each: samples, rows and columns of the first pixels of the patches from `first` on.

    Patches reach over the right and lower edge; those behind the last one lie below the last sample.
    """
    # Unsigned numbers are divided in half the instructions.
    o_n = tl.cast(first + tl.arange(0, BLOCK_P)[:, None], tl.uint32)
    num_y = tl.cast(tl.cdiv(H, PATCH_H * DILATION) * DILATION, tl.uint32)
    num_x = tl.cast(tl.cdiv(W, PATCH_W * DILATION) * DILATION, tl.uint32)
    b, o_y = tl.cast(o_n // num_x // num_y, tl.int32), tl.cast(o_n // num_x % num_y, tl.int32)
    o_x = tl.cast(o_n % num_x, tl.int32)
    o_y = o_y // DILATION * (PATCH_H * DILATION) + o_y % DILATION
    o_x = o_x // DILATION * (PATCH_W * DILATION) + o_x % DILATION
    return tl.minimum(b, B - 1).to(tl.int64), tl.where(b < B, o_y, H), o_x


@triton.jit
def _pixels(o_y, o_x, DILATION: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and columns of all pixels of patches, their first ones given, and channels in a block."""
    o = tl.arange(0, PATCH_H * PATCH_W * BLOCK_C)[None, :]
    return o_y + o // (PATCH_W * BLOCK_C) * DILATION, o_x + o // BLOCK_C % PATCH_W * DILATION, o % BLOCK_C


@triton.jit
def _neighbours(p_x, o_y, o_x, chunk, H, W, KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, BLOCK_C: tl.constexpr,
                BLOCK_J: tl.constexpr):
    """[BLOCK_P, BLOCK_J * BLOCK_C]: of rows o_y a chunk of the neighbours of o_x and what is right of it, else 0."""
    o = tl.arange(0, BLOCK_J * BLOCK_C)[None, :]
    x = o_x + (chunk * BLOCK_J + o // BLOCK_C - KERNEL_SIZE // 2) * DILATION
    mask = (o_y >= 0) & (o_y < H) & (x >= 0) & (x < W)
    return tl.load(p_x + ((o_y * W + x) * BLOCK_C + o % BLOCK_C), mask=mask, other=0.0)
