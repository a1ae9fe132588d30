"""PTX's types as NumPy arrays. A register is an array of unsigned integers, one a thread, read as what is asked for."""
import re

import numpy as np

TYPE = re.compile(r"[usbf](8|16|32|64)|pred|bf16|(bf|f|s|u)16x2|tf32")
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


def bits_of(name):
    """"s32" -> 32"""
    return int(re.search(r"\d+", name)[0])


def dtype_of(name):
    """A type's NumPy dtype; those of bfloat16 and the packed ones, which NumPy has not, are not asked for."""
    if name == "pred":
        return np.bool_
    return {"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOAT}[name[0]][int(name[1:])]


def from_bf16(bits):
    """uint16 -> float32"""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x):
    """float32 -> uint16, to the nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    last = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + last) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_f16(bits):
    """uint16 -> float32"""
    return bits.view(np.float16).astype(np.float32)


def to_f16(x):
    """float32 -> uint16, to the nearest, ties to even."""
    return x.astype(np.float16).view(np.uint16)


def from_s16(bits):
    """uint16 -> int16"""
    return bits.view(np.int16)


def to_16(x):
    """(u)int16 -> uint16"""
    return x.astype(np.uint16)


READ_16_BITS = {"bf16": from_bf16, "f16": from_f16, "bf16x2": from_bf16, "f16x2": from_f16,
                "s16x2": from_s16, "u16x2": to_16}
WRITE_16_BITS = {"bf16": to_bf16, "f16": to_f16, "bf16x2": to_bf16, "f16x2": to_f16, "s16x2": to_16, "u16x2": to_16}


def halves(x):
    """uint32 -> its low and high 16 bits."""
    return (x & np.uint32(0xFFFF)).astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)


def joined(low, high):
    """The reverse of halves."""
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
