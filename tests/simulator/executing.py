"""Threads: control flow, registers, operands. What an instruction does is in the tables of the other files."""
import numpy as np

from . import arithmetic, matrices, moving
from .counting import Counts
from .memory import Fault, GlobalMemory, SharedMemory
from .values import UNSIGNED

LANES = 1 << 15  # threads that are computed together; a larger grid is done part by part
REGISTER_BITS = {"%p": 1, "%rs": 16, "%rd": 64, "%fd": 64}  # of the others 32, by the names that LLVM gives them
CONTROL = {"bra": "uni", "ret": "", "exit": "", "trap": "", "bar": "sync warp"}  # {name: modifiers}
# These order accesses that are in order here anyway.
NOTHING = {"fence": "acq_rel cta gpu mbarrier_init cluster release", "membar": "cta gl", "nanosleep": ""}
INSTRUCTIONS = {**arithmetic.INSTRUCTIONS, **matrices.INSTRUCTIONS, **moving.INSTRUCTIONS}


def launch(program, grid, threads, shared, arguments, tensors, programs=None):
    """Runs a kernel -> its counts, a dict.

    arguments: numbers and addresses, in the order of the program's parameters; tensors: the memory that it may use.
    programs: run only so many, spread over the grid, in order to count; the results are then incomplete.
    """
    check_known(program)
    parameters = {}
    for (kind, name), value in zip(program.parameters, [*arguments, 0, 0]):  # Triton's last two: scratch memory, unused
        floats = {"f32": (np.float32, np.uint32), "f64": (np.float64, np.uint64)}
        parameters[name] = int(floats[kind][0](value).view(floats[kind][1])) if kind in floats else int(value)
    total = grid[0] * grid[1] * grid[2]
    chosen = np.arange(total)
    if programs is not None and programs < total:
        chosen = np.unique(np.linspace(0, total - 1, programs).astype(int))
    memory, counts = GlobalMemory(tensors), Counts()
    step = max(1, LANES // threads)
    for start in range(0, len(chosen), step):
        Execution(program, chosen[start:start + step], grid, threads, shared, parameters, memory, counts).run()
    return {**counts.result(), "programs": len(chosen)}


def check_known(program):
    """Raises a Fault that names the first instruction that is not known here, with all its modifiers."""
    for i in program.code:
        if i.base in CONTROL or i.base in NOTHING and "proxy" not in i.parts:
            known, count = {**CONTROL, **NOTHING}[i.base], 0
        elif i.base in INSTRUCTIONS:
            known, count = INSTRUCTIONS[i.base][1:]
        else:
            raise unknown(i)
        if not set(i.modifiers) <= set(known.split()) or count not in (None, len(i.types)):
            raise unknown(i)


def unknown(i):
    return Fault(f"an instruction that is not known here: {i.text}")


class Execution:
    """Some programs of one launch, all their threads in lockstep.

    Of threads that part at a branch those at the larger address wait until the others come.
    """

    def __init__(self, program, programs, grid, threads, shared, parameters, memory, counts):
        self.program, self.programs, self.threads, self.parameters = program, programs, threads, parameters
        self.memory, self.counts, self.shared = memory, counts, SharedMemory(len(programs), shared)
        self.lanes = len(programs) * threads
        self.lane = np.arange(self.lanes)
        self.own = self.lane // threads  # which of these programs
        self.thread = self.lane % threads
        self.warp = self.thread // 32
        column, row = programs % grid[0], programs // grid[0] % grid[1]
        of_program = {"x": column, "y": row, "z": programs // (grid[0] * grid[1])}
        self.special = {f"%ctaid.{axis}": value[self.own].astype(np.uint32) for axis, value in of_program.items()}
        self.special |= {f"%nctaid.{axis}": np.uint32(size) for axis, size in zip("xyz", grid)}
        self.special |= {"%tid.x": self.thread.astype(np.uint32), "%tid.y": np.uint32(0), "%tid.z": np.uint32(0),
                         "%ntid.x": np.uint32(threads), "%laneid": (self.lane % 32).astype(np.uint32)}
        self.registers = {}
        self.copies, self.copy_groups = [], []  # asynchronous copies not yet in a group; groups not yet waited for
        self.products, self.product_groups = [], []  # the same of products of four warps
        self.promised = set()  # registers that such products will write
        self.arrived = {}  # {index of a barrier: the threads that wait there for others of their program}
        self.instruction = self.involved = None

    def run(self):
        waiting = {0: np.ones(self.lanes, bool)}  # {index of an instruction: the threads that come to it}
        while waiting:
            at = min(waiting)
            self._run_until_parted(at, waiting.pop(at), waiting)
        for at, mask in self.arrived.items():
            self._refuse_barrier(self.program.code[at], mask)

    def _run_until_parted(self, at, active, waiting):
        def wait(at, mask):
            if mask.any():
                waiting[at] = waiting[at] | mask if at in waiting else mask

        while at < len(self.program.code):
            if at in waiting:
                active = active | waiting.pop(at)
            i = self.instruction = self.program.code[at]
            mask = active & self._guard(i) if i.guard else active
            self.counts.instructions[i.kind] += int(active.reshape(-1, 32).any(1).sum())
            if i.base == "bra":
                wait(self.program.labels[i.operands[0]], mask)
                wait(at + 1, active & ~mask)
                return
            if i.base in ("ret", "exit"):
                active = active & ~mask
            elif i.base == "bar" and "warp" not in i.parts:
                active = self._barrier(i, at, active, mask)
            else:
                self._execute(i, mask)
            if not active.any():
                return
            at += 1
            if waiting and min(waiting) <= at:
                wait(at, active)
                return

    def _guard(self, i):
        name, negated = i.guard
        held = self.value(name, np.bool_)
        return ~held if negated else held

    def _execute(self, i, mask):
        self.involved = mask
        try:
            if i.base == "trap" and mask.any():
                raise Fault("trap")
            if i.base in INSTRUCTIONS and (i.base != "fence" or "proxy" in i.parts):
                with np.errstate(all="ignore"):
                    INSTRUCTIONS[i.base][0](self, i, mask)
        except Fault as fault:
            raise Fault(f"{fault}: {self._place(fault.bad)}{i.text}") from None

    def _place(self, bad):
        lanes = np.flatnonzero(self.involved)
        if bad is not None and len(bad) == len(lanes):
            lanes = lanes[bad]
        if not len(lanes):
            return ""
        first = lanes[0]
        return f"program {self.programs[self.own[first]]}, thread {self.thread[first]} (of {len(lanes)} such threads): "

    def _barrier(self, i, at, active, mask):
        """The threads that go on. Those of programs whose other threads took another branch wait for these."""
        if i.operands[0] != "0" or i.operands[1:] not in ([], [str(self.threads)]):
            raise unknown(i)
        skip = active & ~mask
        if np.isin(self.own[skip], self.own[mask]).any():
            self._refuse_barrier(i, mask)
        come = mask | self.arrived.pop(at, np.False_)
        complete = np.bincount(self.own[come], minlength=len(self.programs)) == self.threads
        self.shared.epoch[complete] += 1
        wait = come & ~complete[self.own]
        if wait.any():
            self.arrived[at] = wait
        return skip | come & ~wait

    def _refuse_barrier(self, i, mask):
        self.involved = mask
        raise Fault(f"a barrier that not all threads of the program reach: {self._place(None)}{i.text}")

    def unknown(self, i):
        raise Fault("an instruction that is not known here")

    # Registers and operands

    def value(self, operand, dtype):
        """An operand as an array, one number a thread, or as one number."""
        bits = 1 if dtype == np.bool_ else 8 * np.dtype(dtype).itemsize
        if operand.startswith("%"):
            return self._reinterpreted(self._register(operand), dtype)
        if operand.startswith(("0f", "0d")):
            number = int(operand[2:], 16)
            exact = np.uint32(number).view(np.float32) if operand[1] == "f" else np.uint64(number).view(np.float64)
            return exact.astype(dtype) if np.dtype(dtype).kind == "f" else np.dtype(dtype).type(number)
        symbol, _, offset = operand.partition("+")
        if symbol == "global_smem":  # all shared memory, from 0 on
            return np.dtype(dtype).type(int(offset or 0))
        number = int(operand.rstrip("U"), 0)
        return np.bool_(number) if bits == 1 else UNSIGNED[bits](number & (1 << bits) - 1).view(dtype)

    def _register(self, name):
        if name in self.special:
            return self.special[name]
        if name in self.promised:
            raise Fault(f"{name} is read before the product that writes it was waited for")
        if name in self.registers:
            return self.registers[name]
        # Undefined, which may be read where it does not matter. All ones are NaN where it does.
        bits = REGISTER_BITS.get(name.rstrip("0123456789"), 32)
        return np.full(self.lanes, -1, np.int64).astype(UNSIGNED[bits])

    @staticmethod
    def _reinterpreted(value, dtype):
        """The same bits; the low ones of a wider register, zeros above a narrower one."""
        if value.dtype == dtype:
            return value
        if value.dtype == np.bool_ or dtype == np.bool_:
            return value.astype(dtype)
        width = np.dtype(dtype).itemsize
        return (value if value.itemsize == width else value.astype(UNSIGNED[8 * width])).view(dtype)

    def lanes_of(self, operand, dtype):
        """As value, and always an array."""
        return np.broadcast_to(self.value(operand, dtype), (self.lanes,))

    def address(self, operand, dtype=np.uint64):
        """Of "[%rd1 + 16]", one a thread."""
        base, _, offset = operand.strip("[] ").partition("+")
        offset = int(offset.strip() or "0", 0) & (1 << 8 * np.dtype(dtype).itemsize) - 1
        return np.broadcast_to(self.value(base.strip(), dtype) + np.dtype(dtype).type(offset), (self.lanes,))

    def write(self, name, value, mask):
        """Of the threads in mask."""
        value = np.broadcast_to(np.asarray(value), (self.lanes,))
        if value.dtype.kind in "if":
            value = np.ascontiguousarray(value).view(UNSIGNED[8 * value.itemsize])
        if name in self.promised:
            raise Fault(f"{name} is written before the product that writes it was waited for")
        if mask.all():
            self.registers[name] = np.ascontiguousarray(value)
        else:
            before = self.registers.get(name, np.zeros(self.lanes, value.dtype))
            self.registers[name] = np.where(mask, value, before.astype(value.dtype))

    def shared_places(self, addresses, width, mask):
        """(threads, width) indices into shared memory, of the threads in mask; counted."""
        self.involved = mask
        where = self.shared.places(addresses[mask], width, self.own[mask])
        self.counts.shared(addresses[mask], width, np.flatnonzero(mask))
        return where
