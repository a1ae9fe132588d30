"""Global and shared memory, and what they refuse: addresses, and accesses that nothing orders."""
import ctypes

import numpy as np
import torch

SEVERAL = 1 << 30  # stands for more than one program, or more than one warp


class Fault(RuntimeError):
    """The kernel did what a GPU, or compute-sanitizer, would not let pass.

    bad: of the threads that took part the ones that did it, booleans, or None for all.
    """

    def __init__(self, what, bad=None):
        super().__init__(what)
        self.bad = bad


def extents(tensors):
    """[(first, behind the last) address] of what the tensors' elements reach, those that overlap as one."""
    found = []
    for x in sorted((x for x in tensors if x.numel()), key=torch.Tensor.data_ptr):
        span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
        first, end = x.data_ptr(), x.data_ptr() + span * x.element_size()
        if found and first < found[-1][1]:  # slices of one tensor
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return found


class GlobalMemory:
    """The tensors that were passed to a kernel, for the time of one launch.

    writer: of each byte the thread that wrote it, counted through the grid, or -1; reader: the program that read it.
    """

    def __init__(self, tensors):
        found = extents(tensors)
        self.first = np.array([first for first, _ in found], np.uint64)
        self.end = np.array([end for _, end in found], np.uint64)
        self.bytes = [np.frombuffer((ctypes.c_uint8 * (end - first)).from_address(first), np.uint8)
                      for first, end in found]
        self.writer = [np.full(len(data), -1, np.int64) for data in self.bytes]
        self.reader = [np.full(len(data), -1, np.int64) for data in self.bytes]

    def read(self, addresses, width, programs, threads_per_program):
        """(threads, width) bytes."""
        out = np.empty((len(addresses), width), np.uint8)
        for n, here, where in self._places(addresses, width):
            out[here] = self.bytes[n][where]
            readers = programs[here][:, None]
            writer = self.writer[n][where]
            refuse((writer >= 0) & (writer // threads_per_program != readers),
                   "a program reads what another wrote", here)
            before = self.reader[n][where]
            self.reader[n][where] = np.where((before >= 0) & (before != readers), SEVERAL, readers)
            self.reader[n][where[self.reader[n][where] != readers]] = SEVERAL  # in this very instruction
        return out

    def write(self, addresses, data, programs, threads_per_program, threads):
        """data: (threads, width) bytes."""
        for n, here, where in self._places(addresses, data.shape[1]):
            owners = (programs * threads_per_program + threads)[here][:, None]
            writer, reader = self.writer[n][where], self.reader[n][where]
            refuse((writer >= 0) & (writer != owners), "two threads write the same byte", here)
            refuse((reader >= 0) & (reader != programs[here][:, None]), "a program writes what another read", here)
            self.writer[n][where] = owners
            refuse(self.writer[n][where] != owners, "two threads write the same byte", here)
            self.bytes[n][where] = data[here]

    def _places(self, addresses, width):
        """Yields (index of a tensor, the threads that access it, (threads, width) places in it)."""
        bad = addresses % np.uint64(width) != 0
        if bad.any():
            raise Fault(f"an address that is not a multiple of {width}, {int(addresses[bad][0]):#x}", bad)
        which = np.searchsorted(self.first, addresses, "right") - 1
        inside = which >= 0
        which = np.maximum(which, 0)
        if len(self.first):
            inside &= addresses + np.uint64(width) <= self.end[which]
        if not inside.all() or not len(self.first):
            tensors = ", ".join(f"{int(first):#x} to {int(end):#x}" for first, end in zip(self.first, self.end))
            raise Fault(f"global memory outside of every tensor, {int(addresses[~inside][0]):#x}, where tensors are at "
                        f"{tensors or 'no address'}", ~inside)
        for n in np.unique(which):
            here = which == n
            yield n, here, (addresses[here] - self.first[n]).astype(np.int64)[:, None] + np.arange(width)


def refuse(wrong, what, here=None):
    """Raises a Fault if any of `wrong`, (threads, ...), is set; here: the threads among those that took part."""
    if wrong.any():
        bad = wrong.reshape(len(wrong), -1).any(1)
        if here is not None:
            bad, among = np.zeros(len(here), bool), bad
            bad[here] = among
        raise Fault(what, bad)


class SharedMemory:
    """The shared memory of several programs, `limit` bytes each, one after the other in flat arrays.

    An access is ordered after another if a barrier lies between or the same warp made both. So of each byte is known
    who wrote and read it last, (epoch, warp): the epoch of a program is the number of its barriers so far.

    in_flight: an asynchronous copy to it has not been waited for. product: the number of products of four warps that
    may still read it. hidden: it was stored to and no fence has shown it to such products since.
    """

    def __init__(self, programs, limit):
        self.limit = limit
        self.size = -(-max(limit, 16) // 16) * 16
        self.bytes = np.zeros(programs * self.size, np.uint8)
        self.written, self.in_flight, self.hidden = (np.zeros(len(self.bytes), bool) for _ in range(3))
        self.product = np.zeros(len(self.bytes), np.int32)
        self.epoch = np.zeros(programs, np.int32)
        self.last_write = np.full((2, len(self.bytes)), -1, np.int32)
        self.last_read = np.full((2, len(self.bytes)), -1, np.int32)

    def places(self, addresses, width, programs):
        """(threads, width) indices into the flat arrays."""
        addresses = addresses.astype(np.int64)
        bad = (addresses % width != 0) | (addresses + width > self.limit)
        if bad.any():
            raise Fault(f"address {int(addresses[bad][0])} of {self.limit} bytes of shared memory is outside or not a "
                        f"multiple of {width}", bad)
        return (programs * self.size + addresses)[:, None] + np.arange(width)

    def read(self, where, programs, warps):
        """(threads, width) bytes."""
        self._check_ready(where)
        epoch, warps = self._marks(where, programs, warps)
        refuse((self.last_write[0][where] == epoch) & (self.last_write[1][where] != warps),
               "shared memory that another warp wrote since the last barrier is read")
        self._mark(self.last_read, where, epoch, warps)
        return self.bytes[where]

    def write(self, where, data, programs, warps):
        self._check_order(where, programs, warps)
        refuse(self.in_flight[where], "shared memory is written while an asynchronous copy to it is in flight")
        self._store(where, data, programs, warps)

    def start_copy(self, where, programs, warps):
        self._check_order(where, programs, warps)
        refuse(self.in_flight[where], "two asynchronous copies to the same shared memory are in flight")
        self.in_flight[where] = True

    def finish_copy(self, where, data, programs, warps):
        """Of a copy no fence is asked for before wgmma reads it: Triton 3.6 sets none there, later ones do."""
        self.in_flight[where] = False
        hidden = self.hidden[where]
        self._store(where, data, programs, warps)
        self.hidden[where] = hidden

    def read_matrix(self, where, programs):
        """(groups of four warps, ...) 16-bit elements for a product. Whoever wrote them, three warps did not."""
        self._check_ready(where)
        refuse(self.hidden[where], "shared memory that no fence.proxy.async has shown to wgmma is read by it")
        refuse(self.last_write[0][where] == self.epoch[programs][:, None, None],
               "shared memory that another warp wrote since the last barrier is read by wgmma")
        self.product[where] += 1
        return self.bytes.view(np.uint16)[where // 2]

    def finish_product(self, where):
        self.product[where] -= 1

    def fence(self, programs):
        """Shows all that was written so far to products. Of a real fence, each writing thread would need its own."""
        self.hidden.reshape(-1, self.size)[programs] = False

    def _check_ready(self, where):
        refuse(self.in_flight[where], "shared memory is read while an asynchronous copy to it is in flight")
        refuse(~self.written[where], "shared memory that nobody wrote is read")

    def _check_order(self, where, programs, warps):
        epoch, warps = self._marks(where, programs, warps)
        for table, what in ((self.last_read, "read"), (self.last_write, "wrote")):
            refuse((table[0][where] == epoch) & (table[1][where] != warps),
                   f"shared memory that another warp {what} since the last barrier is written")
        refuse(self.product[where] > 0, "shared memory is written while a product that was not waited for may read it")

    def _store(self, where, data, programs, warps):
        epoch, warps = self._marks(where, programs, warps)
        self._mark(self.last_write, where, epoch, warps)
        self.written[where] = self.hidden[where] = True
        self.bytes[where] = data
        # All that hold a number may write it. Within a warp it may differ: where a sum over threads ends in a fused
        # multiply-add, theirs are rounded differently.
        refuse((self.last_write[1][where] == SEVERAL) & (self.bytes[where] != data),
               "two warps write different numbers to the same shared memory")

    def _marks(self, where, programs, warps):
        """Epochs and warps of the threads, spread over `where`."""
        shape = (-1,) + (1,) * (where.ndim - 1)
        return (np.broadcast_to(x.reshape(shape), where.shape) for x in (self.epoch[programs], warps.astype(np.int32)))

    @staticmethod
    def _mark(table, where, epoch, warps):
        """Notes who was here last; SEVERAL warps in an epoch, of this instruction or earlier ones, are one of them."""
        others = (table[0][where] == epoch) & (table[1][where] != warps)
        table[0][where], table[1][where] = epoch, warps
        table[1][where[others | (table[1][where] != warps)]] = SEVERAL
