"""What the aggregation's kernels are built of: strips of pixels, a window that walks along them, softmax and filters.

A strip is STRIP neighbouring pixels of a row, 1 or 4, and a program has BLOCK_S strips. What differs from pixel to
pixel of a strip is a tuple of STRIP tiles. The letters are those of kernels/__init__.py.
"""
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 takes fewer instructions than exp


@triton.jit
def strips(H, W, STRIP: tl.constexpr, BLOCK_S: tl.constexpr, EVERY_PIXEL: tl.constexpr):
    """The program's sample and head; rows and columns of each strip's first pixel, [BLOCK_S].

    With EVERY_PIXEL those of all pixels, [BLOCK_S * STRIP].
    """
    per_row = (W + STRIP - 1) // STRIP
    num_tiles = (H * per_row + BLOCK_S - 1) // BLOCK_S
    first = tl.program_id(0) % num_tiles * BLOCK_S
    b = (tl.program_id(0) // num_tiles).to(tl.int64)
    if EVERY_PIXEL:
        o_p = tl.arange(0, BLOCK_S * STRIP)
        o_s = first + o_p // STRIP
        o_y, o_x = o_s // per_row, o_s % per_row * STRIP + o_p % STRIP
    else:
        o_s = first + tl.arange(0, BLOCK_S)
        o_y, o_x = o_s // per_row, o_s % per_row * STRIP
    return b, tl.program_id(1), o_y, o_x


@triton.jit
def sum_over_taps(b_out, p_v, p_logits, p_mul, p_add, b_max, b_log, m_p, o_y, o_x, o_d, m_d, H, W, Ho, C, num_rows,
                  s_vy, s_vx, s_lc, s_lp,
                  KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
                  ATTENTION: tl.constexpr, NORMALIZE: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr,
                  ACC: tl.constexpr, STRIP: tl.constexpr):
    """b_out, STRIP tiles [BLOCK_S, BLOCK_D], plus filter times v, summed over the taps.

    A window of STRIP pixels of v advances by one pixel a tap: so a pixel is loaded and converted once for up to STRIP
    taps, and so is a filter.
    """
    for i in range(num_rows):
        p_row, m_y = row_of_window(p_v, o_y, o_x, o_d, i, H, Ho, s_vy, s_vx, KERNEL_SIZE, DILATION, STRIDE)
        b_v = (b_out[0],)  # this tile leaves the window before it is used
        for column in tl.static_range(STRIP - 1 + KERNEL_SIZE):
            b_v = b_v + (load_pixel(p_row, o_x * STRIDE, column - KERNEL_SIZE // 2, DILATION, s_vx, W, m_y, m_d, ACC),)
            if column >= STRIP - 1:  # the window is full: of tap j = column - (STRIP - 1)
                b_v = b_v[1:]
                t = i * KERNEL_SIZE + column - (STRIP - 1)
                b_mul, b_add = load_ghosts(p_mul, p_add, m_d, t * C, MUL, ADD, ACC)
                for p in tl.static_range(STRIP):
                    p_l = p_logits + t * s_lc + p * s_lp
                    b_f = load_filter(p_l, b_mul, b_add, b_max[p], b_log[p], m_p[p],
                                      ATTENTION, NORMALIZE, MUL, ADD, ACC)
                    # [BLOCK_S, BLOCK_D] * [1 or BLOCK_S, 1 or BLOCK_D] -> [BLOCK_S, BLOCK_D]
                    b_out = b_out[:p] + (b_out[p] + b_v[p] * b_f,) + b_out[p + 1:]
    return b_out


@triton.jit
def row_of_window(p_v, o_y, o_x, o_d, i, H, Ho, s_vy, s_vx,
                  KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr):
    """Pointers [BLOCK_S, BLOCK_D] to where row i of the window has the column of its centre; is there such a row?"""
    o_vy = o_y * STRIDE + (i - KERNEL_SIZE // 2) * DILATION
    p_row = (p_v + o_vy * s_vy + o_x * STRIDE * s_vx)[:, None] + o_d[None, :]
    return p_row, (o_y < Ho) & (o_vy >= 0) & (o_vy < H)


@triton.jit
def load_pixel(p_row, o_x, column, DILATION: tl.constexpr, s_x, W, m_y, m_d, ACC: tl.constexpr):
    """The pixel `column` steps of DILATION from o_x of each strip: [BLOCK_S, BLOCK_D]."""
    o_vx = o_x + column * DILATION
    m_v = m_y & (o_vx >= 0) & (o_vx < W)
    return tl.load(p_row + column * DILATION * s_x, mask=m_v[:, None] & m_d[None, :], other=0.0).to(ACC)


@triton.jit
def reading_pixel(o_out_y, o_x, column: tl.constexpr, m_y, Wo, DILATION: tl.constexpr, STRIDE: tl.constexpr):
    """The output pixel `column` steps of DILATION to the right: its offset, [BLOCK_S] plus a number; is there one?"""
    o_out_x = o_x + column * DILATION
    if STRIDE == 1:
        return o_out_y * Wo + o_x, column * DILATION, m_y & (o_out_x >= 0) & (o_out_x < Wo)
    else:
        m_out = m_y & (o_out_x >= 0) & (o_out_x % STRIDE == 0) & (o_out_x // STRIDE < Wo)
        return o_out_y * Wo + o_out_x // STRIDE, 0, m_out


@triton.jit
def log_sum_exp(p_logits, s_lc, s_lp, p_lse, Ho, Wo, num_rows,
                KERNEL_SIZE: tl.constexpr, STRIP: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr):
    """The largest logit of each pixel and log2(sum_t exp(logits[t] - largest)): stored, and STRIP tiles [BLOCK_S] each.

    Row by row with a running maximum. As one number, their sum, they would lose the logarithm beside a large logit.
    """
    _, _, o_y, o_x = strips(Ho, Wo, STRIP, BLOCK_S, True)  # every pixel, so that no two threads take the same one
    m_p = (o_y < Ho) & (o_x < Wo)
    p_row = p_logits + (o_y * Wo + o_x) * s_lp
    b_max = tl.full([BLOCK_S * STRIP], -float("inf"), dtype=ACC)
    b_sum = tl.zeros([BLOCK_S * STRIP], dtype=ACC)
    for i in range(num_rows):
        b_row = ()
        b_new = b_max
        for j in tl.static_range(KERNEL_SIZE):
            b_row = b_row + (tl.load(p_row + j * s_lc, mask=m_p, other=0.0).to(ACC),)
            b_new = tl.maximum(b_new, b_row[j])
        # Of nothing but -inf, every attention is zero so far, not NaN.
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum *= tl.exp2((b_max - b_shift) * LOG2E)
        for j in tl.static_range(KERNEL_SIZE):
            b_sum += tl.exp2((b_row[j] - b_shift) * LOG2E)
        b_max = b_new
        p_row += KERNEL_SIZE * s_lc
    b_log = tl.log2(b_sum)
    p_lse += o_y * Wo + o_x
    tl.store(p_lse, b_max, mask=m_p)
    tl.store(p_lse + Ho * Wo, b_log, mask=m_p)
    return _unstack(b_max, STRIP, BLOCK_S), _unstack(b_log, STRIP, BLOCK_S)


@triton.jit
def load_log_sum_exp(p_lse, pixels, m_p):
    """What log_sum_exp stored, [BLOCK_S] each. pixels: of the image, Ho * Wo."""
    return tl.load(p_lse, mask=m_p, other=0.0), tl.load(p_lse + pixels, mask=m_p, other=0.0)


@triton.jit
def _unstack(x, STRIP: tl.constexpr, BLOCK_S: tl.constexpr):
    """[BLOCK_S * STRIP] -> STRIP tiles [BLOCK_S]."""
    if STRIP == 1:
        return (x,)
    else:  # 4
        even, odd = tl.split(tl.reshape(x, [BLOCK_S, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def load_attention(p_l, b_max, b_log, m_p, NORMALIZE: tl.constexpr, ACC: tl.constexpr):
    """a of one tap, [BLOCK_S].

    Only the difference is scaled: a logit alone, times LOG2E, is beyond float32 where it is the least of its type.
    """
    b_a = tl.load(p_l, mask=m_p, other=0.0).to(ACC)
    if NORMALIZE:
        b_a = tl.exp2((b_a - b_max) * LOG2E - b_log)
    return b_a


@triton.jit
def load_ghosts(p_mul, p_add, m_d, offset, MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr):
    """One tap of both ghost filters, [1, BLOCK_D] each."""
    b_mul, b_add = 1.0, 0.0
    if MUL:
        b_mul = tl.load(p_mul + offset, mask=m_d, other=0.0).to(ACC)[None, :]
    if ADD:
        b_add = tl.load(p_add + offset, mask=m_d, other=0.0).to(ACC)[None, :]
    return b_mul, b_add


@triton.jit
def load_filter(p_l, b_mul, b_add, b_max, b_log, m_p, ATTENTION: tl.constexpr, NORMALIZE: tl.constexpr,
                MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr):
    """One tap of the combined filter f = a * mul + add, broadcastable to [BLOCK_S, BLOCK_D]."""
    b_f = b_add
    if ATTENTION:
        b_f = load_attention(p_l, b_max, b_log, m_p, NORMALIZE, ACC)[:, None]
        if MUL:
            b_f = b_f * b_mul  # [BLOCK_S, 1] * [1, BLOCK_D] -> [BLOCK_S, BLOCK_D]
        if ADD:
            b_f = b_f + b_add
    return b_f
