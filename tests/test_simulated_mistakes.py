"""Mistakes planted in our compiled kernels: the simulated GPU finds them, as a fault or by a wrong number."""
import re
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from cases import Case
from published import assert_close
from simulated import compiled, simulated
from simulator import Fault, driver, executing
from test_hadamard import TOLERANCE, expected, ours, problem


def eight_more(match):
    return f"{match[1]}+{int(match[2] or 0) + 8}"


# {mistake: (what is changed in a kernel's text, into what, where it is planted)}
BARRIERS, COPIES, ALL = ("dlogits", "hadamard"), ("hadamard",), ("dlogits", "hadamard", "forward")
MISTAKES = {
    "a barrier is missing": (r"bar\.sync\s+0;", "", BARRIERS),
    "a wait comes too early": (r"cp\.async\.wait_group\s+\d", "cp.async.wait_group 7", COPIES),
    "a copy is never committed": (r"cp\.async\.commit_group;", "", COPIES),
    "a load is not masked": (r"@!?%p\d+ (ld\.global)", r"\1", ALL),
    "a store is not masked": (r"@!?%p\d+ (st\.global)", r"\1", ALL),
    "a load is 8 bytes off": (r"(ld\.global[^;]*\[ ?%rd\d+)(?: ?\+ ?(\d+))?", eight_more, ALL),
    "a store is 8 bytes off": (r"(st\.global[^;]*\[ ?%rd\d+)(?: ?\+ ?(\d+))?", eight_more, ALL),
    "a comparison takes one too many": (r"setp\.lt\.", "setp.le.", ALL),
    "a product is read too early": (r"wgmma\.wait_group\S+\s+\d;", "", COPIES),
    "a shuffle goes to another thread": (r"(shfl\.sync\.bfly\.b32 .*), 1, 31", r"\1, 2, 31", ("dlogits",)),
}


def attempt(kernel, capability, change):
    """Runs a problem with change(text) in place of a kernel's text -> what was found wrong, or None."""
    decode, changed = driver.Program, []

    def program(text):
        if f".entry {kernel}_kernel" in text:
            changed.append(change(text))
            text = changed[-1]
        return decode(text)

    try:
        with simulated(capability), mock.patch.object(driver, "Program", program):
            if kernel == "hadamard":
                case = problem(B=2, H=5, W=9, groups=5, width=4, k=5, dtype=torch.bfloat16)
                results = ours(*case, 1.0, 1, torch.device("cpu"))
            else:
                Case(H=5, W=7, heads=1, width=24, kernel_size=3, mul="static", dtype=torch.float32).check()
        if kernel == "hadamard":
            for want, got in zip(expected(*case, 1.0, 1), results):
                assert_close(kernel, want, got, TOLERANCE[torch.bfloat16])
    except (Fault, AssertionError) as error:
        return str(error)
    finally:
        assert changed, f"{kernel}_kernel did not run"


def places(kernel, capability, pattern):
    """Which of a pattern's matches in a kernel's text are in instructions that some thread executes."""
    programs, executed = [], set()
    decode, execute = driver.Program, executing.Execution._execute

    def program(text):
        programs.append(decode(text))
        return programs[-1]

    def note(self, i, mask):
        if mask.any():
            executed.add(id(i))
        execute(self, i, mask)

    with mock.patch.object(driver, "Program", program), mock.patch.object(executing.Execution, "_execute", note):
        wrong = attempt(kernel, capability, lambda text: text)
    assert wrong is None, wrong
    ours, = (x for x in programs if x.name == f"{kernel}_kernel")
    matching = [i for i in ours.code if re.search(pattern, i.text + ";")]
    return [n for n, i in enumerate(matching) if id(i) in executed]


@pytest.mark.parametrize("mistake", MISTAKES)
@compiled
def test_a_mistake_made_everywhere_is_found(mistake):
    pattern, replacement, kernels = MISTAKES[mistake]
    tried = 0
    for kernel in kernels:
        for capability in (80, 90) if kernel == "hadamard" else (90,):
            number = []

            def change(text):
                text, count = re.subn(pattern, replacement, text)
                number.append(count)
                return text
            found = attempt(kernel, capability, change)
            if number[0]:
                tried += 1
                assert found, (mistake, kernel, capability)
    assert tried, f"no kernel has {pattern}"


@pytest.mark.slow
@pytest.mark.parametrize("kernel,capability", [("forward", 90), ("dlogits", 90), ("hadamard", 80), ("hadamard", 90)])
@compiled
def test_a_mistake_made_in_one_place(kernel, capability):
    """Not every one does harm: some waits follow another one, some barriers order nothing, some masks are always set,
    and in some comparisons the numbers are never equal. How many were found is printed."""
    report, missed = [], {}
    for mistake, (pattern, replacement, kernels) in MISTAKES.items():
        executed = places(kernel, capability, pattern) if kernel in kernels else []
        chosen = executed[::max(1, len(executed) // 12)]
        for index in chosen:
            def change(text, index=index):
                start = list(re.finditer(pattern, text))[index].start()
                return text[:start] + re.sub(pattern, replacement, text[start:], count=1)
            if not attempt(kernel, capability, change):
                missed.setdefault(mistake, []).append(index)
        if chosen:
            report.append(f"{mistake}: {len(chosen) - len(missed.get(mistake, ()))} of {len(chosen)}")
    print(kernel, capability, *report, sep="\n")
    certain = "a load is 8 bytes off", "a store is 8 bytes off", "a shuffle goes to another thread"
    assert not set(certain) & missed.keys(), missed
