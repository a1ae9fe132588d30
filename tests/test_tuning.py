"""The tuner, with a clock of its own in place of a GPU; and by what the launchers tell problems apart."""
import contextlib
import itertools
import json
import runpy
import types

import pytest
import torch

from backends import BACKENDS, backend
from kernels import tuning
from train import distributed


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_table", None)
    monkeypatch.setattr(tuning, "_measures", True)
    monkeypatch.setattr(tuning, "_stand_ins", {})
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretend GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(pytest.importorskip("triton").testing, "do_bench", lambda run, **_: run())
    tuning._key.cache_clear()
    yield torch.device("cuda")
    tuning._key.cache_clear()


class Kernel:
    """As triton.jit makes one."""

    def __init__(self, fn):
        self.fn, self.__name__ = fn, fn.__name__


@Kernel
def forward():
    pass


@Kernel
def dv():
    pass


CONFIGS = [dict(BLOCK=1), dict(BLOCK=2), dict(BLOCK=3)]


def problem(k=3, batch=1, pixels=64):
    return dict(k=k, batch=batch, pixels=pixels)


def key(kernel=forward, gpu="Pretend GPU", **changes):
    """What is remembered under."""
    sizes = {name: value for name, value in problem(**changes).items() if name != "k"}
    return (f"{gpu} | {tuning._versions()} | {kernel.__name__} {tuning._source_hash(kernel)} | "
            f"k={problem(**changes)['k']} | batch={sizes['batch']} pixels={sizes['pixels']}")


def slow(BLOCK):
    return {1: 5.0, 2: 1.0, 3: 2.0}[BLOCK]


def as_a_new_process(monkeypatch):
    monkeypatch.setattr(tuning, "_table", None)
    monkeypatch.setattr(tuning, "_measure", lambda *_: pytest.fail("measured again"))


def test_takes_the_fastest_and_remembers_it_on_disk(gpu, monkeypatch, tmp_path):
    assert tuning.launch(forward, problem(k=3), CONFIGS, slow, gpu) == 1.0
    assert list(tuning.tuned().values()) == [dict(BLOCK=2)]
    as_a_new_process(monkeypatch)
    assert tuning.launch(forward, problem(k=3), CONFIGS, slow, gpu) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


def test_measures_again_what_is_damaged_or_out_of_date(gpu, monkeypatch, tmp_path):
    for content in ("{half a fi", "[]", None):
        monkeypatch.setattr(tuning, "_table", None)
        if content is None:  # a candidate that exists no more
            table = tuning.tuned()
            tuning.set_tuned({key: dict(BLOCK=64) for key in table})
        else:
            tuning.cache_file().write_text(content)
        assert tuning.launch(forward, problem(k=3), CONFIGS, slow, gpu) == 1.0


def test_problems_kernels_and_devices_are_told_apart(gpu, monkeypatch):
    problems = problem(k=3), problem(k=5)
    for kernel, sizes, device in itertools.product((forward, dv), problems, ("One GPU", "Other GPU")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
        tuning.launch(kernel, sizes, CONFIGS, slow, gpu)
    assert len(tuning.tuned()) == len(json.loads(tuning.cache_file().read_text())) == 8


def test_skips_what_does_not_fit_and_says_when_nothing_does(gpu):
    from triton.runtime.errors import OutOfResources

    def run(BLOCK):
        if BLOCK != 3:
            raise OutOfResources(2, 1, "shared memory")
        return 7.0
    assert tuning.launch(dv, problem(k=5), CONFIGS, run, gpu) == 7.0
    with pytest.raises(RuntimeError, match="dv: none of"):
        tuning.launch(dv, problem(k=7), CONFIGS[:2], run, gpu)


def test_takes_the_first_without_a_gpu_and_under_capture(gpu, monkeypatch, tmp_path):
    assert tuning.launch(forward, problem(k=3), CONFIGS, slow, torch.device("cpu")) == 5.0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.launch(forward, problem(k=3), CONFIGS, slow, gpu) == 5.0
    assert not list(tmp_path.iterdir())


def test_a_capture_takes_what_was_measured_before(gpu, monkeypatch):
    """So that a captured step gives the same bits as an eager one; of a new size what the most similar one takes."""
    launch = lambda **sizes: tuning.launch(forward, problem(**sizes), CONFIGS, slow, gpu)
    launch(pixels=64)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch(pixels=64) == 1.0
    tuning.set_tuned({key(pixels=1024): dict(BLOCK=3), **tuning.tuned(), key(dv, pixels=256): dict(BLOCK=1)})
    assert [launch(pixels=n) for n in (1, 128, 256, 512, 2048)] == [1.0, 1.0, 1.0, 2.0, 2.0]  # 256: the smaller one
    tuning.set_tuned({key(batch=16, pixels=1024): dict(BLOCK=3), key(pixels=512): dict(BLOCK="of an older version")})
    assert launch(pixels=256) == 2.0
    tuning.set_tuned({**tuning.tuned(), key(batch=1, pixels=64): dict(BLOCK=2)})
    assert [launch(batch=n, pixels=256) for n in (1, 4, 8)] == [1.0, 1.0, 2.0]
    assert launch(k=5, pixels=64) == 5.0
    monkeypatch.setattr(tuning, "_most_similar", lambda *_: pytest.fail("looked for again"))
    assert launch(batch=8, pixels=256) == 2.0


def test_what_could_not_be_measured_is_measured_later(gpu, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tuning.launch(forward, problem(), CONFIGS, slow, gpu) == 5.0
    assert tuning.launch(forward, problem(pixels=128), CONFIGS, slow, gpu) == 1.0
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tuning.launch(forward, problem(), CONFIGS, slow, gpu) == 1.0  # of the similar one, by now
    assert len(tuning.tuned()) == 1
    assert tuning.launch(forward, problem(), CONFIGS, slow, gpu) == 1.0 and len(tuning.tuned()) == 2


SOURCE = """
from triton.language import constexpr
FACTOR, SHIFT = 2, constexpr(3)
def called(x):
    return FACTOR * x >> SHIFT
def forward(x):
    return called(x) + 1
"""


@pytest.mark.parametrize("old, new", [("= 2,", "= 3,"), ("(3)", "(4)"), ("* x", "- x"), ("+ 1", "+ 2"),
                                      ("\nFACTOR", "\n\n# above\nFACTOR")])
def test_a_choice_is_for_one_source_of_a_kernel(tmp_path, old, new):
    """And of what it calls and reads, wherever it stands in its file."""
    pytest.importorskip("triton")
    hashes = []
    for name, text in (("one", SOURCE), ("other", SOURCE.replace(old, new))):
        (tmp_path / f"{name}.py").write_text(text)
        module = runpy.run_path(tmp_path / f"{name}.py")
        functions = module["forward"].__globals__
        functions["called"] = Kernel(functions["called"])
        hashes.append(tuning._source_hash(Kernel(functions["forward"])))
    assert (hashes[0] == hashes[1]) == (new == "\n\n# above\nFACTOR") and len(hashes[0]) == 8


@pytest.mark.parametrize("name", ("_versions", "_source_hash"))
def test_what_another_version_measured_is_not_used(gpu, monkeypatch, name):
    tuning.launch(forward, problem(), CONFIGS, slow, gpu)
    monkeypatch.setattr(tuning, name, lambda *_: "newer")
    tuning._key.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.launch(forward, problem(), CONFIGS, slow, gpu) == 5.0


def test_ranks_take_over_the_first_ones_choices_and_measure_nothing_in_a_step(gpu, monkeypatch):
    """train.distributed.tune_kernels on two ranks; then the second meets a size that the first has not tuned for."""
    model = torch.nn.Conv2d(3, 1, 1)
    sent = []
    monkeypatch.setattr(model, "forward", lambda x: x.mean() * model.weight.sum() + 0 * tuning.launch(
        forward, problem(pixels=x.shape[3]), CONFIGS, slow, gpu))
    monkeypatch.setattr(distributed, "from_rank_0", lambda mine: sent.append(mine) or sent[0])
    cpu = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.ones(shape))
    monkeypatch.setattr(distributed, "memory_format", lambda device: torch.contiguous_format)
    monkeypatch.setattr(distributed, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    distributed.tune_kernels(model, 2, 64, False, 0, cpu)
    measured = dict(tuning.tuned())
    assert list(measured) == [key()]
    as_a_new_process(monkeypatch)
    tuning.cache_file().unlink()
    distributed.tune_kernels(model, 2, 64, False, 1, cpu)
    assert tuning.tuned() == measured
    for pixels in (32, 64, 256):
        assert tuning.launch(forward, problem(pixels=pixels), CONFIGS, slow, gpu) == 1.0
    assert tuning.tuned() == measured


def test_known_gpus_are_not_tuned(gpu, monkeypatch, tmp_path, capsys):
    tuning.launch(forward, problem(k=3), CONFIGS, slow, gpu)
    assert capsys.readouterr().err.startswith(f"tuning {key()} ... BLOCK=2 ")
    tuning.set_tuned({**tuning.tuned(), key(gpu="Pretend GPU 2"): dict(BLOCK=1)})
    path = tmp_path / "shipped/Pretend-GPU.json"
    assert tuning.ship(gpu) == (path, 0)
    assert json.loads(path.read_text()) == {key(): dict(BLOCK=2)}
    tuning.cache_file().unlink()
    as_a_new_process(monkeypatch)
    assert tuning.launch(forward, problem(k=3), CONFIGS, slow, gpu) == 1.0
    assert not capsys.readouterr().err


def test_files_keep_what_other_processes_have_written_and_a_users_own_measurements_win(gpu, monkeypatch):
    tuning.launch(forward, problem(k=3), CONFIGS, slow, gpu)
    tuning.ship(gpu)
    monkeypatch.setattr(tuning, "_table", {})  # a process that started earlier
    tuning.launch(forward, problem(k=5), CONFIGS, slow, gpu)
    ours = {key: dict(BLOCK=3) for key in tuning.tuned()}
    tuning.cache_file().write_text(json.dumps({**json.loads(tuning.cache_file().read_text()), **ours}))
    shipped = {key: dict(BLOCK=2) for key in ours}
    (tuning.SHIPPED / "Pretend-GPU.json").write_text(json.dumps(shipped))
    monkeypatch.setattr(tuning, "_table", None)
    assert tuning.tuned() == {key(k=3): dict(BLOCK=2), key(k=5): dict(BLOCK=3)}


def test_what_is_shipped_is_for_the_kernels_of_today(gpu):
    """Of other kernels and versions than those that were tuned, nothing is known."""
    tuning.launch(forward, problem(), CONFIGS, slow, gpu)
    other_versions = key().replace(tuning._versions(), "torch 9 triton 9")
    others = {key(k=5): dict(BLOCK=1), key(dv): dict(BLOCK=1), other_versions: dict(BLOCK=3)}
    old = {key(k=n).replace(tuning._source_hash(forward), "0123abcd"): dict(BLOCK=1) for n in (3, 5)}
    tuning.SHIPPED.mkdir()
    (tuning.SHIPPED / "Pretend-GPU.json").write_text(json.dumps(others | old | {key(): dict(BLOCK=1)}))
    path, outdated = tuning.ship(gpu)
    assert outdated == 2 and json.loads(path.read_text()) == {**others, key(): dict(BLOCK=2)}


# By what the launchers tell problems apart: what changes the work of a pixel needs a choice of its own.

@pytest.fixture
def keys(monkeypatch):
    """{kernel: problem} of the launches so far."""
    if "triton" not in BACKENDS:
        pytest.skip("Triton is not installed")
    recorded = {}
    monkeypatch.setattr(tuning, "launch", lambda kernel, problem, *_: recorded.update({kernel.__name__: problem}))
    return recorded


AGGREGATION = dict(B=1, dtype=torch.float32, kernel_size=3, dilation=1, stride=1, heads=2, width=4, side=4, mul=True,
                   add=True, attention=True, layout=torch.contiguous_format, normalize=True, frozen=False)
HADAMARD = dict(B=1, dtype=torch.float32, kernel_size=3, dilation=1, width=4, groups=4, side=4)


def aggregation_keys(keys, B, dtype, kernel_size, dilation, stride, heads, width, side, mul, add, attention, layout,
                     normalize, frozen):
    """The same number of output pixels whatever the stride; frozen: the additive filter needs no gradient."""
    from kernels import aggregation

    keys.clear()
    with backend("triton") as device:
        zeros = lambda *shape: torch.zeros(shape, device=device, dtype=dtype)
        C = heads * width
        v, go = zeros(B, side * stride, side * stride, C), zeros(B, side, side, C)
        logits = zeros(B, heads * kernel_size ** 2, side, side).contiguous(memory_format=layout) if attention else None
        ghosts = [zeros(C, kernel_size, kernel_size) if present else None for present in (mul, add)]
        numbers = kernel_size, dilation, stride, normalize
        _, lse = aggregation.forward(v, logits, *ghosts, *numbers)
        aggregation.backward(go, v, logits, *ghosts, lse, *numbers, (True, attention, mul, add and not frozen))
    return dict(keys)


def hadamard_keys(keys, B, dtype, kernel_size, dilation, width, groups, side):
    from kernels import convolution

    keys.clear()
    with backend("triton") as device:
        zeros = lambda *shape: torch.zeros(shape, device=device, dtype=dtype)
        Q = groups * width
        q, weight = zeros(B, side, side, Q), zeros(Q, width, kernel_size, kernel_size)
        convolution.forward(q, q, weight, zeros(Q), 1.0, dilation)
        convolution.backward(q, q, q, q, weight, 1.0, dilation)
    return dict(keys)


@pytest.mark.parametrize("change", [
    dict(dtype=torch.bfloat16), dict(kernel_size=5), dict(dilation=2), dict(stride=2), dict(heads=3), dict(width=8),
    dict(side=8), dict(B=2), dict(mul=False), dict(add=False), dict(attention=False), dict(normalize=False),
    dict(layout=torch.channels_last)], ids=str)
def test_aggregations_that_differ_in_one_thing_have_keys_of_their_own(change, keys):
    base = AGGREGATION
    if "attention" in change:  # without logits there is one head, no multiplicative filter, and no layout
        base = base | dict(heads=1, mul=False, layout=torch.channels_last)
    one, other = aggregation_keys(keys, **base), aggregation_keys(keys, **base | change)
    assert one.keys() == {"forward_kernel", "dv_kernel", "dlogits_kernel", "dghost_kernel"}
    assert one.keys() - other.keys() <= {"dlogits_kernel"}
    assert all(one[kernel] != other[kernel] for kernel in other)


def test_sums_for_fewer_gradients_have_a_key_of_their_own(keys):
    one, other = aggregation_keys(keys, **AGGREGATION), aggregation_keys(keys, **AGGREGATION | dict(frozen=True))
    assert one.keys() == other.keys() and {name for name in one if one[name] != other[name]} == {"dghost_kernel"}


def test_a_deterministic_run_does_not_depend_on_what_was_tuned(monkeypatch):
    """The kernels that sum over pixels have one configuration then."""
    if "triton" not in BACKENDS:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(tuning, "launch",
                        lambda kernel, problem, configs, *_: recorded.update({kernel.__name__: len(configs)}))
    counts = []
    for deterministic in (True, False):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda on=deterministic: on)
        recorded = {}
        aggregation_keys({}, **AGGREGATION)
        hadamard_keys({}, **HADAMARD)
        counts.append(recorded)
    alone, several = counts
    assert alone.keys() == several.keys() and 1 < min(several.values()) <= max(several.values()) <= 8
    assert {kernel for kernel in alone if alone[kernel] == 1} == {"dghost_kernel", "dweight_kernel"}


@pytest.mark.parametrize("change", [dict(dtype=torch.bfloat16), dict(kernel_size=5), dict(dilation=2),
                                    dict(width=8, groups=2), dict(groups=8), dict(side=8), dict(B=2)],
                         ids=str)
def test_convolutions_that_differ_in_one_thing_have_keys_of_their_own(change, keys):
    one, other = hadamard_keys(keys, **HADAMARD), hadamard_keys(keys, **HADAMARD | change)
    assert one.keys() == other.keys() == {"hadamard_kernel", "dqk_kernel", "dweight_kernel"}
    assert all(one[kernel] != other[kernel] for kernel in one)


def test_batches_and_images_of_nearly_one_size_share_a_key(keys):
    """Else a detector, every image of which has another size, would be tuned for ever."""
    for function, base in ((aggregation_keys, AGGREGATION), (hadamard_keys, HADAMARD)):
        base = base | dict(B=3, side=7)
        assert function(keys, **base) == function(keys, **base | dict(B=4, side=8))
