"""The simulated GPU's instructions against their definitions in the PTX manual."""
import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from assembly import each, place, run

RANDOM = np.random.default_rng(0)
EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
SPECIAL = [0.0, -0.0, 1.0, -1.5, 2.5, 3.5, -2.5, 1e-3, 255.5, 1e30, -1e30, math.inf, -math.inf, math.nan]


def signed(x, bits=32):
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> bits - 1 else x


def integers(count, bits=32):
    """Arrays of equal length of all pairs, or triples, of edges and of random numbers."""
    pairs = np.array(list(itertools.product(EDGES, EDGES)), np.uint64)
    columns = [pairs[:, n % 2] if n < 2 else RANDOM.permutation(pairs[:, 0]) for n in range(count)]
    return [np.concatenate([column, RANDOM.integers(0, 2 ** bits, 100, np.uint64)]).astype(f"uint{bits}")
            for column in columns]


def divided(a, b):
    """Towards zero."""
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


def extracted(a, at, length, sign):
    """bfe as the manual's program has it."""
    at, length = at & 255, length & 255
    bit = lambda n: a >> n & 1
    fill = bit(min(at + length - 1, 31)) if sign and length else 0
    return sum((bit(at + n) if n < length and at + n <= 31 else fill) << n for n in range(32))


def inserted(a, b, at, length):
    at, length = at & 255, length & 255
    for n in range(length):
        if at + n <= 31:
            b = b & ~(1 << at + n) | (a >> n & 1) << at + n
    return b


def permuted(a, b, selector):
    taken = bytes(a.to_bytes(4, "little") + b.to_bytes(4, "little"))
    out = []
    for n in range(4):
        nibble = selector >> 4 * n & 15
        byte = taken[nibble & 7]
        out.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


INTEGERS = {
    "add.s32 {d}, {0}, {1};": lambda a, b: a + b,
    "sub.s32 {d}, {0}, {1};": lambda a, b: a - b,
    "mul.lo.s32 {d}, {0}, {1};": lambda a, b: a * b,
    "mul.hi.u32 {d}, {0}, {1};": lambda a, b: a * b >> 32,
    "mul.hi.s32 {d}, {0}, {1};": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.lo.s32 {d}, {0}, {1}, {2};": lambda a, b, c: a * b + c,
    "div.s32 {d}, {0}, {1};": lambda a, b: divided(signed(a), signed(b)) if b else None,
    "div.u32 {d}, {0}, {1};": lambda a, b: a // b if b else None,
    "rem.s32 {d}, {0}, {1};": lambda a, b: signed(a) - divided(signed(a), signed(b)) * signed(b) if b else None,
    "rem.u32 {d}, {0}, {1};": lambda a, b: a % b if b else None,
    "shl.b32 {d}, {0}, {1};": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 {d}, {0}, {1};": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32 {d}, {0}, {1};": lambda a, b: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 {d}, {0}, {1}, {2};": lambda a, b, c: ((b << 32 | a) << c % 32) >> 32,
    "shf.r.clamp.b32 {d}, {0}, {1}, {2};": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 {d}, {0}, {1}, {2};": lambda a, at, length: extracted(a, at, length, False),
    "bfe.s32 {d}, {0}, {1}, {2};": lambda a, at, length: extracted(a, at, length, True),
    "bfi.b32 {d}, {0}, {1}, {2}, {3};": inserted,
    "prmt.b32 {d}, {0}, {1}, {2};": permuted,
    "lop3.b32 {d}, {0}, {1}, {2}, 0xCA;": lambda a, b, c: a & b | ~a & c,
    "lop3.b32 {d}, {0}, {1}, {2}, 0x96;": lambda a, b, c: a ^ b ^ c,
    "popc.b32 {d}, {0};": lambda a: bin(a).count("1"),
    "not.b32 {d}, {0};": lambda a: ~a,
    "neg.s32 {d}, {0};": lambda a: -a,
    "abs.s32 {d}, {0};": lambda a: abs(signed(a)),
    "min.s32 {d}, {0}, {1};": lambda a, b: min(signed(a), signed(b)),
    "min.u32 {d}, {0}, {1};": min,
    "max.s32 {d}, {0}, {1};": lambda a, b: max(signed(a), signed(b)),
    "cvt.s32.s16 {d}, {0};": lambda a: signed(a, 16),
    "cvt.u32.u8 {d}, {0};": lambda a: a & 255,
    "setp.lt.s32 %p1, {0}, {1}; selp.b32 {d}, {0}, {1}, %p1;": lambda a, b: a if signed(a) < signed(b) else b,
    "setp.lo.u32 %p1, {0}, {1}; selp.b32 {d}, {0}, {1}, %p1;": min,
    "setp.ge.u32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1;": lambda a, b: a >= b,
    "setp.ne.b32 %p1, {1}, 0; setp.gt.and.s32 %p2, {0}, -1, %p1; selp.b32 {d}, 1, 0, %p2;":
        lambda a, b: signed(a) > -1 and b != 0,
    "mov.b32 {{%rs1, %rs2}}, {0}; mov.b32 {d}, {{%rs2, %rs1}};": lambda a: a >> 16 | a << 16,
    "@%p9 mov.b32 {d}, {0}; setp.eq.b32 %p1, {1}, 7; @!%p1 mov.b32 {d}, {1};": lambda a, b: a if b == 7 else b,
}


@pytest.mark.parametrize("text", INTEGERS)
def test_integers(text):
    inputs = integers(1 + max(int(n) for n in "0123" if f"{{{n}}}" in text))
    got = each("setp.eq.b32 %p9, 0, 0; " + text, *inputs, result=np.uint32)
    for *given, one in zip(*(x.tolist() for x in inputs), got.tolist()):
        want = INTEGERS[text](*given)
        assert want is None or one == want & 0xFFFFFFFF, (text, given, one, want)


WIDE = {
    "mul.wide.u32 {d}, {0}, {1};": lambda a, b: a * b,
    "mul.wide.s32 {d}, {0}, {1};": lambda a, b: signed(a) * signed(b),
    "cvt.s64.s32 {d}, {0};": lambda a: signed(a), "cvt.u64.u32 {d}, {0};": lambda a: a,
    "cvt.s64.s32 %rd1, {0}; cvt.s64.s32 %rd2, {1}; div.s64 {d}, %rd1, %rd2;":
        lambda a, b: divided(signed(a), signed(b)) if b else None,
    "cvt.s64.s32 %rd1, {0}; shl.b64 {d}, %rd1, 40;": lambda a: signed(a) << 40,
    "cvt.s64.s32 %rd1, {0}; mad.wide.s32 {d}, {0}, {1}, %rd1;": lambda a, b: signed(a) * signed(b) + signed(a),
    "mov.b64 {d}, {{{0}, {1}}};": lambda a, b: a | b << 32,
}


@pytest.mark.parametrize("text", WIDE)
def test_integers_of_64_bits(text):
    inputs = integers(2)
    got = each(text, *inputs, result=np.uint64)
    for a, b, one in zip(*(x.tolist() for x in inputs), got.tolist()):
        want = WIDE[text](*(a, b)[:2 if "{1}" in text else 1])
        assert want is None or one == want & (1 << 64) - 1, (text, a, b, one, want)


def floats(count):
    pairs = np.array(list(itertools.product(SPECIAL, SPECIAL)), np.float32)
    columns = [pairs[:, n % 2] if n < 2 else RANDOM.permutation(pairs[:, 0]) for n in range(count)]
    return [np.concatenate([x, (RANDOM.standard_normal(200) * 8).astype(np.float32)]) for x in columns]


FLOATS = {
    "add.rn.f32 {d}, {0}, {1};": lambda a, b: a + b, "sub.f32 {d}, {0}, {1};": lambda a, b: a - b,
    "mul.f32 {d}, {0}, {1};": lambda a, b: a * b, "div.full.f32 {d}, {0}, {1};": lambda a, b: a / b,
    "fma.rn.f32 {d}, {0}, {1}, {2};": lambda a, b, c: np.longdouble(a) * np.longdouble(b) + np.longdouble(c),
    "neg.f32 {d}, {0};": lambda a: -a, "abs.f32 {d}, {0};": np.abs, "ex2.approx.f32 {d}, {0};": np.exp2,
    "lg2.approx.f32 {d}, {0};": np.log2, "rcp.rn.f32 {d}, {0};": lambda a: 1 / a, "sqrt.rn.f32 {d}, {0};": np.sqrt,
    "rsqrt.approx.f32 {d}, {0};": lambda a: 1 / np.sqrt(a),
    "max.f32 {d}, {0}, {1};": np.fmax, "min.f32 {d}, {0}, {1};": np.fmin,
    "max.NaN.f32 {d}, {0}, {1};": np.maximum, "min.NaN.f32 {d}, {0}, {1};": np.minimum,
    "copysign.f32 {d}, {0}, {1};": lambda a, b: np.copysign(b, a),
    "add.f32 {d}, {0}, 0f3FC00000;": lambda a: a + np.float32(1.5),
    "cvt.rni.f32.f32 {d}, {0};": np.rint, "cvt.rmi.f32.f32 {d}, {0};": np.floor, "cvt.rpi.f32.f32 {d}, {0};": np.ceil,
    "cvt.rn.f16.f32 %rs1, {0}; cvt.f32.f16 {d}, %rs1;": lambda a: a.astype(np.float16),
    "cvt.sat.f32.f32 {d}, {0};": lambda a: np.where(np.isnan(a), 0, np.clip(a, 0, 1)),
}


@pytest.mark.parametrize("text", FLOATS)
def test_floats(text):
    inputs = floats(1 + max(int(n) for n in "012" if f"{{{n}}}" in text))
    with np.errstate(all="ignore"):
        want = np.asarray(FLOATS[text](*inputs)).astype(np.float32)
        np.testing.assert_array_equal(each(text, *inputs, result=np.float32), want)


def test_double():
    a, b, c = (x.astype(np.float64) / 3 for x in floats(3))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(each("fma.rn.f64 {d}, {0}, {1}, {2};", a, b, c, result=np.float64), a * b + c)
        got = each("cvt.rn.f32.f64 %r1, {0}; cvt.f64.f32 {d}, %r1;", a, result=np.float64)
        np.testing.assert_array_equal(got, a.astype(np.float32).astype(np.float64))


@pytest.mark.parametrize("name", ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num",
                                  "nan"))
def test_comparisons_of_what_has_no_order(name):
    a, b = floats(2)
    got = each(f"setp.{name}.f32 %p1, {{0}}, {{1}}; selp.b32 {{d}}, 1, 0, %p1;", a, b, result=np.uint32)
    for x, y, one in zip(a.tolist(), b.tolist(), got.tolist()):
        if math.isnan(x) or math.isnan(y):
            want = name == "nan" or name in ("equ", "neu", "ltu", "leu", "gtu", "geu")
        else:
            want = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y, "nu": True,
                    "na": False}[name[:2]]
        assert one == want, (name, x, y)


def bits16(x, dtype):
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)


def ties():
    """float32 numbers of which many lie in the middle between two bfloat16 numbers."""
    bits = RANDOM.integers(0, 2 ** 32, 500, np.uint64).astype(np.uint32)
    bits[::2] = bits[::2] & np.uint32(0xFFFF0000) | np.uint32(0x8000)
    x = bits.view(np.float32)
    return np.ascontiguousarray(x[~np.isnan(x)])


def test_rounding_to_16_bits():
    every_bit_set = np.array([0x7FFFFFFF], np.uint32).view(np.float32)  # a NaN that rounding up would make a zero
    x = np.concatenate([floats(1)[0], ties(), every_bit_set])
    numbers = ~np.isnan(x)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        with np.errstate(all="ignore"):
            got = each(f"cvt.rn.{name}.f32 {{d}}, {{0}};", x, result=np.uint16)
            np.testing.assert_array_equal(got[numbers], bits16(x, dtype)[numbers])
            packed = each(f"cvt.rn.{name}x2.f32 {{d}}, {{0}}, {{1}};", x, np.flip(x).copy(), result=np.uint32)
        high, low = packed >> 16, packed & 0xFFFF  # the first operand goes to the high half
        np.testing.assert_array_equal(high[numbers], bits16(x, dtype)[numbers])
        np.testing.assert_array_equal(low[numbers[::-1]], bits16(np.flip(x).copy(), dtype)[numbers[::-1]])
    back = torch.from_numpy(each("cvt.f32.bf16 {d}, {0};", bits16(x, torch.bfloat16), result=np.float32))
    assert torch.equal(back.nan_to_num(7), torch.from_numpy(x).bfloat16().float().nan_to_num(7))
    assert np.isnan(each("cvt.rn.bf16.f32 %rs1, {0}; cvt.f32.bf16 {d}, %rs1;", x, result=np.float32)[~numbers]).all()


def test_arithmetic_in_16_bits():
    a, b, c = (torch.randn(96).bfloat16() for _ in range(3))
    bits = [x.view(torch.int16).numpy().view(np.uint16) for x in (a, b, c)]
    got = each("fma.rn.bf16 {d}, {0}, {1}, {2};", *bits, result=np.uint16)
    want = bits16((a.double() * b.double() + c.double()).numpy(), torch.bfloat16)
    np.testing.assert_array_equal(got, want)
    packed = [x.view(np.uint32) for x in bits]
    got = each("fma.rn.bf16x2 {d}, {0}, {1}, {2};", *packed, result=np.uint32).view(np.uint16)
    np.testing.assert_array_equal(got, want)
    got = each("setp.lt.bf16 %p1, {0}, {1}; selp.b16 {d}, 1, 0, %p1;", *bits[:2], result=np.uint16)
    np.testing.assert_array_equal(got, (a < b).numpy())
    got = each("add.s16x2 {d}, {0}, {1};", *packed[:2], result=np.uint32).view(np.uint16)  # nothing is carried over
    np.testing.assert_array_equal(got, bits[0] + bits[1])
    for name, numbers in (("s16x2", np.int16), ("u16x2", np.uint16)):
        got = each(f"max.{name} {{d}}, {{0}}, {{1}};", *packed[:2], result=np.uint32).view(numbers)
        np.testing.assert_array_equal(got, np.maximum(bits[0].view(numbers), bits[1].view(numbers)))


@pytest.mark.parametrize("name,bits,low,high", [("s32", 32, -2 ** 31, 2 ** 31 - 1), ("u32", 32, 0, 2 ** 32 - 1)])
def test_floats_beyond_the_range_of_integers(name, bits, low, high):
    x = np.concatenate([floats(1)[0], np.array([2 ** 31, -2 ** 31, 2 ** 32, 2 ** 31 - 128, -1], np.float32)])
    got = each(f"cvt.rzi.{name}.f32 {{d}}, {{0}};", x, result=np.uint32)
    for one, number in zip(got.tolist(), x.tolist()):
        want = 0 if math.isnan(number) else max(low, min(high, number))
        assert one == int(want) & 0xFFFFFFFF, (number, one)


@pytest.mark.parametrize("mode", ("bfly", "idx", "down", "up"))
def test_shuffles(mode):
    value = np.arange(100, 164, dtype=np.uint32)
    out = np.zeros((2, 64), np.uint32)
    for by in (0, 1, 5, 16, 31):
        run(f"{place(0, 4)} ld.global.b32 %r1, [%rd99];"
            f"shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {0 if mode == 'up' else 31}, -1;"
            f"selp.b32 %r3, 1, 0, %p1; {place(1, 4)} st.global.b32 [%rd99], %r2; st.global.b32 [%rd99 + 256], %r3;",
            value, out, threads=64)
        for lane in range(64):
            other = {"bfly": lane % 32 ^ by, "idx": by, "down": lane % 32 + by, "up": lane % 32 - by}[mode]
            inside = 0 <= other < 32
            assert out[1, lane] == inside, (mode, by, lane)
            assert out[0, lane] == 100 + (lane // 32 * 32 + other if inside else lane), (mode, by, lane)


def test_loads_extend_signs_and_vectors_go_from_low_to_high_addresses():
    source, out = np.arange(-64, 64, dtype=np.int8), np.zeros((32, 4), np.int32)
    run(f"{place(0, 4)} ld.global.s8 %r1, [%rd99]; ld.global.u8 %r2, [%rd99 + 1]; ld.global.s16 %r3, [%rd99 + 2];"
        f"mov.b32 %r4, 9; {place(1, 16)} st.global.v4.b32 [%rd99], {{%r1, %r2, %r3, %r4}};"
        f"ld.global.v2.b32 {{%r5, %r6}}, [%rd99 + 8]; st.global.v2.b32 [%rd99 + 8], {{%r6, %r5}};", source, out)
    want = np.stack([source[::4], source.view(np.uint8)[1::4], np.full(32, 9), source.view(np.int16)[1::2]], 1)
    np.testing.assert_array_equal(out, want)


def test_a_register_that_is_set_before_a_load_counts_if_the_load_may_be_skipped():
    source, out = np.arange(32, dtype=np.uint64), np.zeros(32, np.uint64)
    moves = lambda text: run(f"{place(0, 8)} setp.lt.u32 %p1, %r0, 8; {text} {place(1, 8, '%rd98')}"
                             "st.global.b64 [%rd98], %rd1;", source, out)["instructions"]["move"]
    without = moves("ld.global.b64 {%rd1}, [%rd99];")
    assert moves("mov.b64 %rd1, 9; ld.global.b64 {%rd1}, [%rd99];") == without and out.tolist() == source.tolist()
    assert moves("mov.b64 %rd1, %rd99; ld.global.b64 {%rd1}, [%rd1 + 0];") == without + 1
    assert out.tolist() == source.tolist()
    assert moves("mov.b64 %rd1, 9; @%p1 ld.global.b64 {%rd1}, [%rd99];") == without + 1
    assert out.tolist() == [*range(8), *[9] * 24]


def test_threads_that_part_at_branches_meet_again():
    """Each thread counts down from its number; odd ones then add 100; a barrier comes after."""
    out = np.zeros(64, np.uint32)
    run(f"""
        mov.b32 %r1, 0; mov.b32 %r2, %r0; and.b32 %r3, %r0, 1; setp.eq.b32 %p2, %r3, 0;
        $loop:
        setp.eq.b32 %p1, %r2, 0;
        @%p1 bra $done;
        add.s32 %r1, %r1, %r2; sub.s32 %r2, %r2, 1;
        bra.uni $loop;
        $done:
        @%p2 bra $even;
        add.s32 %r1, %r1, 100;
        $even:
        bar.sync 0;
        {place(0, 4)} st.global.b32 [%rd99], %r1;""", out, threads=64)
    assert out.tolist() == [n * (n + 1) // 2 + 100 * (n % 2) for n in range(64)]


def test_programs_know_their_place_in_the_grid():
    """In a grid of 3 x 2 x 2; each writes its own 32 numbers."""
    out = np.zeros((2, 2, 3, 32), np.uint32)
    counts = run(f"""
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.x;
        mov.u32 %r5, %nctaid.y; mov.u32 %r6, %ntid.x; mov.u32 %r7, %laneid;
        mad.lo.s32 %r8, %r3, %r5, %r2; mad.lo.s32 %r8, %r8, %r4, %r1; mad.lo.s32 %r0, %r8, %r6, %r0;
        mul.lo.s32 %r9, %r3, 1000; mad.lo.s32 %r9, %r2, 100, %r9; mad.lo.s32 %r9, %r1, 10, %r9; add.s32 %r9, %r9, %r7;
        {place(0, 4)} st.global.b32 [%rd99], %r9;""", out, grid=(3, 2, 2))
    z, y, x, lane = np.indices(out.shape)
    np.testing.assert_array_equal(out, 1000 * z + 100 * y + 10 * x + lane)
    assert counts["programs"] == 12 and 12 * 128 <= counts["written"] <= 12 * 160  # sectors may stick out
