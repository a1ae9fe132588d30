"""ELSA's aggregation in Triton: one forward kernel, three backward kernels, and the functions that launch them.

Every kernel gives one program a tile of BY x BX pixels of one head of one sample, walks over the rows of the k x k
neighbourhood in a loop and over its columns unrolled. Sums are float32 (float64 for float64 input). Nothing is added
atomically: dv gathers from the output pixels that read it, and the filters' gradients are partial sums, one per program.

Prefixes: p_ pointers, b_ tiles in registers, o_ offsets, m_ masks, s_ strides in elements. Inside one sample offsets are
32-bit, from sample to sample 64-bit. `rows` is k once more, as a number that the compiler does not know: otherwise it
unrolls short loops over rows as well, and runs out of registers.
"""
import torch
import triton
import triton.language as tl

from kernels import tuning


@triton.jit
def forward_kernel(p_v, p_logits, p_mul, p_add, p_out, p_lse,
                   H, W, Ho, Wo, G, rows, s_vb, s_vy, s_vx, s_lb, s_lc, s_lp, s_mb, s_ab,
                   k: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                   ATTN: tl.constexpr, NORM: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
                   BY: tl.constexpr, BX: tl.constexpr):
    """out (B, Ho, Wo, C) and, with NORM, the softmax's log-sum-exp (B, G, Ho * Wo)."""
    b, o_y, o_x = _tile(Ho, Wo, BY, BX)
    g = tl.program_id(1)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_p = (o_y < Ho) & (o_x < Wo)  # [BP]
    o_p = o_y * Wo + o_x
    C = G * D

    p_l = p_logits + b * s_lb + g * (k * k) * s_lc + o_p * s_lp  # [BP]
    b_lse = tl.zeros([BY * BX], dtype=ACC)
    if NORM:
        b_lse = _log_sum_exp(p_l, s_lc, m_p, k * k, ACC)
        tl.store(p_lse + (b * G + g) * (Ho * Wo) + o_p, b_lse, mask=m_p)

    p_v += b * s_vb + g * D
    p_mul += b * s_mb + g * D
    p_add += b * s_ab + g * D
    b_out = tl.zeros([BY * BX, BD], dtype=ACC)
    for i in range(rows):
        o_vy = o_y * STRIDE + (i - k // 2) * DIL
        m_y = m_p & (o_vy >= 0) & (o_vy < H)
        p_row = (p_v + o_vy * s_vy + o_x * STRIDE * s_vx)[:, None] + o_d[None, :]  # [BP, BD]
        for j in tl.static_range(k):
            o_vx = o_x * STRIDE + (j - k // 2) * DIL
            m_v = (m_y & (o_vx >= 0) & (o_vx < W))[:, None] & m_d[None, :]
            b_v = tl.load(p_row + (j - k // 2) * DIL * s_vx, mask=m_v, other=0.0).to(ACC)
            b_f = _filter(p_l, p_mul + o_d, p_add + o_d, b_lse, m_p, m_d, i * k + j, s_lc, C,
                          ATTN, NORM, MUL, ADD, ACC)
            b_out += b_v * b_f
    p_o = (p_out + b * Ho * Wo * C + g * D + o_p * C)[:, None] + o_d[None, :]
    tl.store(p_o, b_out, mask=m_p[:, None] & m_d[None, :])


@triton.jit
def dv_kernel(p_go, p_logits, p_mul, p_add, p_lse, p_dv,
              H, W, Ho, Wo, G, rows, s_lb, s_lc, s_lp, s_mb, s_ab,
              k: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
              ATTN: tl.constexpr, NORM: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
              BY: tl.constexpr, BX: tl.constexpr):
    """dv (B, H, W, C): input pixel (y, x) is tap (i, j) of output pixel ((y - (i-r) DIL) / STRIDE, (x - (j-r) DIL) / STRIDE)."""
    b, o_y, o_x = _tile(H, W, BY, BX)
    g = tl.program_id(1)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_p = (o_y < H) & (o_x < W)
    C = G * D

    p_logits += b * s_lb + g * (k * k) * s_lc
    p_lse += (b * G + g) * (Ho * Wo)
    p_go += b * Ho * Wo * C + g * D
    p_mul += b * s_mb + g * D
    p_add += b * s_ab + g * D
    b_dv = tl.zeros([BY * BX, BD], dtype=ACC)
    for i in range(rows):
        o_qy = o_y - (i - k // 2) * DIL
        m_y = m_p & (o_qy >= 0)
        if STRIDE > 1:
            m_y &= o_qy % STRIDE == 0
            o_qy = o_qy // STRIDE
        m_y &= o_qy < Ho
        for j in tl.static_range(k):
            o_qx = o_x - (j - k // 2) * DIL
            m_q = m_y & (o_qx >= 0)
            if STRIDE > 1:
                m_q &= o_qx % STRIDE == 0
                o_qx = o_qx // STRIDE
            m_q &= o_qx < Wo
            o_q = o_qy * Wo + o_qx  # [BP]
            b_go = tl.load((p_go + o_q * C)[:, None] + o_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0).to(ACC)
            b_lse = tl.zeros([BY * BX], dtype=ACC)
            if NORM:
                b_lse = tl.load(p_lse + o_q, mask=m_q, other=0.0)
            b_f = _filter(p_logits + o_q * s_lp, p_mul + o_d, p_add + o_d, b_lse, m_q, m_d, i * k + j, s_lc, C,
                          ATTN, NORM, MUL, ADD, ACC)
            b_dv += b_go * b_f
    p_o = (p_dv + b * H * W * C + g * D + (o_y * W + o_x) * C)[:, None] + o_d[None, :]
    tl.store(p_o, b_dv, mask=m_p[:, None] & m_d[None, :])


@triton.jit
def dlogits_kernel(p_v, p_go, p_logits, p_mul, p_lse, p_dlogits,
                   H, W, Ho, Wo, G, rows, s_vb, s_vy, s_vx, s_lb, s_lc, s_lp, s_db, s_dc, s_dp, s_mb,
                   k: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                   NORM: tl.constexpr, MUL: tl.constexpr, ACC: tl.constexpr,
                   BY: tl.constexpr, BX: tl.constexpr):
    """dlogits, laid out as logits are.

    da[t] = sum_c go * v(tap t) * mul[c, t]; through the softmax dlogits[t] = a[t] (da[t] - sum_t a da). The inner sum is
    go . (attention part of out), so a first walk over the taps needs one multiply-add per tap and channel and no reduction.
    """
    b, o_y, o_x = _tile(Ho, Wo, BY, BX)
    g = tl.program_id(1)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_p = (o_y < Ho) & (o_x < Wo)
    o_p = o_y * Wo + o_x
    C = G * D

    p_l = p_logits + b * s_lb + g * (k * k) * s_lc + o_p * s_lp
    p_d = p_dlogits + b * s_db + g * (k * k) * s_dc + o_p * s_dp
    p_v += b * s_vb + g * D
    p_mul += b * s_mb + g * D
    p_g = (p_go + b * Ho * Wo * C + g * D + o_p * C)[:, None] + o_d[None, :]
    b_go = tl.load(p_g, mask=m_p[:, None] & m_d[None, :], other=0.0).to(ACC)
    b_lse = tl.zeros([BY * BX], dtype=ACC)
    b_sum = tl.zeros([BY * BX], dtype=ACC)
    if NORM:
        b_lse = tl.load(p_lse + (b * G + g) * (Ho * Wo) + o_p, mask=m_p, other=0.0)
        b_attended = tl.zeros([BY * BX, BD], dtype=ACC)
        for i in range(rows):
            o_vy = o_y * STRIDE + (i - k // 2) * DIL
            m_y = m_p & (o_vy >= 0) & (o_vy < H)
            p_row = (p_v + o_vy * s_vy + o_x * STRIDE * s_vx)[:, None] + o_d[None, :]
            for j in tl.static_range(k):
                o_vx = o_x * STRIDE + (j - k // 2) * DIL
                m_v = (m_y & (o_vx >= 0) & (o_vx < W))[:, None] & m_d[None, :]
                b_v = tl.load(p_row + (j - k // 2) * DIL * s_vx, mask=m_v, other=0.0).to(ACC)
                b_f = _filter(p_l, p_mul + o_d, p_mul + o_d, b_lse, m_p, m_d, i * k + j, s_lc, C,
                              True, True, MUL, False, ACC)
                b_attended += b_v * b_f
        b_sum = tl.sum(b_go * b_attended, axis=1)
    for i in range(rows):
        o_vy = o_y * STRIDE + (i - k // 2) * DIL
        m_y = m_p & (o_vy >= 0) & (o_vy < H)
        p_row = (p_v + o_vy * s_vy + o_x * STRIDE * s_vx)[:, None] + o_d[None, :]
        for j in tl.static_range(k):
            o_vx = o_x * STRIDE + (j - k // 2) * DIL
            m_v = (m_y & (o_vx >= 0) & (o_vx < W))[:, None] & m_d[None, :]
            b_v = tl.load(p_row + (j - k // 2) * DIL * s_vx, mask=m_v, other=0.0).to(ACC)
            if MUL:
                b_v *= tl.load(p_mul + (i * k + j) * C + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
            b_d = tl.sum(b_go * b_v, axis=1)  # [BP]
            if NORM:
                b_a = tl.exp(tl.load(p_l + (i * k + j) * s_lc, mask=m_p, other=0.0).to(ACC) - b_lse)
                b_d = b_a * (b_d - b_sum)
            tl.store(p_d + (i * k + j) * s_dc, b_d, mask=m_p)


@triton.jit
def dghost_kernel(p_v, p_go, p_logits, p_lse, p_dmul, p_dadd,
                  H, W, Ho, Wo, G, chunk, n_chunks, s_vb, s_vy, s_vx, s_lb, s_lc, s_lp,
                  k: tl.constexpr, DIL: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                  ATTN: tl.constexpr, NORM: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
                  BP: tl.constexpr, BJ: tl.constexpr):
    """Partial dmul and dadd, (B * n_chunks, K, C): one program sums BJ neighbouring taps over `chunk` pixels of one sample."""
    n = tl.program_id(0)  # sample * n_chunks + chunk
    b = (n // n_chunks).to(tl.int64)
    first = (n % n_chunks) * chunk
    g = tl.program_id(1)
    n_blocks = (k + BJ - 1) // BJ
    i = tl.program_id(2) // n_blocks
    o_j = (tl.program_id(2) % n_blocks) * BJ + tl.arange(0, BJ)
    m_j = o_j < k
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    C = G * D

    p_v += b * s_vb + g * D
    p_go += b * Ho * Wo * C + g * D
    p_l = p_logits + b * s_lb + g * (k * k) * s_lc + (i * k + o_j) * s_lc  # [BJ]
    p_lse += (b * G + g) * (Ho * Wo)
    b_dmul = tl.zeros([BJ, BP, BD], dtype=ACC)
    b_dadd = tl.zeros([BJ, BP, BD], dtype=ACC)
    for start in range(first, tl.minimum(first + chunk, Ho * Wo), BP):
        o_p = start + tl.arange(0, BP)
        m_p = (o_p < first + chunk) & (o_p < Ho * Wo)
        o_vy = (o_p // Wo) * STRIDE + (i - k // 2) * DIL
        o_vx = (o_p % Wo)[None, :] * STRIDE + (o_j - k // 2)[:, None] * DIL  # [BJ, BP]
        m_v = (m_p & (o_vy >= 0) & (o_vy < H))[None, :] & (o_vx >= 0) & (o_vx < W) & m_j[:, None]
        b_go = tl.load((p_go + o_p * C)[:, None] + o_d[None, :], mask=m_p[:, None] & m_d[None, :], other=0.0).to(ACC)
        p_tap = (p_v + (o_vy * s_vy)[None, :] + o_vx * s_vx)[:, :, None] + o_d[None, None, :]
        b_v = tl.load(p_tap, mask=m_v[:, :, None] & m_d[None, None, :], other=0.0).to(ACC)  # [BJ, BP, BD]
        b_product = b_v * b_go[None, :, :]
        if ADD:
            b_dadd += b_product
        if MUL:
            b_a = tl.load(p_l[:, None] + o_p[None, :] * s_lp, mask=m_v, other=0.0).to(ACC)
            if NORM:
                b_a = tl.exp(b_a - tl.load(p_lse + o_p, mask=m_p, other=0.0)[None, :])
            b_dmul += b_product * b_a[:, :, None]
    o_f = n.to(tl.int64) * (k * k) * C + ((i * k + o_j) * C + g * D)[:, None] + o_d[None, :]  # [BJ, BD]
    m_f = m_j[:, None] & m_d[None, :]
    if ADD:
        tl.store(p_dadd + o_f, tl.sum(b_dadd, axis=1), mask=m_f)
    if MUL:
        tl.store(p_dmul + o_f, tl.sum(b_dmul, axis=1), mask=m_f)


@triton.jit
def _tile(H, W, BY: tl.constexpr, BX: tl.constexpr):
    """The program's sample, and the rows and columns of its tile, each [BY * BX]."""
    tiles_x = (W + BX - 1) // BX
    tiles = (H + BY - 1) // BY * tiles_x
    tile = tl.program_id(0) % tiles
    o_p = tl.arange(0, BY * BX)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    return b, tile // tiles_x * BY + o_p // BX, tile % tiles_x * BX + o_p % BX


@triton.jit
def _log_sum_exp(p_l, s_lc, m_p, K: tl.constexpr, ACC: tl.constexpr):
    """log(sum_t exp(logits[t])) of each pixel, in two walks, so that a logit of -inf is a weight of zero and not a NaN."""
    b_max = tl.load(p_l, mask=m_p, other=0.0).to(ACC)
    for t in range(1, K):
        b_max = tl.maximum(b_max, tl.load(p_l + t * s_lc, mask=m_p, other=0.0).to(ACC))
    b_sum = tl.zeros_like(b_max)
    for t in range(K):
        b_sum += tl.exp(tl.load(p_l + t * s_lc, mask=m_p, other=0.0).to(ACC) - b_max)
    return b_max + tl.log(b_sum)


@triton.jit
def _filter(p_l, p_m, p_a, b_lse, m_p, m_d, t, s_lc, C,
            ATTN: tl.constexpr, NORM: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr):
    """Tap t of the combined filter a * mul + add, broadcastable to [BP, BD]."""
    if ATTN:
        b_a = tl.load(p_l + t * s_lc, mask=m_p, other=0.0).to(ACC)
        if NORM:
            b_a = tl.exp(b_a - b_lse)
        b_f = b_a[:, None]
        if MUL:
            b_f = b_f * tl.load(p_m + t * C, mask=m_d, other=0.0).to(ACC)[None, :]
        if ADD:
            b_f = b_f + tl.load(p_a + t * C, mask=m_d, other=0.0).to(ACC)[None, :]
    else:
        b_f = tl.load(p_a + t * C, mask=m_d, other=0.0).to(ACC)[None, :]
    return b_f


# Candidates of the tuner; the first is taken where nothing can be measured. D is the padded head width.

WARP_SIZE = 64 if torch.version.hip else 32


def tile_configs(D):
    """Tiles of at most 64 pixels: then a logit is loaded by the threads that use it and never passes through shared memory."""
    shapes = [(4, 16, 128, 255), (2, 16, 128, 168), (4, 8, 64, 255)] if D <= 64 else [(2, 8, 128, 255), (2, 8, 256, 255), (1, 8, 128, 255)]
    return [dict(BY=y, BX=x, **_threads(threads, registers)) for y, x, threads, registers in shapes]


def dghost_configs(D, kernel_size):
    """BJ taps times BP pixels times D channels are held in registers; about 2048 of them."""
    BJ = triton.next_power_of_2(kernel_size)
    blocks = dict.fromkeys([(BJ, max(1, 64 // BJ)), (min(BJ, 4), 16), (min(BJ, 2), 32)])
    return [dict(BJ=j, BP=max(1, p * 32 // max(D, 32)), **_threads(128, 255)) for j, p in blocks]


def _threads(threads, registers):
    """Launch options. Left to itself, ptxas spills a few bytes for the sake of occupancy; given a limit, it keeps to it."""
    return dict(num_warps=threads // WARP_SIZE, **(dict(maxnreg=registers) if WARP_SIZE == 32 else {}))


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

    tuning.launch("forward", s.key, tile_configs(s.constants["BD"]), launch, v.device)
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

        tuning.launch("dv", s.key, tile_configs(s.constants["BD"]), launch_dv, v.device)
    if needs[1]:
        dlogits = torch.empty_like(s.logits)
        dlogits = dlogits if _pixel_strides(dlogits) else torch.empty(dlogits.shape, dtype=v.dtype, device=v.device)
        strides = _pixel_strides(dlogits)
        flags = {name: s.flags[name] for name in ("NORM", "MUL", "ACC")}

        def launch_dlogits(**config):
            dlogits_kernel[s.tiles(s.Ho, s.Wo, config)](
                s.v, go, s.logits, s.mul, lse, dlogits, *s.sizes, kernel_size, *s.v_strides, *s.logits_strides, *strides, s.mul_stride,
                **s.constants, **flags, **config)

        tuning.launch("dlogits", s.key, tile_configs(s.constants["BD"]), launch_dlogits, v.device)
    if needs[2] or needs[3]:
        dmul, dadd = _dghost(s, go, lse, mul, add, needs)
    return dv, dlogits, dmul, dadd


CHUNK = 4096  # pixels that one program of dghost_kernel sums


def _dghost(s, go, lse, mul, add, needs):
    n_chunks = triton.cdiv(s.Ho * s.Wo, CHUNK)
    chunk = triton.cdiv(s.Ho * s.Wo, n_chunks)
    k, K = s.constants["k"], s.constants["k"] ** 2
    parts = [torch.empty(s.B * n_chunks, K, s.C, dtype=s.accumulator, device=go.device) if need else s.nothing for need in needs[2:]]
    flags = dict(s.flags, MUL=needs[2], ADD=needs[3])

    def launch(**config):
        dghost_kernel[(s.B * n_chunks, s.G, k * triton.cdiv(k, config["BJ"]))](
            s.v, go, s.logits, lse, *parts, *s.sizes, chunk, n_chunks, *s.v_strides, *s.logits_strides,
            **s.constants, **flags, **config)

    tuning.launch("dghost", s.key, dghost_configs(s.constants["BD"], k), launch, go.device)
    grads = []
    for need, part, ghost in zip(needs[2:], parts, (mul, add)):
        if need:  # (B * n_chunks, K, C) -> (C, k, k), or (B, C, k, k) for per-sample filters
            total = part.sum(0) if ghost.ndim == 3 else part.view(s.B, n_chunks, K, s.C).sum(1)
            grads.append(total.transpose(-1, -2).reshape(ghost.shape))
        else:
            grads.append(None)
    return grads


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
        self.constants = dict(k=kernel_size, DIL=dilation, STRIDE=stride, D=D, BD=triton.next_power_of_2(D))
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
        return self.B * triton.cdiv(H, config["BY"]) * triton.cdiv(W, config["BX"]), self.G


def _pixel_strides(logits):
    """(sample, channel, pixel) strides if rows follow each other at the pixel stride, as in both NCHW and NHWC memory."""
    b, c, y, x = logits.stride()
    Ho, Wo = logits.shape[2:]
    pixel = x if Wo > 1 else y
    return (b, c, pixel) if Ho <= 1 or Wo <= 1 or y == Wo * x else None
