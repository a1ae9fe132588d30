"""Loads, stores and asynchronous copies, of global and shared memory. For the signature see arithmetic.py."""
import numpy as np

from .decoding import names
from .memory import Fault
from .values import UNSIGNED, bits_of, dtype_of


def load(threads, i, mask):
    if "param" in i.parts:
        return _load_parameter(threads, i, mask)
    targets, size = names(i.operands[0]), bits_of(i.type) // 8
    if not mask.any():
        return
    width = size * len(targets)
    if "global" in i.parts:
        data = read_global(threads, threads.address(i.operands[1]), width, mask)
    else:
        where = threads.shared_places(threads.address(i.operands[1], np.uint32), width, mask)
        data = threads.shared.read(where, threads.own[mask], threads.warp[mask])
    values = np.ascontiguousarray(data).view(dtype_of(i.type)).reshape(-1, len(targets))
    for n, name in enumerate(targets):
        if name != "_":
            out = np.zeros(threads.lanes, values.dtype)
            out[mask] = values[:, n]
            threads.write(name, _extended(out, name), mask)


def _extended(value, name):
    """A signed number narrower than its register is extended by its sign."""
    bits = {"%rs": 16, "%rd": 64}.get(name.rstrip("0123456789"), 32)
    return value.astype(f"int{bits}") if value.dtype.kind == "i" and bits > 8 * value.itemsize else value


def _load_parameter(threads, i, mask):
    name = i.operands[1].strip("[] ")
    if name not in threads.parameters:
        raise Fault("a part of a parameter is read, which is not known here")
    bits = bits_of(i.type)
    value = UNSIGNED[bits](threads.parameters[name] & (1 << bits) - 1).view(dtype_of(i.type))
    threads.write(i.operands[0], _extended(value, i.operands[0]), mask)


def read_global(threads, addresses, width, mask):
    """(threads in mask, width) bytes."""
    threads.involved = mask
    addresses, programs = addresses[mask], threads.programs[threads.own[mask]].astype(np.int64)
    threads.counts.global_read(addresses, np.flatnonzero(mask), programs)
    return threads.memory.read(addresses, width, programs, threads.threads)


def store(threads, i, mask):
    if not mask.any():
        return
    unsigned = UNSIGNED[bits_of(i.type)]
    data = np.stack([threads.lanes_of(name, unsigned)[mask] for name in names(i.operands[1])], 1)
    data = np.ascontiguousarray(data).view(np.uint8).reshape(len(data), -1)
    if "global" in i.parts:
        addresses = threads.address(i.operands[0])[mask]
        threads.counts.global_written(addresses, np.flatnonzero(mask))
        programs = threads.programs[threads.own[mask]].astype(np.int64)
        threads.memory.write(addresses, data, programs, threads.threads, threads.thread[mask])
    else:
        where = threads.shared_places(threads.address(i.operands[0], np.uint32), data.shape[1], mask)
        threads.shared.write(where, data, threads.own[mask], threads.warp[mask])


def copy(threads, i, mask):
    """cp.async [to], [from], bytes, bytes to read: zeros where the last is 0. Bytes arrive when they are waited for.

    Groups are those of all threads together: of programs whose loops differ in length, one may see its copies arrive
    before it waited for them.
    """
    if "commit_group" in i.parts:
        threads.copy_groups.append(threads.copies)
        threads.copies = []
    elif "wait_all" in i.parts:
        _finish(threads, [*threads.copy_groups, threads.copies])
        threads.copy_groups, threads.copies = [], []
    elif "wait_group" in i.parts:
        done = max(0, len(threads.copy_groups) - int(i.operands[0]))
        _finish(threads, threads.copy_groups[:done])
        del threads.copy_groups[:done]
    elif mask.any():
        width = int(i.operands[2], 0)
        where = threads.shared_places(threads.address(i.operands[0], np.uint32), width, mask)
        given = threads.lanes_of(i.operands[3], np.uint32) if len(i.operands) > 3 else np.full(threads.lanes, width)
        if not np.isin(given[mask], (0, width)).all():
            raise Fault(f"a copy of a part of {width} bytes, which is not known here")
        read = mask & (given == width)
        data = np.zeros((threads.lanes, width), np.uint8)
        if read.any():
            data[read] = read_global(threads, threads.address(i.operands[1]), width, read)
        threads.involved = mask
        threads.shared.start_copy(where, threads.own[mask], threads.warp[mask])
        threads.copies.append((where, data[mask], threads.own[mask], threads.warp[mask]))


def _finish(threads, groups):
    for group in groups:
        for one in group:
            threads.shared.finish_copy(*one)


SPACE = "global shared shared_cta"
HINTS = "L1_evict_last L1_evict_first L1_no_allocate nc"  # without effect on what is read
INSTRUCTIONS = {
    "ld": (load, f"param volatile v2 v4 {SPACE} {HINTS}", 1), "st": (store, f"v2 v4 {SPACE} {HINTS}", 1),
    "cp": (copy, f"async ca cg commit_group wait_group wait_all {SPACE}", 0)}
