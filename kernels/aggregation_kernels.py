"""ELSA's aggregation in Triton: one forward kernel, three backward kernels; aggregation.py launches them.

A program computes BLOCK_S strips of one head. It walks over the rows of the window in a loop and over its
columns unrolled, see window.py. Sums are float32 (float64 for float64 input). Nothing is added atomically: dv gathers
from the output pixels that read it, and the filters' gradients are partial sums, one per program.

Inside one sample offsets are 32-bit, from sample to sample 64-bit. num_rows is KERNEL_SIZE once more, as a number that
the compiler does not know: otherwise it unrolls short loops over rows as well, and runs out of registers.
"""
import triton
import triton.language as tl

from .window import (
    both,
    columns,
    corner_of_window,
    inside,
    load_attention,
    load_channels,
    load_filter,
    load_ghosts,
    load_log_sum_exp,
    log_sum_exp,
    reading_pixel,
    replaced,
    strips,
    sum_over_taps,
)


@triton.jit
def forward_kernel(p_v, p_logits, p_mul, p_add, p_out, p_lse,
                   B, num_samples, H, W, Ho, Wo, G, num_rows, s_vb, s_vy, s_vx, s_lb, s_lc, s_lp, s_mul, s_add,
                   KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ATTENTION: tl.constexpr, NORMALIZE: tl.constexpr,
                   MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, PAIRS: tl.constexpr,
                   STRIP: tl.constexpr, BLOCK_S: tl.constexpr):
    """out (B, Ho, Wo, C) and, with NORMALIZE, the softmax's log-sum-exp in two parts, lse (B, G, 2, Ho * Wo).

        max    = max_t logits[b, g, t, y, x]                                   for each b, g and output pixel (y, x)
        log    = -log2 sum_t exp(logits[b, g, t, y, x] - max)
        a[t]   = exp(logits[b, g, t, y, x] - max) * 2**log                     (K,)
        f[t]   = a[t] * mul[t] + add[t]                                        (K, HEAD_DIM), of head g
        out    = sum over t = (i, j) of f[t] * v[b, y * STRIDE + (i-r) * DILATION, x * STRIDE + (j-r) * DILATION, g]
    """
    first_b, b, o_y, o_x, o_new = strips(B, num_samples, Ho, Wo, STRIP, BLOCK_S, False)
    g = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = None if HEAD_DIM == BLOCK_D else o_d < HEAD_DIM
    o_p = o_y * Wo + o_x  # of each strip's first pixel
    C = G * HEAD_DIM

    b_max = ()
    b_out = ()
    for p in tl.static_range(STRIP):
        b_out = b_out + (tl.zeros([BLOCK_S, BLOCK_D], dtype=ACC),)
        b_max = b_max + (tl.zeros([BLOCK_S], dtype=ACC),)
    b_log = b_max
    if NORMALIZE:
        b_max, b_log = log_sum_exp(p_logits, p_lse, B, num_samples, Ho, Wo, G, num_rows, s_lb, s_lc, s_lp,
                                   KERNEL_SIZE, STRIP, BLOCK_S, ACC)

    p_l = p_logits + b * s_lb + g * (KERNEL_SIZE * KERNEL_SIZE) * s_lc + o_p * s_lp  # [BLOCK_S]
    p_v += b * s_vb + g * HEAD_DIM
    p_mul += first_b * s_mul + g * HEAD_DIM + o_d
    p_add += first_b * s_add + g * HEAD_DIM + o_d
    b_out = sum_over_taps(b_out, p_v, p_l, p_mul, p_add, b_max, b_log, o_y, o_x, o_d, m_d, H, W, C, num_rows,
                          s_vy, s_vx, s_lc, s_lp,
                          KERNEL_SIZE, DILATION, STRIDE, ATTENTION, NORMALIZE, MUL, ADD, ACC, PAIRS, STRIP)
    for p in tl.static_range(STRIP):
        p_o = (p_out + b * (Ho * Wo * C) + g * HEAD_DIM + (o_p + p) * C)[:, None] + o_d[None, :]
        tl.store(p_o, b_out[p], mask=both(o_x + p >= o_new, m_d))


@triton.jit
def dv_kernel(p_go, p_logits, p_mul, p_add, p_lse, p_dv,
              B, num_samples, H, W, Ho, Wo, G, num_rows, s_lb, s_lc, s_lp, s_mul, s_add,
              KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ATTENTION: tl.constexpr, NORMALIZE: tl.constexpr,
              MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, PAIRS: tl.constexpr,
              STRIP: tl.constexpr, BLOCK_S: tl.constexpr):
    """dv (B, H, W, C): each input pixel gathers from the output pixels that read it.

        y', x' = (y - (i-r) * DILATION) / STRIDE, (x - (j-r) * DILATION) / STRIDE     where whole and in the output
        f[t]   = a[b, g, t, y', x'] * mul[t] + add[t], a as in the forward pass       (K, HEAD_DIM), of head g
        dv     = sum over t = (i, j) of f[t] * go[b, y', x', g]                       for each b, g, input pixel (y, x)

    The window is that of the forward pass, mirrored: from left to right its pixels read (y, x) as the last tap first.
    """
    first_b, b, o_y, o_x, o_new = strips(B, num_samples, H, W, STRIP, BLOCK_S, False)
    g = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = None if HEAD_DIM == BLOCK_D else o_d < HEAD_DIM
    C = G * HEAD_DIM

    p_logits += b * s_lb + g * (KERNEL_SIZE * KERNEL_SIZE) * s_lc
    p_lse += (b * G + g) * (2 * Ho * Wo)
    p_go += b * (Ho * Wo * C) + g * HEAD_DIM
    p_mul += first_b * s_mul + g * HEAD_DIM + o_d
    p_add += first_b * s_add + g * HEAD_DIM + o_d
    b_dv = ()
    for p in tl.static_range(STRIP):
        b_dv = b_dv + (tl.zeros([BLOCK_S, BLOCK_D], dtype=ACC),)
    for i in range(num_rows):
        o_out_y = o_y - (i - KERNEL_SIZE // 2) * DILATION
        m_y = inside(o_out_y // STRIDE, Ho)
        if STRIDE > 1:
            m_y &= o_out_y % STRIDE == 0
            o_out_y = o_out_y // STRIDE
        # The window; these tiles leave it before they are used.
        b_go, b_max, m_out = (b_dv[0],), (tl.zeros([BLOCK_S], dtype=ACC),), (m_y,)
        b_log = b_max
        t = (i + 1) * KERNEL_SIZE - 1  # the row's last tap
        p_m, p_a = p_mul + t * C, p_add + t * C
        o_out = o_out_y * Wo + o_x - KERNEL_SIZE // 2 * DILATION
        p_g, p_s, p_l = reading_pixel(p_go, p_lse, p_logits + t * s_lc, o_out, o_d, C, s_lp)
        for column in tl.static_range(STRIP - 1 + KERNEL_SIZE):
            o_out_x = o_x + (column - KERNEL_SIZE // 2) * DILATION
            m_new = m_y & inside(o_out_x // STRIDE, Wo)
            if STRIDE > 1:  # and STRIP 1
                m_new &= o_out_x % STRIDE == 0
                o_out_x = o_out_x // STRIDE
                o_out = o_out_y * Wo + o_out_x
                p_g, p_s, p_l = reading_pixel(p_go, p_lse, p_logits + (t - column) * s_lc, o_out, o_d, C, s_lp)
            b_go, m_out = b_go + (load_channels(p_g, m_new, m_d, ACC, PAIRS),), m_out + (m_new,)
            if NORMALIZE:
                b_m, b_l = load_log_sum_exp(p_s, Ho * Wo, m_new)
                b_max, b_log = b_max + (b_m,), b_log + (b_l,)
            else:
                b_max, b_log = b_max + (b_max[0],), b_log + (b_log[0],)
            if column >= STRIP - 1:  # the window is full: of tap j = KERNEL_SIZE - 1 - (column - (STRIP - 1))
                b_go, b_max, b_log, m_out = b_go[1:], b_max[1:], b_log[1:], m_out[1:]
                b_mul, b_add = load_ghosts(p_m, p_a, m_d, MUL, ADD)
                for p in tl.static_range(STRIP):
                    b_f = load_filter(p_l + (p - (STRIP - 1)) * s_lp, m_out[p], b_mul, b_add, b_max[p], b_log[p],
                                      ATTENTION, NORMALIZE, MUL, ADD, ACC)
                    # [BLOCK_S, BLOCK_D] * [1 or BLOCK_S, 1 or BLOCK_D] -> [BLOCK_S, BLOCK_D]
                    b_dv = replaced(b_dv, p, b_dv[p] + b_go[p] * b_f)
                p_l, p_m, p_a = p_l - s_lc, p_m - C, p_a - C
            p_g, p_s, p_l = p_g + DILATION * C, p_s + DILATION, p_l + DILATION * s_lp
    for p in tl.static_range(STRIP):
        p_o = (p_dv + b * (H * W * C) + g * HEAD_DIM + (o_y * W + o_x + p) * C)[:, None] + o_d[None, :]
        tl.store(p_o, b_dv[p], mask=both(o_x + p >= o_new, m_d))


@triton.jit
def dlogits_kernel(p_v, p_go, p_logits, p_mul, p_lse, p_dlogits,
                   B, num_samples, H, W, Ho, Wo, G, num_rows, s_vb, s_vy, s_vx, s_lb, s_lc, s_lp, s_db, s_dc, s_dp,
                   s_mul,
                   KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr,
                   MUL: tl.constexpr, ACC: tl.constexpr, PAIRS: tl.constexpr,
                   STRIP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, ALL: tl.constexpr):
    """dlogits, laid out as logits are.

        a[t]       = as in the forward pass                                    for each b, g and output pixel (y, x)
        da[t]      = sum over the head's channels of go * v(tap t) * mul[t]    (K,)
        dlogits[t] = a[t] * (da[t] - sum_t a[t] * da[t])                       (K,); without NORMALIZE da[t]

    A sum over channels ends in every thread that has some of them. Each keeps it for one of its strip's pixels, so that
    with heads of 32 channels a thread ends up with all taps of one pixel. With ALL, of windows that are not too long,
    all of da stays in registers; else a first walk over the window is for the sum over t alone.
    """
    first_b, b, o_y, o_x, o_new = strips(B, num_samples, Ho, Wo, STRIP, BLOCK_S, False)
    g = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = None if HEAD_DIM == BLOCK_D else o_d < HEAD_DIM
    o_p = o_y * Wo + o_x
    C = G * HEAD_DIM

    p_v += b * s_vb + g * HEAD_DIM
    p_mul += first_b * s_mul + g * HEAD_DIM + o_d
    b_go = ()
    for p in tl.static_range(STRIP):
        p_g = (p_go + b * (Ho * Wo * C) + g * HEAD_DIM + (o_p + p) * C)[:, None] + o_d[None, :]
        b_go = b_go + (load_channels(p_g, o_y >= 0, m_d, ACC, PAIRS),)  # all of them
    p_first, o_first, o_vx = corner_of_window(p_v, o_y, o_x, o_d, s_vy, s_vx, KERNEL_SIZE, DILATION, STRIDE)

    _, b, o_y, o_x, o_new = strips(B, num_samples, Ho, Wo, STRIP, BLOCK_S, True)
    m_p, o_p = o_x >= o_new, o_y * Wo + o_x
    p_logits += b * s_lb + g * (KERNEL_SIZE * KERNEL_SIZE) * s_lc + o_p * s_lp
    p_dl = p_dlogits + b * s_db + g * (KERNEL_SIZE * KERNEL_SIZE) * s_dc + o_p * s_dp
    b_inner, b_max, b_log = tl.zeros([BLOCK_S * STRIP], dtype=ACC), (), ()
    if ALL:
        b_da = ()
        for row in tl.static_range(KERNEL_SIZE):
            b_da = b_da + (tl.zeros([BLOCK_S, STRIP * BLOCK_T], dtype=ACC),)
        p_row, p_m, o_vy = p_first, p_mul, o_first
        for i in range(num_rows):
            b_row = sums_over_channels(p_row, p_m, b_go, inside(o_vy, H), o_vx, m_d, W, C, s_vx,
                                       KERNEL_SIZE, DILATION, MUL, ACC, PAIRS, STRIP, BLOCK_S, BLOCK_T)
            for row in tl.static_range(KERNEL_SIZE):
                b_da = replaced(b_da, row, tl.where(i == row, b_row, b_da[row]))
            p_row, p_m, o_vy = p_row + DILATION * s_vy, p_m + KERNEL_SIZE * C, o_vy + DILATION
        if NORMALIZE:
            b_max, b_log = load_log_sum_exp(p_lse + (b * G + g) * (2 * Ho * Wo) + o_p, Ho * Wo, None)
        b_a, b_dl = (), ()
        for row in tl.static_range(KERNEL_SIZE):
            b_row = columns(tl.reshape(b_da[row], [BLOCK_S * STRIP, BLOCK_T]), BLOCK_T)
            for j in tl.static_range(KERNEL_SIZE):
                b_dl = b_dl + (b_row[j],)
                if NORMALIZE:
                    b_a = b_a + (load_attention(p_logits, None, b_max, b_log, True, ACC),)
                    b_inner += b_a[row * KERNEL_SIZE + j] * b_row[j]
                    p_logits += s_lc
        for t in tl.static_range(KERNEL_SIZE * KERNEL_SIZE):
            tl.store(p_dl, b_a[t] * (b_dl[t] - b_inner) if NORMALIZE else b_dl[t], mask=m_p)
            p_dl += s_dc
    else:
        if NORMALIZE:
            b_max, b_log = load_log_sum_exp(p_lse + (b * G + g) * (2 * Ho * Wo) + o_p, Ho * Wo, None)
        for walk in tl.static_range(0 if NORMALIZE else 1, 2):
            p_row, p_m, p_l, o_vy = p_first, p_mul, p_logits, o_first
            for i in range(num_rows):
                b_row = sums_over_channels(p_row, p_m, b_go, inside(o_vy, H), o_vx, m_d, W, C, s_vx,
                                           KERNEL_SIZE, DILATION, MUL, ACC, PAIRS, STRIP, BLOCK_S, BLOCK_T)
                b_row = columns(tl.reshape(b_row, [BLOCK_S * STRIP, BLOCK_T]), BLOCK_T)
                for j in tl.static_range(KERNEL_SIZE):
                    b_dl = b_row[j]
                    if NORMALIZE:
                        b_a = load_attention(p_l, None, b_max, b_log, True, ACC)
                        b_dl = b_a * (b_dl - b_inner)
                    if walk == 0:
                        b_inner += b_a * b_row[j]
                    else:
                        tl.store(p_dl, b_dl, mask=m_p)
                        p_dl += s_dc
                    p_l += s_lc
                p_row, p_m, o_vy = p_row + DILATION * s_vy, p_m + KERNEL_SIZE * C, o_vy + DILATION


@triton.jit
def sums_over_channels(p_row, p_mul, b_go, m_y, o_vx, m_d, W, C, s_vx,
                       KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, MUL: tl.constexpr, ACC: tl.constexpr,
                       PAIRS: tl.constexpr, STRIP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr):
    """da of a row of taps: [BLOCK_S, STRIP * BLOCK_T], pixel by pixel of each strip, and tap by tap."""
    o_slot = tl.arange(0, STRIP * BLOCK_T)
    b_da = tl.zeros([BLOCK_S, STRIP * BLOCK_T], dtype=ACC)
    b_v = (b_go[0],)  # the window, as in sum_over_taps
    for column in tl.static_range(STRIP - 1 + KERNEL_SIZE):
        m_v = m_y & inside(o_vx + column * DILATION, W)
        b_v = b_v + (load_channels(p_row, m_v, m_d, ACC, PAIRS),)
        p_row += DILATION * s_vx
        if column >= STRIP - 1:
            b_v = b_v[1:]
            b_mul, _ = load_ghosts(p_mul, p_mul, m_d, MUL, False)
            p_mul += C
            for p in tl.static_range(STRIP):
                b_product = b_go[p] * b_v[p]  # [BLOCK_S, BLOCK_D] * [BLOCK_S, BLOCK_D] -> [BLOCK_S, BLOCK_D]
                if MUL:
                    b_product *= b_mul
                slot = p * BLOCK_T + column - (STRIP - 1)
                b_da = tl.where(o_slot[None, :] == slot, tl.sum(b_product, axis=1)[:, None], b_da)
    return b_da


@triton.jit
def dghost_kernel(p_v, p_go, p_logits, p_lse, p_dmul, p_dadd,
                  B, num_samples, H, W, Ho, Wo, G, split_size, num_splits, s_vb, s_vy, s_vx, s_lb, s_lc, s_lp,
                  KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
                  HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ATTENTION: tl.constexpr, NORMALIZE: tl.constexpr,
                  MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, PAIRS: tl.constexpr,
                  STRIP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr):
    """Partial dmul and dadd, (groups * num_splits, KERNEL_SIZE, KERNEL_SIZE rounded up to blocks of BLOCK_J, C).

        a[t]    = as in the forward pass                               for each b, g and output pixel (y, x)
        dmul[t] = sum over (y, x) of a[t] * go[y, x] * v(tap t)        (K, HEAD_DIM), of head g
        dadd[t] = sum over (y, x) of go[y, x] * v(tap t)               (K, HEAD_DIM), of head g

    A program sums BLOCK_J neighbouring taps of a row over the split_size strips of one split of a group of num_samples
    samples: one sample of which each has filters of its own; several if they are small, since the sum over a program's
    threads costs the same however much they have summed. The programs of one split follow each other, so that what the
    first reads of v and of go the others find in the cache.
    Pixels that a strip does not count have a product of 0, or of NaN, which the strip that counts them has, too.
    """
    blocks_per_row: tl.constexpr = (KERNEL_SIZE + BLOCK_J - 1) // BLOCK_J
    split = tl.program_id(0) // (KERNEL_SIZE * blocks_per_row)  # of all groups
    block = tl.program_id(0) % (KERNEL_SIZE * blocks_per_row)  # a row of taps, or a part of one
    i, first_j = block // blocks_per_row, block % blocks_per_row * BLOCK_J
    first_b = split // num_splits * num_samples
    g = tl.program_id(1)
    per_row = (Wo + STRIP - 1) // STRIP
    per_sample = Ho * per_row
    first = split % num_splits * split_size
    last = tl.minimum(first + split_size, tl.minimum(num_samples, B - first_b) * per_sample)
    o_d = tl.arange(0, BLOCK_D)
    m_d = None if HEAD_DIM == BLOCK_D else o_d < HEAD_DIM
    C = G * HEAD_DIM

    b_dmul, b_dadd = (), ()
    for j in tl.static_range(BLOCK_J):
        b_dmul = b_dmul + (tl.zeros([BLOCK_S, BLOCK_D], dtype=ACC),)
        b_dadd = b_dadd + (tl.zeros([BLOCK_S, BLOCK_D], dtype=ACC),)
    for start in range(first, last, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < last
        b = (first_b + o_s // per_sample).to(tl.int64)  # [BLOCK_S], as all that follows
        o_s = o_s % per_sample
        o_y, o_new = o_s // per_row, o_s % per_row * STRIP
        o_x = tl.minimum(o_new, Wo - STRIP)
        o_p = o_y * Wo + o_x
        p_pixel, o_vy, o_vx = corner_of_window(p_v + b * s_vb + g * HEAD_DIM, o_y, o_x, o_d, s_vy, s_vx,
                                               KERNEL_SIZE, DILATION, STRIDE)
        p_pixel += i * DILATION * s_vy + first_j * DILATION * s_vx
        m_y = m_s & inside(o_vy + i * DILATION, H)
        p_l = p_logits + b * s_lb + (g * (KERNEL_SIZE * KERNEL_SIZE) + i * KERNEL_SIZE) * s_lc + o_p * s_lp
        m_p, b_go, b_max, b_log = (), (), (), ()
        for p in tl.static_range(STRIP):
            m = m_s & (o_x + p >= o_new)
            m_p = m_p + (m,)
            p_g = (p_go + b * (Ho * Wo * C) + g * HEAD_DIM + (o_p + p) * C)[:, None] + o_d[None, :]
            b_go = b_go + (load_channels(p_g, m, m_d, ACC, PAIRS),)
            if MUL and NORMALIZE:
                b_m, b_l = load_log_sum_exp(p_lse + (b * G + g) * (2 * Ho * Wo) + o_p + p, Ho * Wo, m)
                b_max, b_log = b_max + (b_m,), b_log + (b_l,)
            else:
                b_max, b_log = b_max + (0.0,), b_log + (0.0,)
        for column in tl.static_range(BLOCK_J + STRIP - 1):
            b_v = load_channels(p_pixel, m_y & inside(o_vx + (first_j + column) * DILATION, W), m_d, ACC, PAIRS)
            p_pixel += DILATION * s_vx
            for p in tl.static_range(STRIP):
                if column - p >= 0 and column - p < BLOCK_J:  # what pixel p reads as the block's tap column - p
                    b_product = b_v * b_go[p]  # [BLOCK_S, BLOCK_D] * [BLOCK_S, BLOCK_D] -> [BLOCK_S, BLOCK_D]
                    if ADD:
                        b_dadd = replaced(b_dadd, column - p, b_dadd[column - p] + b_product)
                    if MUL:
                        right = p * s_lp + tl.minimum(first_j + column - p, KERNEL_SIZE - 1) * s_lc
                        b_a = load_attention(p_l + right, m_p[p], b_max[p], b_log[p], NORMALIZE, ACC)
                        # [BLOCK_S, BLOCK_D] * [BLOCK_S, 1] -> [BLOCK_S, BLOCK_D]
                        b_dmul = replaced(b_dmul, column - p, b_dmul[column - p] + b_product * b_a[:, None])
    for j in tl.static_range(BLOCK_J):
        o_f = (split.to(tl.int64) * (KERNEL_SIZE * blocks_per_row) + block) * BLOCK_J * C + j * C + g * HEAD_DIM + o_d
        if ADD:
            tl.store(p_dadd + o_f, tl.sum(b_dadd[j], axis=0), mask=m_d)
        if MUL:
            tl.store(p_dmul + o_f, tl.sum(b_dmul[j], axis=0), mask=m_d)
