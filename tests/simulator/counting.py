"""What a launch asked of a multiprocessor, and the table of what binds each kernel."""
import collections

import numpy as np

SECTOR = 32  # bytes, the unit of global memory
BANKS = 32  # of shared memory, 4 bytes each


class Counts:
    """Of one launch.

    instructions: that warps issue, by kind. read, written: sectors of global memory, different ones of each
    instruction of a warp. passes: over the banks of shared memory; ideal_passes: of them without bank conflicts.
    """

    def __init__(self):
        self.instructions = collections.Counter()
        self.read = self.written = self.passes = self.ideal_passes = 0
        self._read_by_program, self._read_by_all = set(), set()

    def result(self):
        """As a dict, sectors as bytes; read_program: different bytes of each program, what a perfect L1 cache would
        leave for L2; read_all: of all programs, what a perfect L2 would leave for memory."""
        return dict(
            instructions=self.instructions, read=self.read * SECTOR, written=self.written * SECTOR,
            read_program=len(self._read_by_program) * SECTOR, read_all=len(self._read_by_all) * SECTOR,
            passes=self.passes, ideal_passes=self.ideal_passes)

    def global_read(self, addresses, lanes, programs):
        sectors = addresses // np.uint64(SECTOR)
        self.read += _different(lanes // 32, sectors)
        self._read_by_all.update(np.unique(sectors).tolist())
        # The sector numbers of a machine's memory take fewer than 43 bits.
        self._read_by_program.update(np.unique(programs.astype(np.uint64) << np.uint64(43) | sectors).tolist())

    def global_written(self, addresses, lanes):
        self.written += _different(lanes // 32, addresses // np.uint64(SECTOR))

    def shared(self, addresses, width, lanes):
        """A pass serves every bank once; of accesses of 8 and 16 bytes a half and a quarter of a warp at a time."""
        at_once = BANKS * 4 // max(4, width)
        group = lanes // 32 * 8 + lanes % 32 // at_once
        words = (addresses.astype(np.int64) // 4)[:, None] + np.arange(max(1, width // 4))
        different = np.unique(group[:, None] << 20 | words)  # one word serves all that read it
        banks, of_bank = np.unique((different >> 20) * BANKS + different % BANKS, return_counts=True)
        passes = np.zeros(banks.max() // BANKS + 1, int)
        np.maximum.at(passes, banks // BANKS, of_bank)
        self.passes += int(passes.sum())
        self.ideal_passes += int((passes > 0).sum())

    def matrix(self, size):
        """Bytes that a product of four warps reads, 128 a pass."""
        self.passes += size // 128
        self.ideal_passes += size // 128


def _different(warps, sectors):
    return len(np.unique(warps.astype(np.uint64) << np.uint64(43) | sectors))


def table(launches, units=lambda launch: launch["programs"]):
    """A line a launch: cycles of one multiprocessor that each of its parts is busy, and bytes, over units(launch).

    issue: a warp's instruction a cycle on each of 4 schedulers, counted in PTX, of which the assembler drops many
    moves. fp32: as many multiply-adds. special: 16 threads a cycle. memory path: 128 bytes a cycle of the L1 cache, one
    pass a cycle of shared memory and one shuffle a cycle, added up. The largest of the four binds the kernel, if there
    are warps enough to hide latencies.
    """
    rows = [f"{'kernel':<18}{'grid':>12}{'threads':>8}{'shared':>8}{'issue':>8}{'fp32':>8}{'special':>8}"
            f"{'memory path':>12} = {'L1':>7} + {'shared':>6} + {'shuffle':>7}{'conflicts':>10}"
            f"{'L2 bytes':>9}{'of them read':>13}"]
    for launch in launches:
        cycles, per = parts(launch), units(launch)
        issue, fp32, special, l1, shared, shuffle = (cycles[name] / per for name in cycles)
        grid = "x".join(map(str, launch["grid"]))
        conflicts, read = launch["passes"] - launch["ideal_passes"], launch["read_program"]
        rows.append(
            f"{launch['kernel']:<18}{grid:>12}{launch['threads']:>8}{launch['shared']:>8}{issue:>8.1f}{fp32:>8.1f}"
            f"{special:>8.1f}{l1 + shared + shuffle:>12.1f} = {l1:>7.1f} + {shared:>6.1f} + {shuffle:>7.1f}"
            f"{conflicts / per:>10.1f}{(read + launch['written']) / per:>9.0f}{read / per:>13.0f}")
    return "\n".join(rows)


def parts(launch):
    """{part of a multiprocessor: cycles that it is busy}"""
    of = launch["instructions"]
    return dict(issue=sum(of.values()) / 4, fp32=of["float"] / 4, special=of["special"] * 2,
                l1=(launch["read"] + launch["written"]) / 128, shared=launch["passes"], shuffle=of["shuffle"])
