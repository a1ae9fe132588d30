"""What the simulated GPU refuses: small kernels that are right, and one mistake planted in each."""
import numpy as np
import pytest

pytest.importorskip("triton")
from assembly import place, run
from simulator import Fault
from simulator.counting import parts

# 70 numbers are reversed in blocks of 64 through shared memory, by two warps in two programs.
REVERSED = """
    mov.u32 %r1, %ctaid.x; mad.lo.s32 %r2, %r1, 64, %r0;
    setp.lt.s32 %p1, %r2, 70;
    mul.wide.u32 %rd1, %r2, 4; add.s64 %rd2, %rd90, %rd1; add.s64 %rd3, %rd91, %rd1;
    mov.b32 %r3, 0;
    @%p1 ld.global.b32 %r3, [%rd2];
    shl.b32 %r4, %r0, 2;
    st.shared.b32 [%r4], %r3;
    bar.sync 0;
    sub.s32 %r5, 252, %r4;
    ld.shared.b32 %r6, [%r5];
    @%p1 st.global.b32 [%rd3], %r6;
    bar.sync 0;
    st.shared.b32 [%r4], %r6;"""


def reverse(body=REVERSED):
    source, out = np.arange(1, 71, dtype=np.uint32), np.zeros(70, np.uint32)
    run(body, source, out, threads=64, shared=256, grid=(2, 1, 1))
    return out


def test_the_kernel_without_a_mistake():
    assert reverse().tolist() == [*range(64, 0, -1), 0, 0, 0, 0, 0, 0]


def test_threads_wait_at_a_barrier_for_those_that_took_another_branch():
    """Even if that branch lies behind the barrier."""
    body = REVERSED.replace("bar.sync 0;\n    sub", "@%p1 bra $far;\n$near: bar.sync 0;\n    sub")
    assert reverse(f"{body} ret;\n$far: bra.uni $near;").tolist() == reverse().tolist()


@pytest.mark.parametrize("before,after,said", [
    ("bar.sync 0;\n    sub", "sub", "another warp wrote since the last barrier is read"),
    ("bar.sync 0;\n    st", "st", "another warp read since the last barrier is written"),
    ("@%p1 ld.global", "ld.global", "outside of every tensor"),
    ("@%p1 st.global", "st.global", "outside of every tensor"),
    ("setp.lt.s32 %p1, %r2, 70", "setp.le.s32 %p1, %r2, 70", "outside of every tensor"),
    ("[%rd2]", "[%rd2 + 8]", "outside of every tensor"), ("[%rd3]", "[%rd3 + -8]", "outside of every tensor"),
    ("[%rd2]", "[%rd2 + 2]", "not a multiple of 4"), ("[%r5]", "[%r5 + 4]", "is outside or not a multiple"),
    ("[%r5]", "[%r5 + 2]", "is outside or not a multiple of 4"),
    ("%r1, 64, %r0", "%r1, 32, %r0", "two threads write the same byte"),
    ("add.s64 %rd3, %rd91, %rd1", "add.s64 %rd3, %rd90, 276; sub.s64 %rd3, %rd3, %rd1", "writes what another read"),
    ("st.shared.b32 [%r4], %r3", "@%p1 st.shared.b32 [%r4], %r3", "nobody wrote is read"),
    ("st.shared.b32 [%r4], %r3", "st.shared.b32 [0], %r3", "two warps write different numbers"),
    ("bar.sync 0;\n    sub", "@%p1 bar.sync 0; sub", "not all threads of the program reach"),
    ("bar.sync 0;\n    sub", "@%p1 ret; bar.sync 0; sub", "not all threads of the program reach"),
    ("bar.sync 0;\n    sub", "@!%p1 trap; sub", "trap"),
    ("bar.sync 0;\n    sub", "bar.sync 1; sub", "not known here: .*bar.sync 1"),
    ("shl.b32", "brev.b32", "not known here: brev.b32"), ("mad.lo.s32", "mad.lo.sat.s32", "not known here: mad.lo.sat"),
    ("ld.shared.b32", "ld.shared.v8.b32", "not known here: ld.shared.v8"),
    ("sub.s32 %r5, 252", "add.rz.f32 %r5, 252", "not known here: add.rz"),
    ("sub.s32 %r5", "sub.rn.f32.bf16 %r5", "not known here: sub.rn.f32.bf16"),
], ids=str)
def test_mistakes_with_memory_and_barriers(before, after, said):
    refused(reverse, REVERSED, before, after, said)


def refused(run, source, before, after, said):
    assert source.count(before) == 1
    with pytest.raises(Fault, match=said):
        run(source.replace(before, after))


def test_the_place_of_a_mistake_is_named():
    with pytest.raises(Fault, match=r"0x\w+ to 0x\w+: program 1, thread 6 \(of 58 such threads\): ld.global.b32 %r3"):
        reverse(REVERSED.replace("@%p1 ld.global", "ld.global"))


def test_what_lies_between_the_rows_of_a_slice_belongs_to_nobody():
    """The memory of a tensor reaches from its first to its last element, whatever lies around."""
    whole = np.zeros(64, np.uint32)
    with pytest.raises(Fault, match="outside of every tensor"):
        run(f"{place(0, 4)} ld.global.b32 %r1, [%rd99];", whole[8:39])
    run(f"{place(0, 4)} ld.global.b32 %r1, [%rd99];", whole[8:40])
    run(f"{place(0, 4)} ld.global.b32 %r1, [%rd99];", whole[8:40], whole[16:20])
    run(f"{place(0, 4)} ld.global.b32 %r1, [%rd99];", whole[8:36], whole[16:20], whole[32:40])


def test_programs_do_not_wait_for_each_other():
    body = """
        mov.u32 %r1, %ctaid.x; setp.eq.b32 %p1, %r0, 0;
        setp.eq.and.b32 %p2, %r1, 0, %p1; setp.eq.and.b32 %p3, %r1, 1, %p1;
        {} st.global.b32 [%rd90], %r1;
        {} ld.global.b32 %r2, [%rd90];"""
    for guards, said in (("@%p2", "@%p3"), "a program reads what another wrote"), (("@%p1", "@%p3"), "same byte"):
        with pytest.raises(Fault, match=said):
            run(body.format(*guards), np.zeros(1, np.uint32), grid=(2, 1, 1))
    run(body.format("@%p2", "@%p2"), np.zeros(1, np.uint32), grid=(2, 1, 1))


def test_a_byte_belongs_to_the_thread_that_wrote_it():
    body = "setp.eq.b32 %p1, %r0, 0; setp.eq.b32 %p2, %r0, 1; {} st.global.b32 [%rd90], 7; {} st.global.b32 [%rd90], 7;"
    run(body.format("@%p1", "@%p1"), np.zeros(1, np.uint32))
    for guards in (("@%p1", "@%p2"), ("@%p2", ""), ("", "")):
        with pytest.raises(Fault, match="two threads write the same byte"):
            run(body.format(*guards), np.zeros(1, np.uint32))


READERS = ["{read};", "@%p1 {read}; @!%p1 {read};"]  # at once, one after the other


@pytest.mark.parametrize("reading", READERS)
@pytest.mark.parametrize("writer", ("%p1", "!%p1"))
def test_who_reads_last_is_not_the_only_reader(reading, writer):
    """Two warps, or two programs, read a byte; then one of them writes it."""
    read = reading.format(read="ld.shared.b32 %r1, [0]")
    body = "setp.lt.s32 %p1, %r0, 32; @%p1 st.shared.b32 [0], 7; bar.sync 0;" + read + "{} st.shared.b32 [0], 7;"
    run(body.format(f"bar.sync 0; @{writer}"), threads=64, shared=4)
    with pytest.raises(Fault, match="another warp read"):
        run(body.format(f"@{writer}"), threads=64, shared=4)
    read = reading.format(read="ld.global.b32 %r2, [%rd90]")
    body = "mov.u32 %r1, %ctaid.x; setp.eq.b32 %p1, %r1, 0; setp.eq.b32 %p2, %r0, 0;" + read
    body += f"selp.b32 %r3, 1, 0, {writer[-3:]}; setp.eq.and.b32 %p3, %r3, {int(writer[0] != '!')}, %p2;"
    with pytest.raises(Fault, match="a program writes what another read"):
        run(body + "@%p3 st.global.b32 [%rd90], 7;", np.zeros(1, np.uint32), grid=(2, 1, 1))


# Two tiles of 512 bytes are copied, the first is waited for while the second is on its way.
COPIED = f"""
    shl.b32 %r1, %r0, 4; {place(0, 16)} {place(1, 16, "%rd98")}
    setp.lt.s32 %p1, %r0, 30; selp.b32 %r2, 16, 0, %p1;
    cp.async.cg.shared.global [%r1], [%rd99], 16, %r2;
    cp.async.commit_group;
    cp.async.cg.shared.global [%r1 + 512], [%rd99 + 512], 16;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r1];
    st.global.v4.b32 [%rd98], {{%r3, %r4, %r5, %r6}};
    cp.async.wait_group 0;
    ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r1 + 512];
    st.global.v4.b32 [%rd98 + 512], {{%r3, %r4, %r5, %r6}};"""


def copied(body, threads=32):
    source, out = np.arange(1, 257, dtype=np.uint32), np.zeros(256, np.uint32)
    run(body, source, out, threads=threads, shared=1024)
    return out


def test_asynchronous_copies():
    want = np.arange(1, 257)
    want[120:128] = 0  # where no bytes were asked for
    assert copied(COPIED).tolist() == want.tolist()
    everything = COPIED.replace("cp.async.commit_group;", "").replace("wait_group 1", "wait_all")
    assert copied(everything).tolist() == want.tolist()


@pytest.mark.parametrize("before,after,said", [
    ("cp.async.wait_group 1;", "cp.async.wait_group 2;", "read while an asynchronous copy to it is in flight"),
    ("cp.async.wait_group 1;", "", "read while an asynchronous copy to it is in flight"),
    ("cp.async.wait_group 0;", "cp.async.wait_group 1;", "read while an asynchronous copy to it is in flight"),
    ("cp.async.commit_group;\n    cp.async.wait_group 1;", "cp.async.wait_group 0;", "copy to it is in flight"),
    ("[%r1 + 512], [%rd99", "[%r1], [%rd99", "two asynchronous copies"),
    ("cp.async.wait_group 1;", "st.shared.b32 [%r1], 7;", "is written while an asynchronous copy"),
    ("[%rd99 + 512], 16", "[%rd99 + 520], 16", "not a multiple of 16"),
    ("[%rd99 + 512], 16", "[%rd99 + 528], 16", "outside of every tensor"),
    ("selp.b32 %r2, 16", "selp.b32 %r2, 8", "a part of 16 bytes"),
    ("cp.async.cg.shared.global [%r1],", "cp.async.bulk.shared.global [%r1],", "not known here: cp.async.bulk"),
], ids=str)
def test_mistakes_with_asynchronous_copies(before, after, said):
    refused(copied, COPIED, before, after, said)


def test_what_another_warp_copied_needs_a_barrier():
    """The second warp reads what the first one waited for."""
    body = """
        shl.b32 %r1, %r0, 4; mad.wide.u32 %rd99, %r0, 16, %rd90; setp.lt.s32 %p1, %r0, 32;
        @%p1 cp.async.cg.shared.global [%r1], [%rd99], 16; cp.async.commit_group; cp.async.wait_group 0; {}
        @!%p1 ld.shared.b32 %r2, [%r1 + -512];"""
    copied(body.format("bar.sync 0;"), 64)
    with pytest.raises(Fault, match="another warp wrote"):
        copied(body.format(""), 64)


# A product of four warps: both matrices are the same zeros.
MULTIPLIED = """
    shl.b32 %r1, %r0, 4; st.shared.v4.b32 [%r1], {0, 0, 0, 0};
    bar.sync 0;
    fence.proxy.async.shared::cta;
    wgmma.fence.sync.aligned;
    mov.b64 %rd1, 0x1000080000; setp.eq.b32 %p1, 0, 1;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10, %r11, %r12, %r13}, %rd1, %rd1, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.f32 %r14, %r10, %r10;
    st.shared.b32 [%r1], 0;"""


@pytest.mark.parametrize("before,after,said", [
    ("", "", None),
    ("wgmma.wait_group.sync.aligned 0;", "", "%r10 is read before the product that writes it was waited for"),
    ("wait_group.sync.aligned 0;", "wait_group.sync.aligned 1;", "%r10 is read before"),
    ("wgmma.commit_group.sync.aligned;", "", "%r10 is read before"),
    ("wgmma.wait_group.sync.aligned 0;\n    add.f32 %r14, %r10, %r10;", "", "a product that was not waited for may"),
    ("fence.proxy.async.shared::cta;", "", "no fence.proxy.async has shown"),
    ("bar.sync 0;", "", "another warp wrote|other warps wrote|nobody wrote"),
    ("mov.b64 %rd1, 0x1000080000", "mov.b64 %rd1, 0x1000080040", "reaches beyond|nobody wrote"),
    ("%rd1, %p1, 1, 1", "%rd1, %p1, -1, 1", "not known here: .*wgmma"),
    ("wgmma.mma_async", "@%p2 wgmma.mma_async", "not all four warps"),
], ids=str)
def test_mistakes_with_products_of_four_warps(before, after, said):
    body = "setp.lt.s32 %p2, %r0, 64;" + MULTIPLIED.replace(before, after)
    if said is None:
        run(body, threads=128, shared=2048)
    else:
        assert MULTIPLIED.count(before) == 1
        with pytest.raises(Fault, match=said):
            run(body, threads=128, shared=2048)


@pytest.mark.parametrize("instruction", (
    "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [0];",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1, %r2, %r3, %r4}, {0, 0, 0, 0}, {0, 0}, {0, 0, 0, 0};"))
def test_a_part_of_a_warp_exchanges_nothing(instruction):
    with pytest.raises(Fault, match="not all threads of a warp take part"):
        run(f"setp.lt.s32 %p1, %r0, 16; @%p1 {instruction}", shared=128)


def test_counts():
    """Of 32 threads: four bytes each side by side, in one bank, all the same; a load in two sectors a thread."""
    source = np.zeros((32, 16), np.uint32)
    for factor, passes in ((4, 1), (128, 32), (0, 1), (8, 2)):
        counts = run(f"mul.lo.s32 %r1, %r0, {factor}; st.shared.b32 [%r1], 0;", shared=4096)
        assert (counts["passes"], counts["ideal_passes"]) == (passes, 1), factor
    counts = run(f"shl.b32 %r1, %r0, 4; st.shared.v4.b32 [%r1], {{0, 0, 0, 0}}; {place(0, 64)}"
                 "ld.global.b32 %r2, [%rd99]; ld.global.b32 %r3, [%rd99];"
                 "ex2.approx.f32 %r3, %r2; add.f32 %r3, %r3, 0; add.s32 %r4, %r0, 1;", source, shared=512)
    assert (counts["passes"], counts["ideal_passes"]) == (4, 4)
    assert counts["read"] == 2 * 32 * 32 and counts["read_program"] == counts["read_all"] == 32 * 32
    of = counts["instructions"]
    assert of["special"] == 1 and of["float"] == 1 and of["global"] == 2 and of["shared"] == 1
    assert of["integer"] == 3 and parts(counts)["special"] == 2 and parts(counts)["issue"] == sum(of.values()) / 4
    assert parts(counts)["l1"] == 2 * 32 * 32 / 128 and parts(counts)["shared"] == 4
