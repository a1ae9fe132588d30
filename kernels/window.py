"""What the aggregation's kernels are built of: strips of pixels, a window that walks along them, softmax and filters.

A strip is STRIP neighbouring pixels of a row, 1 or 4, and a program has BLOCK_S strips of a group of samples. What
differs from pixel to pixel of a strip is a tuple of STRIP tiles.

No row is shorter than a strip. The last one of a row ends with the row, and has pixels of the strip before, which
counts them; behind a group's last strip that strip comes again. So all pixels of a program exist, and only stores
need masks. Pointers walk along the taps: a product a tap is more instructions.

The letters are those of kernels/__init__.py.
"""
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 takes fewer instructions than exp


@triton.jit
def strips(B, num_samples, H, W, STRIP: tl.constexpr, BLOCK_S: tl.constexpr, EVERY_PIXEL: tl.constexpr):
    """The first sample of the program's group of num_samples; of its strips, [BLOCK_S] each, the sample, the row and
    column of the first pixel, and the first column that counts, which behind the group's last strip is W.

    With EVERY_PIXEL row and column of all pixels, all [BLOCK_S * STRIP].
    """
    per_row = (W + STRIP - 1) // STRIP
    per_sample = H * per_row
    num_tiles = (num_samples * per_sample + BLOCK_S - 1) // BLOCK_S
    first_b = tl.program_id(0) // num_tiles * num_samples
    last = tl.minimum(num_samples, B - first_b) * per_sample - 1
    o_p = tl.arange(0, BLOCK_S * STRIP if EVERY_PIXEL else BLOCK_S)
    o_s = tl.program_id(0) % num_tiles * BLOCK_S + (o_p // STRIP if EVERY_PIXEL else o_p)
    m_s = o_s <= last
    o_s = tl.minimum(o_s, last)
    b = (first_b + o_s // per_sample).to(tl.int64)
    o_s = o_s % per_sample
    o_y, o_new = o_s // per_row, o_s % per_row * STRIP
    o_x = tl.minimum(o_new, W - STRIP)
    if EVERY_PIXEL:
        o_x += o_p % STRIP
    return first_b.to(tl.int64), b, o_y, o_x, tl.where(m_s, o_new, W)


@triton.jit
def both(m_p, m_d):
    """Masks of strips, [BLOCK_S], and of channels, [BLOCK_D] or None for all, as one for [BLOCK_S, BLOCK_D]."""
    if m_d is None:
        m = m_p[:, None]
    else:
        m = m_p[:, None] & m_d[None, :]
    return m


@triton.jit
def inside(o, size):
    """0 <= o < size, in one comparison: as unsigned numbers, those below 0 are large."""
    return o.to(tl.uint32) < size


@triton.jit
def load_channels(p, m_p, m_d, ACC: tl.constexpr, PAIRS: tl.constexpr):
    """[BLOCK_S, BLOCK_D] in ACC, zero where masked.

    With PAIRS of bfloat16, each becomes float32 by one instruction, where the compiler takes three for two.
    """
    x = tl.load(p, mask=both(m_p, m_d), other=0.0)
    if PAIRS:
        x = tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
                                      dtype=tl.float32, is_pure=True, pack=2)
    else:
        x = x.to(ACC)
    return x


@triton.jit
def sum_over_taps(b_out, p_v, p_logits, p_mul, p_add, b_max, b_log, o_y, o_x, o_d, m_d, H, W, C, num_rows,
                  s_vy, s_vx, s_lc, s_lp,
                  KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
                  ATTENTION: tl.constexpr, NORMALIZE: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr,
                  ACC: tl.constexpr, PAIRS: tl.constexpr, STRIP: tl.constexpr):
    """b_out, STRIP tiles [BLOCK_S, BLOCK_D], plus filter times v, summed over the taps.

    A window of STRIP pixels of v advances by one pixel a tap: so a pixel is loaded and converted once for up to STRIP
    taps, and so is a filter.
    """
    p_row, o_vy, o_vx = corner_of_window(p_v, o_y, o_x, o_d, s_vy, s_vx, KERNEL_SIZE, DILATION, STRIDE)
    for i in range(num_rows):
        b_v, p_pixel = (b_out[0],), p_row  # this tile leaves the window before it is used
        for column in tl.static_range(STRIP - 1 + KERNEL_SIZE):
            m_v = inside(o_vy, H) & inside(o_vx + column * DILATION, W)
            b_v = b_v + (load_channels(p_pixel, m_v, m_d, ACC, PAIRS),)
            p_pixel += DILATION * s_vx
            if column >= STRIP - 1:  # the window is full: of tap j = column - (STRIP - 1)
                b_v = b_v[1:]
                b_mul, b_add = load_ghosts(p_mul, p_add, m_d, MUL, ADD)
                for p in tl.static_range(STRIP):
                    b_f = load_filter(p_logits + p * s_lp, None, b_mul, b_add, b_max[p], b_log[p],
                                      ATTENTION, NORMALIZE, MUL, ADD, ACC)
                    # [BLOCK_S, BLOCK_D] * [1 or BLOCK_S, 1 or BLOCK_D] -> [BLOCK_S, BLOCK_D]
                    b_out = replaced(b_out, p, b_out[p] + b_v[p] * b_f)
                p_logits, p_mul, p_add = p_logits + s_lc, p_mul + C, p_add + C
        p_row, o_vy = p_row + DILATION * s_vy, o_vy + DILATION
    return b_out


@triton.jit
def replaced(tiles, place: tl.constexpr, tile):
    """A tuple of tiles with another one in this place."""
    return tiles[:place] + (tile,) + tiles[place + 1:]


@triton.jit
def corner_of_window(p_v, o_y, o_x, o_d, s_vy, s_vx,
                     KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr):
    """Pointers [BLOCK_S, BLOCK_D] to the window's first row and column, which may be outside; both, [BLOCK_S]."""
    o_vy = o_y * STRIDE - KERNEL_SIZE // 2 * DILATION
    o_vx = o_x * STRIDE - KERNEL_SIZE // 2 * DILATION
    return (p_v + o_vy * s_vy + o_vx * s_vx)[:, None] + o_d[None, :], o_vy, o_vx


@triton.jit
def reading_pixel(p_go, p_lse, p_logits, o_out, o_d, C, s_lp):
    """Pointers to go, lse and logits of output pixels o_out, [BLOCK_S]: [BLOCK_S, BLOCK_D], [BLOCK_S], [BLOCK_S]."""
    return (p_go + o_out * C)[:, None] + o_d[None, :], p_lse + o_out, p_logits + o_out * s_lp


@triton.jit
def log_sum_exp(p_logits, p_lse, B, num_samples, Ho, Wo, G, num_rows, s_lb, s_lc, s_lp,
                KERNEL_SIZE: tl.constexpr, STRIP: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr):
    """Of each pixel the largest logit and -log2(sum_t exp(logits[t] - largest)): stored, and STRIP tiles [BLOCK_S].

    Row by row with a running maximum. As one number, their sum, they would lose the logarithm beside a large logit.
    A thread takes a pixel, where one takes a strip elsewhere.
    """
    _, b, o_y, o_x, o_new = strips(B, num_samples, Ho, Wo, STRIP, BLOCK_S, True)
    g = tl.program_id(1)
    p_row = p_logits + b * s_lb + g * (KERNEL_SIZE * KERNEL_SIZE) * s_lc + (o_y * Wo + o_x) * s_lp
    b_max = tl.full([BLOCK_S * STRIP], -float("inf"), dtype=ACC)
    b_sum = tl.zeros([BLOCK_S * STRIP], dtype=ACC)
    for i in range(num_rows):
        b_row = ()
        b_new = b_max
        for j in tl.static_range(KERNEL_SIZE):
            b_row = b_row + (tl.load(p_row + j * s_lc).to(ACC),)
            b_new = tl.maximum(b_new, b_row[j])
        # Of nothing but -inf, every attention is zero so far, not NaN.
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum *= tl.exp2((b_max - b_shift) * LOG2E)
        for j in tl.static_range(KERNEL_SIZE):
            b_sum += tl.exp2((b_row[j] - b_shift) * LOG2E)
        b_max = b_new
        p_row += KERNEL_SIZE * s_lc
    b_log = -tl.log2(b_sum)
    p_lse += (b * G + g) * (2 * Ho * Wo) + o_y * Wo + o_x
    tl.store(p_lse, b_max, mask=o_x >= o_new)
    tl.store(p_lse + Ho * Wo, b_log, mask=o_x >= o_new)
    b_max, b_log = tl.reshape(b_max, [BLOCK_S, STRIP]), tl.reshape(b_log, [BLOCK_S, STRIP])
    return columns(b_max, STRIP), columns(b_log, STRIP)


@triton.jit
def load_log_sum_exp(p_lse, pixels, m_p):
    """What log_sum_exp stored, [BLOCK_S] each. pixels: of the image, Ho * Wo. m_p: as load_attention's."""
    other: tl.constexpr = None if m_p is None else 0.0
    return tl.load(p_lse, mask=m_p, other=other), tl.load(p_lse + pixels, mask=m_p, other=other)


@triton.jit
def columns(x, N: tl.constexpr):
    """[M, N] -> N tiles [M]; N is a power of two."""
    if N == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], N // 2, 2]))
        even, odd, tiles = columns(even, N // 2), columns(odd, N // 2), ()
        for n in tl.static_range(N // 2):
            tiles = tiles + (even[n], odd[n])
        return tiles


@triton.jit
def load_attention(p_l, m_p, b_max, b_log, NORMALIZE: tl.constexpr, ACC: tl.constexpr):
    """a of one tap, [BLOCK_S]. m_p: where there is such a pixel, None: everywhere.

    Only the difference is scaled: a logit alone, times LOG2E, is beyond float32 where it is the least of its type.
    """
    other: tl.constexpr = None if m_p is None else 0.0
    b_a = tl.load(p_l, mask=m_p, other=other).to(ACC)
    if NORMALIZE:
        b_a = tl.exp2((b_a - b_max) * LOG2E + b_log)
    return b_a


@triton.jit
def load_ghosts(p_mul, p_add, m_d, MUL: tl.constexpr, ADD: tl.constexpr):
    """One tap of both ghost filters, [1, BLOCK_D] each."""
    other: tl.constexpr = None if m_d is None else 0.0
    b_mul, b_add = 1.0, 0.0
    if MUL:
        b_mul = tl.load(p_mul, mask=m_d, other=other)[None, :]
    if ADD:
        b_add = tl.load(p_add, mask=m_d, other=other)[None, :]
    return b_mul, b_add


@triton.jit
def load_filter(p_l, m_p, b_mul, b_add, b_max, b_log, ATTENTION: tl.constexpr, NORMALIZE: tl.constexpr,
                MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr):
    """One tap of the combined filter f = a * mul + add, broadcastable to [BLOCK_S, BLOCK_D]."""
    b_f = b_add
    if ATTENTION:
        b_f = load_attention(p_l, m_p, b_max, b_log, NORMALIZE, ACC)[:, None]
        if MUL:
            b_f = b_f * b_mul  # [BLOCK_S, 1] * [1, BLOCK_D] -> [BLOCK_S, BLOCK_D]
        if ADD:
            b_f = b_f + b_add
    return b_f
