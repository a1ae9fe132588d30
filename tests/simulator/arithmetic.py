"""Instructions on registers, of each thread alone.

Each is a function of the execution, the instruction and the mask of the threads that take part.
"""
import numpy as np

from .decoding import names
from .values import READ_16_BITS, SIGNED, UNSIGNED, WRITE_16_BITS, bits_of, dtype_of, halves, joined


def elementwise(function):
    """The instruction that computes function(a, ...) of operands in the instruction's type."""
    def execute(threads, i, mask):
        sources = i.operands[1:]
        if i.type.endswith("x2"):
            read, write = READ_16_BITS[i.type], WRITE_16_BITS[i.type]
            lows, highs = zip(*(halves(threads.lanes_of(source, np.uint32)) for source in sources))
            result = joined(write(function(*map(read, lows))), write(function(*map(read, highs))))
        elif i.type == "bf16":
            read, write = READ_16_BITS[i.type], WRITE_16_BITS[i.type]
            result = write(function(*(read(threads.lanes_of(source, np.uint16)) for source in sources)))
        else:
            dtype = dtype_of(i.type)
            result = np.asarray(function(*(threads.value(source, dtype) for source in sources))).astype(dtype)
        threads.write(i.operands[0], result, mask)
    return execute


def multiply_add(a, b, c):
    """Of floats rounded once; of narrow ones in a type that holds the product exactly."""
    if a.dtype.kind != "f" or a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(np.float32)


def remainder(a, b):
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def quotient(a, b):
    """Integers are divided towards zero."""
    if a.dtype.kind == "f":
        return a / b
    return (a - remainder(a, b)) // np.where(b == 0, b.dtype.type(1), b)


def negative(a):
    return -a if a.dtype.kind == "f" else (0 - a).astype(a.dtype)


def minimum(threads, i, mask):
    """The number of the two where the other is NaN, unless .NaN asks for that."""
    elementwise(np.minimum if "NaN" in i.parts or i.type[0] in "us" else np.fmin)(threads, i, mask)


def maximum(threads, i, mask):
    elementwise(np.maximum if "NaN" in i.parts or i.type[0] in "us" else np.fmax)(threads, i, mask)


def bits_set(a):
    return sum((a >> a.dtype.type(bit)) & a.dtype.type(1) for bit in range(8 * a.itemsize))


def population(threads, i, mask):
    threads.write(i.operands[0], bits_set(threads.value(i.operands[1], dtype_of(i.type))).astype(np.uint32), mask)


def product(threads, i, mask):
    """mul and mad: .lo, .hi and .wide of integers; of floats with one rounding for each operation."""
    a, b, *c = i.operands[1:]
    if i.type[0] not in "us":
        return elementwise(multiply_add if c else np.multiply)(threads, i, mask)
    source, bits = dtype_of(i.type), bits_of(i.type)
    if "lo" in i.parts:
        return elementwise(multiply_add if c else np.multiply)(threads, i, mask)
    if bits > 32:
        threads.unknown(i)
    wide = dtype_of(f"{i.type[0]}{2 * bits}")
    result = threads.value(a, source).astype(wide) * threads.value(b, source).astype(wide)
    if "hi" in i.parts:
        result = (result >> wide(bits)).astype(source)
    for operand in c:
        result = result + threads.value(operand, result.dtype)
    threads.write(i.operands[0], result, mask)


def shift(threads, i, mask):
    """By as many bits as the type has or more, everything is shifted out; of signed numbers to the right the sign is
    left."""
    dtype, bits = dtype_of(i.type), bits_of(i.type)
    value, by = threads.value(i.operands[1], dtype), threads.value(i.operands[2], np.uint32)
    most = np.minimum(by, np.uint32(bits - 1)).astype(dtype)
    result = value << most if i.base == "shl" else value >> most
    left = value >> dtype(bits - 1) if i.type[0] == "s" and i.base == "shr" else dtype(0)
    threads.write(i.operands[0], np.where(by >= bits, left, result).astype(dtype), mask)


def field(at, length):
    """A mask of `length` bits from bit `at` on; both are taken from 0 to 255, and bits beyond 31 are lost."""
    at, length = (np.asarray(x, np.uint64) & np.uint64(255) for x in (at, length))
    ones = (np.uint64(1) << np.minimum(length, np.uint64(32))) - np.uint64(1)
    return np.where(at > 31, np.uint64(0), ones << np.minimum(at, np.uint64(31))).astype(np.uint32)


def extract_bits(threads, i, mask):
    """bfe: a signed field is extended by its highest bit, or bit 31 where it reaches beyond."""
    if bits_of(i.type) != 32:
        threads.unknown(i)
    value, at, length = (threads.value(operand, np.uint32) & np.uint32(m)
                         for operand, m in zip(i.operands[1:], (0xFFFFFFFF, 255, 255)))
    shifted = np.where(at > 31, np.uint32(0), value >> np.minimum(at, np.uint32(31)))
    result = shifted & field(0, length)
    if i.type[0] == "s":
        sign_at = np.minimum(at.astype(np.int64) + length - 1, 31)
        sign = (length > 0) & ((value >> np.maximum(sign_at, 0).astype(np.uint32)) & np.uint32(1)).astype(bool)
        there = np.minimum(length, 32 - np.minimum(at, np.uint32(32)))
        result = np.where(sign, result | ~field(0, there), result)
    threads.write(i.operands[0], result.astype(np.uint32), mask)


def insert_bits(threads, i, mask):
    """bfi: the lowest `length` bits of a over those of b from bit `at` on."""
    if bits_of(i.type) != 32:
        threads.unknown(i)
    a, b, at, length = (threads.value(operand, np.uint32) for operand in i.operands[1:])
    where = field(at, length)
    moved = a << np.minimum(at & np.uint32(255), np.uint32(31))
    threads.write(i.operands[0], (b & ~where) | (moved & where), mask)


def permute_bytes(threads, i, mask):
    """prmt: of the eight bytes of a and b four, by a nibble each; its bit 3 spreads the byte's sign instead."""
    a, b, selector = (threads.lanes_of(operand, np.uint32) for operand in i.operands[1:])
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(threads.lanes, np.uint32)
    for n in range(4):
        chosen = (selector >> np.uint32(4 * n)) & np.uint32(15)
        at = (chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8)
        byte = ((both >> at) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(chosen & np.uint32(8), sign, byte) << np.uint32(8 * n)
    threads.write(i.operands[0], result, mask)


def any_logic(threads, i, mask):
    """lop3: a bit of the result is the bit 4a + 2b + c of a table of eight."""
    a, b, c = (threads.value(operand, np.uint32) for operand in i.operands[1:4])
    table, result = int(i.operands[4].rstrip("U"), 0), np.zeros(threads.lanes, np.uint32)
    for n in range(8):
        if table >> n & 1:
            result |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    threads.write(i.operands[0], result, mask)


def funnel(threads, i, mask):
    """shf: the high (.l) or low (.r) 32 bits of b:a shifted by c, .clamp: at most by 32, .wrap: by c % 32."""
    a, b, by = (threads.lanes_of(operand, np.uint32).astype(np.uint64) for operand in i.operands[1:])
    by = by % np.uint64(32) if "wrap" in i.parts else np.minimum(by, np.uint64(32))
    both = a | b << np.uint64(32)
    result = (both << by) >> np.uint64(32) if "l" in i.parts else both >> by
    threads.write(i.operands[0], (result & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask)


UNORDERED_TOO = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
               "ge": np.greater_equal}


def compare(threads, i, mask):
    """setp: a comparison with NaN is false, ne too, and true if its name ends on u."""
    if "|" in i.operands[0]:
        threads.unknown(i)
    if i.type == "bf16":
        a, b = (READ_16_BITS["bf16"](threads.lanes_of(operand, np.uint16)) for operand in i.operands[1:3])
    else:
        a, b = (threads.value(operand, dtype_of(i.type)) for operand in i.operands[1:3])
    unordered = np.isnan(a) | np.isnan(b) if np.asarray(a).dtype.kind == "f" else np.False_
    name, *combined = [part for part in i.modifiers if part != "ftz"]
    if name in ("num", "nan"):
        result = unordered if name == "nan" else ~unordered
    elif name in UNORDERED_TOO:
        result = COMPARISONS[UNORDERED_TOO[name]](a, b) | unordered
    else:
        result = COMPARISONS[UNSIGNED_NAMES.get(name, name)](a, b) & ~unordered
    for part in combined:
        other = threads.value(i.operands[3], np.bool_)
        result = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[part](result, other)
    threads.write(i.operands[0], result, mask)


def select(threads, i, mask):
    dtype = dtype_of(i.type)
    a, b = (threads.value(operand, dtype) for operand in i.operands[1:3])
    threads.write(i.operands[0], np.where(threads.value(i.operands[3], np.bool_), a, b), mask)


def move(threads, i, mask):
    """Also a wide register to or from several narrow ones, the lowest bits first."""
    target, source = i.operands
    dtype = dtype_of(i.type)
    if target.startswith("{"):
        parts, value = names(target), threads.value(source, dtype)
        bits = bits_of(i.type) // len(parts)
        for n, name in enumerate(parts):
            if name != "_":
                threads.write(name, (value >> dtype(n * bits)).astype(UNSIGNED[bits]), mask)
    elif source.startswith("{"):
        parts = names(source)
        bits = bits_of(i.type) // len(parts)
        value = np.zeros(threads.lanes, dtype)
        for n, name in enumerate(parts):
            value |= threads.lanes_of(name, UNSIGNED[bits]).astype(dtype) << dtype(n * bits)
        threads.write(target, value, mask)
    else:
        threads.write(target, threads.value(source, dtype), mask)


ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def convert(threads, i, mask):
    """cvt. A float beyond an integer's range becomes its limit, NaN zero."""
    to, source = i.types
    if to in ("bf16x2", "f16x2"):
        high, low = (threads.lanes_of(operand, np.float32) for operand in i.operands[1:])
        write = WRITE_16_BITS[to]
        return threads.write(i.operands[0], joined(write(low), write(high)), mask)
    if source == "bf16":
        value = READ_16_BITS[source](threads.lanes_of(i.operands[1], np.uint16))
    else:
        value = threads.lanes_of(i.operands[1], dtype_of(source))
    if to == "bf16":
        if source not in ("f32", "f16"):
            threads.unknown(i)
        return threads.write(i.operands[0], WRITE_16_BITS[to](value.astype(np.float32)), mask)
    if "sat" in i.parts:
        if to[0] != "f":
            threads.unknown(i)
        value = np.where(np.isnan(value), value.dtype.type(0), np.clip(value, 0, 1))
    for part in i.modifiers:
        value = ROUNDINGS[part](value) if part in ROUNDINGS else value
    target = dtype_of(to)
    if to[0] in "us" and value.dtype.kind == "f":
        if not any(part in ROUNDINGS for part in i.modifiers):
            threads.unknown(i)
        limits = np.iinfo(target)
        inside = np.where(np.isnan(value) | (value < limits.min) | (value >= float(limits.max)), 0, value)
        result = np.where(value >= float(limits.max), limits.max, inside.astype(target))
        value = np.where(value < limits.min, limits.min, result)
    value = value.astype(target)
    if to == "s8":  # registers have 16 bits at least
        value = value.astype(SIGNED[16])
    threads.write(i.operands[0], value, mask)


ROUND = "rn ftz approx"
# {name: (function, modifiers that are understood, number of types)}
INSTRUCTIONS = {
    "add": (elementwise(np.add), ROUND, 1), "sub": (elementwise(np.subtract), ROUND, 1),
    "mul": (product, f"{ROUND} lo hi wide", 1), "mad": (product, "lo hi wide rn ftz", 1),
    "fma": (elementwise(multiply_add), ROUND, 1),
    "div": (elementwise(quotient), f"{ROUND} full", 1), "rem": (elementwise(remainder), "", 1),
    "neg": (elementwise(negative), "ftz", 1), "abs": (elementwise(np.abs), "ftz", 1),
    "min": (minimum, "NaN ftz", 1), "max": (maximum, "NaN ftz", 1),
    "ex2": (elementwise(np.exp2), ROUND, 1), "lg2": (elementwise(np.log2), ROUND, 1),
    "rcp": (elementwise(lambda a: 1 / a), ROUND, 1), "sqrt": (elementwise(np.sqrt), ROUND, 1),
    "rsqrt": (elementwise(lambda a: 1 / np.sqrt(a)), ROUND, 1), "tanh": (elementwise(np.tanh), ROUND, 1),
    "copysign": (elementwise(lambda a, b: np.copysign(b, a)), "", 1),
    "and": (elementwise(lambda a, b: a & b), "", 1), "or": (elementwise(lambda a, b: a | b), "", 1),
    "xor": (elementwise(lambda a, b: a ^ b), "", 1), "not": (elementwise(lambda a: ~a), "", 1),
    "popc": (population, "", 1), "shl": (shift, "", 1), "shr": (shift, "", 1), "shf": (funnel, "l r wrap clamp", 1),
    "bfe": (extract_bits, "", 1), "bfi": (insert_bits, "", 1), "prmt": (permute_bytes, "", 1),
    "lop3": (any_logic, "", 1), "selp": (select, "", 1), "mov": (move, "", 1),
    "setp": (compare, " ".join(["num nan and or xor ftz", *COMPARISONS, *UNORDERED_TOO, *UNSIGNED_NAMES]), 1),
    "cvt": (convert, " ".join(["rn ftz sat", *ROUNDINGS]), 2)}
