"""Device, which Triton takes for its active driver."""
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from . import counting, executing
from .decoding import Program

SHARED_MEMORY = {80: 166912, 90: 232448}  # bytes that a program may have, by compute capability


class Device:
    """A simulated GPU, for as long as the block lasts.

    capability: 80 or 90, for example. programs: run only so many of each launch, in order to count; what the kernels
    give is then incomplete.

    launches: a dict of counts for each launch, in order. index: the current device's, as of torch.cuda.set_device.
    """

    def __init__(self, capability, programs=None):
        self.capability, self.programs, self.index, self.launches = capability, programs, 0, []
        self._decoded = {}

    def __enter__(self):
        self._before = driver._active, knobs.runtime.add_stages_inspection_hook
        driver.set_active(_Driver(self))
        knobs.runtime.add_stages_inspection_hook = _without_assembler
        return self

    def __exit__(self, *error):
        driver._active, knobs.runtime.add_stages_inspection_hook = self._before  # reset_active() would look for a GPU

    def launch(self, name, digest, threads, shared, grid, arguments):
        """arguments: [(Triton's type, tensor or number)]"""
        if digest not in self._decoded:
            with open(get_cache_manager(digest).get_file(f"{name}.ptx")) as file:
                self._decoded[digest] = Program(file.read())
        tensors = [value for _, value in arguments if isinstance(value, torch.Tensor)]
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for _, value in arguments]
        counts = executing.launch(self._decoded[digest], grid, threads, shared, values, tensors, self.programs)
        self.launches.append(dict(kernel=name, index=self.index, grid=grid, threads=threads, shared=shared, **counts))

    def table(self, units=lambda launch: launch["programs"]):
        """What binds each kernel, see :func:`counting.table`."""
        return counting.table(self.launches, units)


def _without_assembler(backend=None, stages=None, options=None, language=None, capability=None):
    """Triton calls this for a key of its cache, in which what is made here is thereby apart, and to change its steps.

    The assembler's work, the longest of the steps, is not needed.
    """
    if stages is not None:
        stages["cubin"] = lambda source, metadata: b"simulated"
    return "simulated", "simulated"


def _launcher(source, metadata):
    """What Triton calls to launch a compiled kernel. It outlives the Device it was made for, so it asks for the present
    one."""
    constants = {path[0] for path in source.constants if len(path) == 1}
    kinds = source.signature.values()

    def launch(x, y, z, *given):
        arguments = given[-len(kinds):]
        kept = [(kind, value) for i, (kind, value) in enumerate(zip(kinds, arguments))
                if kind != "constexpr" and i not in constants]
        threads = metadata.num_warps * 32
        driver.active.device.launch(metadata.name, metadata.hash, threads, metadata.shared, (x, y, z), kept)
    return launch


class _Driver(DriverBase):
    """Also its own `utils`, which loads what was compiled."""

    def __init__(self, device):
        self.device, self.utils, self.launcher_cls = device, self, _launcher

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return GPUTarget("cuda", self.device.capability, 32)

    def get_current_device(self):
        """Triton keeps what it compiled, and what it asked about a device, by this."""
        return self.device.capability, self.device.index

    def set_current_device(self, device):
        self.device.index = device[1]

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        raise RuntimeError("a simulated GPU has no clock")

    def get_empty_cache_for_benchmark(self):
        raise RuntimeError("a simulated GPU has no clock")

    def clear_cache(self, cache):
        pass

    def map_python_to_cpp_type(self, kind):
        return kind

    # utils

    def load_binary(self, name, kernel, shared, device):
        """(module, function, registers of a thread, bytes spilled, most threads of a program): the latter three are
        the assembler's to say, and stand for anything that fits."""
        return 1, 2, 32, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return dict(max_shared_mem=SHARED_MEMORY[self.device.capability], multiprocessor_count=108, warpSize=32,
                    max_num_regs=65536, sm_clock_rate=1, mem_clock_rate=1, mem_bus_width=1)
