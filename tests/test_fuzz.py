"""The fuzzer of tests/fuzz.py: some calls on each path, and that it sees what is wrong."""
from unittest import mock

import pytest

pytest.importorskip("triton")
import fuzz
from kernels import checks, cpu


@pytest.mark.parametrize("name,calls", [("cpu", 80), ("interpreter", 8)])
def test_random_calls(name, calls):
    reported = []
    counts = fuzz.fuzz(name, 2, 0, calls, report=reported.append)
    assert not reported, "\n".join(reported)
    assert counts["wrong"] == 0 and sum(counts.values()) == calls and counts["equal"] > 0.5 * calls


def wrong(backward):
    """backward with one number of a gradient 1% off."""
    def off(*arguments):
        grads = backward(*arguments)
        for grad in grads:
            if grad is not None:
                grad.view(-1)[-1].mul_(1.01)
        return grads
    return off


def test_what_is_wrong_is_seen():
    """A gradient that is 1% off in one place; an argument that is not checked."""
    count = lambda first, calls: fuzz.fuzz("cpu", 0, first, calls, report=lambda text: None)["wrong"]
    with mock.patch.object(cpu, "backward", wrong(cpu.backward)):
        assert count(0, 60) > 5
    mistaken = next(n for n in range(999) if fuzz.draw_call(0, n, "cpu").mistake == "dilation")
    assert count(mistaken, 1) == 0
    with mock.patch.object(checks, "whole_numbers", lambda **_: None):
        assert count(mistaken, 1) == 1
