"""What Triton's interpreter lets pass, and a GPU may not: it is watched while tests run kernels in it."""
import contextlib
from unittest import mock

SAME_FOR_ALL_SAMPLES = ("p_weight", "p_bias", "p_dweight")


@contextlib.contextmanager
def watched():
    """In this block a kernel fails that reads or writes outside its tensors, or takes a sample's distance in 32 bits.

    A tensor reaches from its first element to its last. The distance of a sample is the first thing that a kernel adds
    to a pointer: the product of its index with a stride passes 2**31 in large batches.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    extents, bases, shared = [], {}, set()  # (first, behind the last) byte; handles by identity; addresses
    to_host, convert = interpreter.GridExecutor._init_args_hst, interpreter._implicit_cvt
    addptr, splat = builder.create_addptr, builder.create_splat
    load, store = builder.create_masked_load, builder.create_masked_store

    def start_launch(self, arguments, options):
        result = to_host(self, arguments, options)
        bases.clear()
        tensors = {name: x for name, x in zip(self.arg_names, result[0]) if hasattr(x, "data_ptr") and x.numel()}
        shared.clear()
        shared.update(x.data_ptr() for name, x in tensors.items() if name in SAME_FOR_ALL_SAMPLES)
        extents.clear()
        for first, end in sorted(_extent(x) for x in tensors.values()):
            if extents and first < extents[-1][1]:  # slices of one tensor
                extents[-1] = extents[-1][0], max(end, extents[-1][1])
            else:
                extents.append((first, end))
        return result

    def convert_argument(argument):
        result = convert(argument)
        if hasattr(argument, "data_ptr") and argument.numel() and argument.data_ptr() not in shared:
            bases[id(result.handle)] = result.handle
        return result

    def add(pointer, offset):
        if id(pointer) in bases:
            assert offset.data.dtype.itemsize == 8, f"a sample's distance is of {offset.data.dtype}"
        return addptr(pointer, offset)

    def spread(shape, handle):
        result = splat(shape, handle)
        if id(handle) in bases:
            bases[id(result)] = result
        return result

    def check(pointers, mask):
        addresses = pointers.data[mask.data]
        if addresses.size:
            first, last = int(addresses.min()), int(addresses.max())
            end = last + pointers.get_element_ty().primitive_bitwidth // 8
            inside = any(low <= first and end <= high for low, high in extents)
            assert inside, f"bytes {first} to {end} are in none of {extents}"

    def checked_load(pointers, mask, *rest):
        check(pointers, mask)
        return load(pointers, mask, *rest)

    def checked_store(pointers, value, mask, *rest):
        check(pointers, mask)
        return store(pointers, value, mask, *rest)

    patched = dict(create_addptr=add, create_splat=spread, create_masked_load=checked_load,
                   create_masked_store=checked_store)
    with contextlib.ExitStack() as stack:
        for name, function in patched.items():
            stack.enter_context(mock.patch.object(builder, name, function))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "_init_args_hst", start_launch))
        stack.enter_context(mock.patch.object(interpreter, "_implicit_cvt", convert_argument))
        yield


def _extent(x):
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
    return x.data_ptr(), x.data_ptr() + span * x.element_size()
