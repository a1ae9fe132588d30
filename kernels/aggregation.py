"""ELSA's aggregation in Triton: one forward kernel, three backward kernels, and the functions that launch them.

A program computes BP runs of P neighbouring pixels of one head of one sample. It walks over the rows of the k x k neighbourhood in a
loop and over its columns unrolled, with a window of P pixels of v that advances by one pixel a tap: so a pixel of v is loaded and
converted once for up to P taps, and so is a filter. Sums are float32 (float64 for float64 input). Nothing is added atomically: dv
gathers from the output pixels that read it, and the filters' gradients are partial sums, one per program.

Prefixes: p_ pointers, b_ tiles in registers, o_ offsets, m_ masks, s_ strides in elements; where P is more than one, most names stand for
tuples of P tiles. Inside one sample offsets are 32-bit, from sample to sample 64-bit. `rows` is k once more, as a number that the
compiler does not know: otherwise it unrolls short loops over rows as well, and runs out of registers.
"""
import torch
import triton
import triton.language as tl

from kernels import tuning

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 takes fewer instructions than exp


@triton.jit
def forward_kernel(p_v, p_logits, p_mul, p_add, p_out, p_lse,
                   H, W, Ho, Wo, G, rows, s_vb, s_vy, s_vx, s_lb, s_lc, s_lp, s_mb, s_ab,
                   k: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                   ATTN: tl.constexpr, NORM: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
                   P: tl.constexpr, BP: tl.constexpr):
    """out (B, Ho, Wo, C) and, with NORM, the softmax's log-sum-exp (B, G, Ho * Wo)."""
    b, g, o_y, o_x = _runs(Ho, Wo, P, BP, False)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_p = o_y * Wo + o_x  # of each run's first pixel
    C = G * D

    p_l = p_logits + b * s_lb + g * (k * k) * s_lc
    m_p = ()
    b_lse = ()
    b_out = ()
    for p in tl.static_range(P):
        m_p = m_p + ((o_y < Ho) & (o_x + p < Wo),)
        b_out = b_out + (tl.zeros([BP, BD], dtype=ACC),)
        b_lse = b_lse + (tl.zeros([BP], dtype=ACC),)
    if NORM:
        b_lse = _log_sum_exp(p_l, s_lc, s_lp, p_lse + (b * G + g) * (Ho * Wo), Ho, Wo, rows, k, P, BP, ACC)

    p_l += o_p * s_lp  # [BP]
    p_v += b * s_vb + g * D
    p_mul += b * s_mb + g * D + o_d
    p_add += b * s_ab + g * D + o_d
    b_out = _sum_over_taps(b_out, p_v, p_l, p_mul, p_add, b_lse, m_p, o_y, o_x, o_d, m_d, H, W, Ho, C, rows, s_vy, s_vx, s_lc, s_lp,
                           k, DIL, STRIDE, ATTN, NORM, MUL, ADD, ACC, P)
    for p in tl.static_range(P):
        p_o = (p_out + b * Ho * Wo * C + g * D + (o_p + p) * C)[:, None] + o_d[None, :]
        tl.store(p_o, b_out[p], mask=m_p[p][:, None] & m_d[None, :])


@triton.jit
def dv_kernel(p_go, p_logits, p_mul, p_add, p_lse, p_dv,
              H, W, Ho, Wo, G, rows, s_lb, s_lc, s_lp, s_mb, s_ab,
              k: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
              ATTN: tl.constexpr, NORM: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
              P: tl.constexpr, BP: tl.constexpr):
    """dv (B, H, W, C): input pixel (y, x) is tap (i, j) of output pixel ((y - (i-r) DIL) / STRIDE, (x - (j-r) DIL) / STRIDE)."""
    b, g, o_y, o_x = _runs(H, W, P, BP, False)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    C = G * D

    p_logits += b * s_lb + g * (k * k) * s_lc
    p_lse += (b * G + g) * (Ho * Wo)
    p_go += b * Ho * Wo * C + g * D
    p_mul += b * s_mb + g * D + o_d
    p_add += b * s_ab + g * D + o_d
    b_dv = ()
    for p in tl.static_range(P):
        b_dv = b_dv + (tl.zeros([BP, BD], dtype=ACC),)
    for i in range(rows):
        o_qy = o_y - (i - k // 2) * DIL
        m_y = (o_y < H) & (o_qy >= 0)
        if STRIDE > 1:
            m_y &= o_qy % STRIDE == 0
            o_qy = o_qy // STRIDE
        m_y &= o_qy < Ho
        b_go, b_lse, m_q = (b_dv[0],), (tl.zeros([BP], dtype=ACC),), (m_y,)  # the window; these leave it before they are used
        for j in tl.static_range(P - 1 + k):
            o_q, column, m_new = _reader(o_qy, o_x, j - k // 2, m_y, Wo, DIL, STRIDE)
            new = tl.load((p_go + o_q * C)[:, None] + o_d[None, :] + column * C, mask=m_new[:, None] & m_d[None, :], other=0.0).to(ACC)
            b_go, m_q = b_go + (new,), m_q + (m_new,)
            if NORM:
                b_lse = b_lse + (tl.load(p_lse + o_q + column, mask=m_new, other=0.0),)
            else:
                b_lse = b_lse + (b_lse[0],)
            if j >= P - 1:  # the window is full: of tap k - 1 - (j - P + 1)
                b_go, b_lse, m_q = b_go[1:], b_lse[1:], m_q[1:]
                t = i * k + k + P - 2 - j
                b_m, b_a = _ghosts(p_mul, p_add, m_d, t * C, MUL, ADD, ACC)
                for p in tl.static_range(P):
                    p_l = p_logits + o_q * s_lp + (column - (P - 1 - p)) * s_lp + t * s_lc
                    b_f = _filter(p_l, b_m, b_a, b_lse[p], m_q[p], ATTN, NORM, MUL, ADD, ACC)
                    b_dv = b_dv[:p] + (b_dv[p] + b_go[p] * b_f,) + b_dv[p + 1:]
    for p in tl.static_range(P):
        p_o = (p_dv + b * H * W * C + g * D + (o_y * W + o_x + p) * C)[:, None] + o_d[None, :]
        tl.store(p_o, b_dv[p], mask=((o_y < H) & (o_x + p < W))[:, None] & m_d[None, :])


@triton.jit
def dlogits_kernel(p_v, p_go, p_logits, p_mul, p_lse, p_dlogits,
                   H, W, Ho, Wo, G, rows, s_vb, s_vy, s_vx, s_lb, s_lc, s_lp, s_db, s_dc, s_dp, s_mb,
                   k: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                   NORM: tl.constexpr, MUL: tl.constexpr, ACC: tl.constexpr,
                   P: tl.constexpr, BP: tl.constexpr):
    """dlogits, laid out as logits are.

    da[t] = sum_c go * v(tap t) * mul[c, t]; through the softmax dlogits[t] = a[t] (da[t] - sum_t a da). The inner sum is
    go . (attention part of out), so a first walk over the taps needs one multiply-add per tap and channel and no reduction.
    """
    b, g, o_y, o_x = _runs(Ho, Wo, P, BP, False)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_p = o_y * Wo + o_x
    C = G * D

    p_l = p_logits + b * s_lb + g * (k * k) * s_lc + o_p * s_lp
    p_d = p_dlogits + b * s_db + g * (k * k) * s_dc + o_p * s_dp
    p_v += b * s_vb + g * D
    p_mul += b * s_mb + g * D + o_d
    m_p, b_go, b_lse, b_sum, b_attended = (), (), (), (), ()
    for p in tl.static_range(P):
        m = (o_y < Ho) & (o_x + p < Wo)
        m_p = m_p + (m,)
        p_g = (p_go + b * Ho * Wo * C + g * D + (o_p + p) * C)[:, None] + o_d[None, :]
        b_go = b_go + (tl.load(p_g, mask=m[:, None] & m_d[None, :], other=0.0).to(ACC),)
        b_sum = b_sum + (tl.zeros([BP], dtype=ACC),)
        b_attended = b_attended + (tl.zeros([BP, BD], dtype=ACC),)
        if NORM:
            b_lse = b_lse + (tl.load(p_lse + (b * G + g) * (Ho * Wo) + o_p + p, mask=m, other=0.0),)
        else:
            b_lse = b_lse + (b_sum[0],)
    if NORM:
        b_attended = _sum_over_taps(b_attended, p_v, p_l, p_mul, p_mul, b_lse, m_p, o_y, o_x, o_d, m_d, H, W, Ho, C, rows, s_vy, s_vx, s_lc, s_lp,
                                    k, DIL, STRIDE, True, True, MUL, False, ACC, P)
        b_sum = ()
        for p in tl.static_range(P):
            b_sum = b_sum + (tl.sum(b_go[p] * b_attended[p], axis=1),)
    for i in range(rows):
        p_row, m_y = _row(p_v, o_y, o_x, o_d, i, H, Ho, s_vy, s_vx, k, DIL, STRIDE)
        b_v = (b_attended[0],)  # the window, as in _sum_over_taps
        for j in tl.static_range(P - 1 + k):
            b_v = b_v + (_pixel(p_row, o_x * STRIDE, j - k // 2, DIL, s_vx, W, m_y, m_d, ACC),)
            if j >= P - 1:
                b_v = b_v[1:]
                t = i * k + j - (P - 1)
                b_m, b_a = _ghosts(p_mul, p_mul, m_d, t * C, MUL, False, ACC)
                for p in tl.static_range(P):
                    b_product = b_go[p] * b_v[p]
                    if MUL:
                        b_product *= b_m
                    b_d = tl.sum(b_product, axis=1)  # [BP]
                    if NORM:
                        b_d = _weight(p_l + t * s_lc + p * s_lp, b_lse[p], m_p[p], True, ACC) * (b_d - b_sum[p])
                    tl.store(p_d + t * s_dc + p * s_dp, b_d, mask=m_p[p])


@triton.jit
def dghost_kernel(p_v, p_go, p_logits, p_lse, p_dmul, p_dadd,
                  H, W, Ho, Wo, G, chunk, n_chunks, s_vb, s_vy, s_vx, s_lb, s_lc, s_lp,
                  k: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                  ATTN: tl.constexpr, NORM: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
                  P: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr):
    """Partial dmul and dadd, (B * n_chunks, k, k rounded up to blocks of BJ, C): a program sums BJ neighbouring taps over `chunk` runs.

    The programs of one chunk follow each other, so that what the first reads of v and of go the others find in the cache.
    """
    blocks: tl.constexpr = (k + BJ - 1) // BJ
    n = tl.program_id(0) // (k * blocks)  # sample * n_chunks + chunk
    row = tl.program_id(0) % (k * blocks)  # of taps, or a part of one
    i, first_j = row // blocks, row % blocks * BJ
    b = (n // n_chunks).to(tl.int64)
    g = tl.program_id(1)
    per_row = (Wo + P - 1) // P
    first = n % n_chunks * chunk
    last = tl.minimum(first + chunk, Ho * per_row)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    C = G * D

    p_v += b * s_vb + g * D
    p_go += b * Ho * Wo * C + g * D
    p_logits += b * s_lb + (g * (k * k) + i * k) * s_lc
    p_lse += (b * G + g) * (Ho * Wo)
    b_dmul, b_dadd = (), ()
    for j in tl.static_range(BJ):
        b_dmul = b_dmul + (tl.zeros([BP, BD], dtype=ACC),)
        b_dadd = b_dadd + (tl.zeros([BP, BD], dtype=ACC),)
    for start in range(first, last, BP):
        o_n = start + tl.arange(0, BP)
        o_y, o_x = o_n // per_row, o_n % per_row * P
        o_p = o_y * Wo + o_x
        p_row, m_y = _row(p_v, o_y, o_x, o_d, i, H, Ho, s_vy, s_vx, k, DIL, STRIDE)
        m_y &= o_n < last
        m_p, b_go, b_lse = (), (), ()
        for p in tl.static_range(P):
            m = (o_n < last) & (o_x + p < Wo)
            m_p = m_p + (m,)
            p_g = (p_go + (o_p + p) * C)[:, None] + o_d[None, :]
            b_go = b_go + (tl.load(p_g, mask=m[:, None] & m_d[None, :], other=0.0).to(ACC),)
            if MUL and NORM:
                b_lse = b_lse + (tl.load(p_lse + o_p + p, mask=m, other=0.0),)
            else:
                b_lse = b_lse + (0.0,)
        for c in tl.static_range(BJ + P - 1):
            b_v = _pixel(p_row, o_x * STRIDE, first_j + c - k // 2, DIL, s_vx, W, m_y, m_d, ACC)
            for p in tl.static_range(P):
                if c - p >= 0 and c - p < BJ:
                    b_product = b_v * b_go[p]
                    if ADD:
                        b_dadd = b_dadd[:c - p] + (b_dadd[c - p] + b_product,) + b_dadd[c - p + 1:]
                    if MUL:
                        p_l = p_logits + (o_p + p) * s_lp + tl.minimum(first_j + c - p, k - 1) * s_lc
                        b_a = _weight(p_l, b_lse[p], m_p[p], NORM, ACC)
                        b_dmul = b_dmul[:c - p] + (b_dmul[c - p] + b_product * b_a[:, None],) + b_dmul[c - p + 1:]
    for j in tl.static_range(BJ):
        o_f = (n.to(tl.int64) * (k * blocks) + row) * BJ * C + j * C + g * D + o_d
        if ADD:
            tl.store(p_dadd + o_f, tl.sum(b_dadd[j], axis=0), mask=m_d)
        if MUL:
            tl.store(p_dmul + o_f, tl.sum(b_dmul[j], axis=0), mask=m_d)


@triton.jit
def _runs(H, W, P: tl.constexpr, BP: tl.constexpr, EVERY: tl.constexpr):
    """The program's sample and head, and rows and columns of the first pixel of each of its runs, [BP], or of EVERY pixel, [BP * P]."""
    per_row = (W + P - 1) // P
    tiles = (H * per_row + BP - 1) // BP
    first = tl.program_id(0) % tiles * BP
    b = (tl.program_id(0) // tiles).to(tl.int64)
    if EVERY:
        o_n = tl.arange(0, BP * P)
        o_y, o_x = (first + o_n // P) // per_row, (first + o_n // P) % per_row * P + o_n % P
    else:
        o_n = first + tl.arange(0, BP)
        o_y, o_x = o_n // per_row, o_n % per_row * P
    return b, tl.program_id(1), o_y, o_x


@triton.jit
def _sum_over_taps(b_out, p_v, p_l, p_mul, p_add, b_lse, m_p, o_y, o_x, o_d, m_d, H, W, Ho, C, rows, s_vy, s_vx, s_lc, s_lp,
                   k: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, ATTN: tl.constexpr, NORM: tl.constexpr, MUL: tl.constexpr,
                   ADD: tl.constexpr, ACC: tl.constexpr, P: tl.constexpr):
    """b_out, P tiles [BP, BD], plus filter times v, summed over the taps. A window of P pixels advances by one a tap."""
    for i in range(rows):
        p_row, m_y = _row(p_v, o_y, o_x, o_d, i, H, Ho, s_vy, s_vx, k, DIL, STRIDE)
        b_v = (b_out[0],)  # this tile leaves the window before it is used
        for j in tl.static_range(P - 1 + k):
            b_v = b_v + (_pixel(p_row, o_x * STRIDE, j - k // 2, DIL, s_vx, W, m_y, m_d, ACC),)
            if j >= P - 1:  # the window is full: of tap j - (P - 1)
                b_v = b_v[1:]
                t = i * k + j - (P - 1)
                b_m, b_a = _ghosts(p_mul, p_add, m_d, t * C, MUL, ADD, ACC)
                for p in tl.static_range(P):
                    b_f = _filter(p_l + t * s_lc + p * s_lp, b_m, b_a, b_lse[p], m_p[p], ATTN, NORM, MUL, ADD, ACC)
                    b_out = b_out[:p] + (b_out[p] + b_v[p] * b_f,) + b_out[p + 1:]
    return b_out


@triton.jit
def _row(p_v, o_y, o_x, o_d, i, H, Ho, s_vy, s_vx, k: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr):
    """Pointers [BP, BD] to where row i of the neighbourhood has the column of the centre, and whether there is such a row."""
    o_vy = o_y * STRIDE + (i - k // 2) * DIL
    p_row = (p_v + o_vy * s_vy + o_x * STRIDE * s_vx)[:, None] + o_d[None, :]
    return p_row, (o_y < Ho) & (o_vy >= 0) & (o_vy < H)


@triton.jit
def _pixel(p_row, o_x, column, DIL: tl.constexpr, s_x, W, m_y, m_d, ACC: tl.constexpr):
    """One pixel of each run's window, `column` steps of DIL from o_x: [BP, BD]."""
    o_vx = o_x + column * DIL
    m_v = m_y & (o_vx >= 0) & (o_vx < W)
    return tl.load(p_row + column * DIL * s_x, mask=m_v[:, None] & m_d[None, :], other=0.0).to(ACC)


@triton.jit
def _reader(o_qy, o_x, column: tl.constexpr, m_y, Wo, DIL: tl.constexpr, STRIDE: tl.constexpr):
    """The output pixel `column` steps of DIL to the right: its offset, [BP] plus a number, and whether there is one."""
    o_qx = o_x + column * DIL
    if STRIDE == 1:
        return o_qy * Wo + o_x, column * DIL, m_y & (o_qx >= 0) & (o_qx < Wo)
    else:
        return o_qy * Wo + o_qx // STRIDE, 0, m_y & (o_qx >= 0) & (o_qx % STRIDE == 0) & (o_qx // STRIDE < Wo)


@triton.jit
def _log_sum_exp(p_l, s_lc, s_lp, p_lse, Ho, Wo, rows, k: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr):
    """log(sum_t exp(logits[t])) of each pixel, row by row with a running maximum."""
    _, _, o_y, o_x = _runs(Ho, Wo, P, BP, True)  # [BP * P], so that no two threads take the same pixel
    m_p = (o_y < Ho) & (o_x < Wo)
    p_row = p_l + (o_y * Wo + o_x) * s_lp
    b_max = tl.full([BP * P], -float("inf"), dtype=ACC)
    b_sum = tl.zeros([BP * P], dtype=ACC)
    for i in range(rows):
        b_row = ()
        b_new = b_max
        for j in tl.static_range(k):
            b_row = b_row + (tl.load(p_row + j * s_lc, mask=m_p, other=0.0).to(ACC),)
            b_new = tl.maximum(b_new, b_row[j])
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)  # of nothing but -inf, every weight is zero so far, not NaN
        b_sum *= tl.exp2((b_max - b_shift) * LOG2E)
        for j in tl.static_range(k):
            b_sum += tl.exp2((b_row[j] - b_shift) * LOG2E)
        b_max = b_new
        p_row += k * s_lc
    b_lse = b_max + tl.log(b_sum)
    tl.store(p_lse + o_y * Wo + o_x, b_lse, mask=m_p)
    return _unstack(b_lse, P, BP)


@triton.jit
def _unstack(x, P: tl.constexpr, BP: tl.constexpr):
    """[BP * P] -> P tiles [BP]."""
    if P == 1:
        return (x,)
    elif P == 2:
        return tl.split(tl.reshape(x, [BP, 2]))
    else:
        even, odd = tl.split(tl.reshape(x, [BP, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def _weight(p_l, b_lse, m_p, NORM: tl.constexpr, ACC: tl.constexpr):
    """The attention of one tap, [BP]."""
    b_a = tl.load(p_l, mask=m_p, other=0.0).to(ACC)
    if NORM:
        b_a = tl.exp2((b_a - b_lse) * LOG2E)
    return b_a


@triton.jit
def _ghosts(p_mul, p_add, m_d, offset, MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr):
    """One tap of both static filters, [1, BD] each."""
    b_m, b_a = 1.0, 0.0
    if MUL:
        b_m = tl.load(p_mul + offset, mask=m_d, other=0.0).to(ACC)[None, :]
    if ADD:
        b_a = tl.load(p_add + offset, mask=m_d, other=0.0).to(ACC)[None, :]
    return b_m, b_a


@triton.jit
def _filter(p_l, b_m, b_a, b_lse, m_p, ATTN: tl.constexpr, NORM: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr):
    """One tap of the combined filter a * mul + add, broadcastable to [BP, BD]."""
    b_f = b_a
    if ATTN:
        b_f = _weight(p_l, b_lse, m_p, NORM, ACC)[:, None]
        if MUL:
            b_f = b_f * b_m
        if ADD:
            b_f = b_f + b_a
    return b_f


# Candidates of the tuner; the first is taken where nothing can be measured.

WARP_SIZE = 64 if torch.version.hip else 32


def run_configs(BD, *limits):
    """Runs of a program: eight channels of one run a thread, which are one 16-byte load of 16-bit values. BD: the padded head width."""
    return [dict(BP=max(1, 8 * threads // BD), num_warps=threads // WARP_SIZE, **registers(limit)) for threads in (128, 64) for limit in limits]


def registers(limit):
    """A limit of registers a thread. Left to itself, None, the compiler spills a few bytes in some kernels for the sake of occupancy."""
    return dict(maxnreg=limit) if limit and WARP_SIZE == 32 else {}


def forward(v, logits, mul, add, kernel_size, dilation, stride, normalize):
    """out (B, Ho, Wo, C) and lse (B, G, Ho, Wo), empty where no softmax is taken.

    v (B, H, W, C); logits (B, G*K, Ho, Wo) or None; mul, add (C, k, k) or (B, C, k, k) or None, ready to be used: lam and
    gamma are already in them.
    """
    s = _Setting(v, logits, mul, add, kernel_size, dilation, stride, normalize)
    out = torch.empty(s.B, s.Ho, s.Wo, s.C, dtype=v.dtype, device=v.device)
    lse = torch.empty(s.B, s.G, s.Ho, s.Wo, dtype=s.accumulator, device=v.device) if s.flags["NORM"] else s.nothing

    def launch(**config):
        forward_kernel[s.tiles(s.Ho, s.Wo, config)](
            s.v, s.logits, s.mul, s.add, out, lse, *s.sizes, kernel_size, *s.v_strides, *s.logits_strides, s.mul_stride, s.add_stride,
            **s.constants, **s.flags, **config)

    tuning.launch("forward", s.key, run_configs(s.constants["BD"], None, 255), launch, v.device)
    return out, lse


def backward(grad_out, v, logits, mul, add, lse, kernel_size, dilation, stride, normalize, needs):
    """(dv, dlogits, dmul, dadd), None where `needs`, four booleans, says so. dmul and dadd are float32 (float64 for float64)."""
    s = _Setting(v, logits, mul, add, kernel_size, dilation, stride, normalize)
    go = grad_out.contiguous()
    dv = dlogits = dmul = dadd = None
    if needs[0]:
        dv = torch.empty(s.B, s.H, s.W, s.C, dtype=v.dtype, device=v.device)

        def launch_dv(**config):
            dv_kernel[s.tiles(s.H, s.W, config)](
                go, s.logits, s.mul, s.add, lse, dv, *s.sizes, kernel_size, *s.logits_strides, s.mul_stride, s.add_stride,
                **s.constants, **s.flags, **config)

        tuning.launch("dv", s.key, run_configs(s.constants["BD"], None), launch_dv, v.device)
    if needs[1]:
        dlogits = torch.empty_like(s.logits)
        dlogits = dlogits if _pixel_strides(dlogits) else torch.empty(dlogits.shape, dtype=v.dtype, device=v.device)
        strides = _pixel_strides(dlogits)
        flags = {name: s.flags[name] for name in ("NORM", "MUL", "ACC")}

        def launch_dlogits(**config):
            dlogits_kernel[s.tiles(s.Ho, s.Wo, config)](
                s.v, go, s.logits, s.mul, lse, dlogits, *s.sizes, kernel_size, *s.v_strides, *s.logits_strides, *strides, s.mul_stride,
                **s.constants, **flags, **config)

        tuning.launch("dlogits", s.key, run_configs(s.constants["BD"], 255), launch_dlogits, v.device)
    if needs[2] or needs[3]:
        dmul, dadd = _dghost(s, go, lse, mul, add, needs)
    return dv, dlogits, dmul, dadd


CHUNK = 1024  # runs that one program of dghost_kernel sums


def _dghost(s, go, lse, mul, add, needs):
    runs = s.Ho * triton.cdiv(s.Wo, s.constants["P"])
    n_chunks = triton.cdiv(runs, CHUNK)
    k = s.constants["k"]
    BJ = triton.cdiv(k, triton.cdiv(k, 7))  # sums for eight channels of each of seven taps are what a thread can hold
    blocks = triton.cdiv(k, BJ)
    parts = [torch.empty(s.B, n_chunks, k, blocks * BJ, s.C, dtype=s.accumulator, device=go.device) if need else s.nothing for need in needs[2:]]
    flags = dict(s.flags, MUL=needs[2], ADD=needs[3])

    def launch(**config):
        dghost_kernel[(s.B * n_chunks * k * blocks, s.G)](
            s.v, go, s.logits, lse, *parts, *s.sizes, triton.cdiv(runs, n_chunks), n_chunks, *s.v_strides, *s.logits_strides,
            **s.constants, **flags, BJ=BJ, **config)

    tuning.launch("dghost", s.key, run_configs(s.constants["BD"], 255), launch, go.device)
    # (B, n_chunks, k, k.., C) -> (C, k, k), or (B, C, k, k) for per-sample filters
    return [part[:, :, :, :k].sum((0, 1) if ghost.ndim == 3 else 1).movedim(-1, -3).contiguous() if need else None
            for need, part, ghost in zip(needs[2:], parts, (mul, add))]


class _Setting:
    """What every launch needs: sizes, strides, tensors in the layout that the kernels read, and compile-time constants."""

    def __init__(self, v, logits, mul, add, kernel_size, dilation, stride, normalize):
        self.B, self.H, self.W, self.C = v.shape
        self.Ho, self.Wo = self.H // stride, self.W // stride
        K = kernel_size ** 2
        self.G = 1 if logits is None else logits.shape[1] // K
        self.accumulator = torch.float64 if v.dtype == torch.float64 else torch.float32
        self.nothing = torch.empty(0, dtype=self.accumulator, device=v.device)
        self.v = v if v.stride(-1) == 1 else v.contiguous()
        self.v_strides = self.v.stride()[:3]
        self.logits, self.logits_strides = self.nothing, (0, 0, 0)
        if logits is not None:
            self.logits = logits if _pixel_strides(logits) else logits.contiguous()
            self.logits_strides = _pixel_strides(self.logits)
        self.mul, self.mul_stride = self._taps_first(mul)
        self.add, self.add_stride = self._taps_first(add)
        self.sizes = (self.H, self.W, self.Ho, self.Wo, self.G)
        D = self.C // self.G
        P = 4 if dilation == stride == 1 and self.accumulator == torch.float32 else 1  # neighbours share pixels only when both are 1
        # Without fusion, the default from Triton 3.10 on, a multiply-add is two instructions.
        self.constants = dict(k=kernel_size, DIL=dilation, STRIDE=stride, D=D, BD=triton.next_power_of_2(D), P=P, enable_fp_fusion=True)
        self.flags = dict(ATTN=logits is not None, NORM=normalize and logits is not None, MUL=mul is not None, ADD=add is not None,
                          ACC=tl.float64 if v.dtype == torch.float64 else tl.float32)
        self.key = dict(dtype=str(v.dtype)[6:], k=kernel_size, dilation=dilation, stride=stride, heads=self.G, width=D,
                        pixels=triton.next_power_of_2(max(1, self.Ho * self.Wo)), mul=mul is not None, add=add is not None, attn=logits is not None,
                        channels_first=self.logits_strides[2] == 1)

    def _taps_first(self, ghost):
        """(..., C, k, k) -> (..., K, C): the channels that neighbouring threads hold lie side by side."""
        if ghost is None:
            return self.nothing, 0
        ghost = ghost.flatten(-2).transpose(-1, -2).contiguous().to(self.accumulator)
        return ghost, 0 if ghost.ndim == 2 else ghost.stride(0)

    def tiles(self, H, W, config):
        return self.B * triton.cdiv(H * triton.cdiv(W, self.constants["P"]), config["BP"]), self.G


def _pixel_strides(logits):
    """(sample, channel, pixel) strides if rows follow each other at the pixel stride, as in both NCHW and NHWC memory."""
    b, c, y, x = logits.stride()
    Ho, Wo = logits.shape[2:]
    pixel = x if Wo > 1 else y
    return (b, c, pixel) if Ho <= 1 or Wo <= 1 or y == Wo * x else None
