"""The operator against its naive reference, on the CPU path and on the Triton kernels (interpreted where there is no GPU)."""
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from backends import BACKENDS, backend
from kernels import cpu, elsa_attention, elsa_attention_reference, tuning

GOLDEN = Path(__file__).parent / "golden"
FILTERS = (None, "static", "per-sample")


class Case:
    """One problem: tensors by name, keyword arguments, and how to run it."""

    def __init__(self, seed=0, B=1, H=5, W=6, heads=2, width=3, kernel_size=3, dilation=1, stride=1, mul=None, add="static", lam=1, gamma=1,
                 normalize=True, attention=True, dtype=torch.float64, v_layout="contiguous", logits_layout="nchw", device="cpu"):
        C, K = heads * width, kernel_size ** 2
        Ho, Wo = H // stride, W // stride
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        v = {"contiguous": lambda: draw(B, H, W, C), "slice of a projection": lambda: draw(B, H, W, C + 5)[..., 3:3 + C],
             "nchw": lambda: draw(B, C, H, W).permute(0, 2, 3, 1)}[v_layout]()
        logits = draw(B, heads * K, Ho, Wo)
        if logits_layout == "nhwc":
            logits = logits.contiguous(memory_format=torch.channels_last)
        elif logits_layout == "cropped":  # rows do not follow each other: a copy is due
            logits = draw(B, heads * K, Ho + 1, Wo + 2)[:, :, :Ho, :Wo]
        filters = {None: lambda: None, "static": lambda: draw(C, kernel_size, kernel_size),
                   "per-sample": lambda: draw(B, C, kernel_size, kernel_size)}
        self.tensors = dict(v=v, logits=logits if attention else None, ghost_mul=filters[mul](), ghost_add=filters[add]())
        self.options = dict(kernel_size=kernel_size, dilation=dilation, stride=stride, lam=lam, gamma=gamma, normalize=normalize)
        self.grad_out = draw(B, Ho, Wo, C)

    def run(self, operator, dtype=None, device=None):
        """{"out": ..., "dv": ..., ...}; gradients of what the operator ignores are absent or zero."""
        cast = lambda x: x.detach().to(dtype=dtype, device=device) if dtype or device else x.detach()
        tensors = {name: None if x is None else cast(x).requires_grad_() for name, x in self.tensors.items()}
        out = operator(*tensors.values(), **self.options)
        given = {f"d{name}": x for name, x in tensors.items() if x is not None}
        grads = torch.autograd.grad(out, given.values(), cast(self.grad_out), allow_unused=True)
        grads = {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(given.items(), grads)}
        return {"out": out.detach(), **grads}

    def check(self, got=None):
        """Equal to the reference in float64, up to one rounding of the result and one of every product in a sum."""
        got = got or self.run(elsa_attention)
        expected = self.run(elsa_attention_reference, torch.float64)
        dtype = self.tensors["v"].dtype
        largest = lambda x, missing: missing if x is None or not x.numel() else x.double().abs().max().item()
        v, go, ghost_mul = largest(self.tensors["v"], 0), largest(self.grad_out, 0), largest(self.tensors["ghost_mul"], 1)
        mul = ghost_mul ** self.options["lam"]
        a = 1 if self.options["normalize"] else largest(self.tensors["logits"], 0)
        f = a * mul + abs(self.options["gamma"]) * largest(self.tensors["ghost_add"], 0)
        B, Ho, Wo, C = self.grad_out.shape
        K = self.options["kernel_size"] ** 2
        chain = max(1, self.options["lam"] * ghost_mul ** max(0, self.options["lam"] - 1))
        scales = {"out": K * v * f, "dv": K * go * f, "dlogits": K * C * go * v * mul * a, "dghost_mul": B * Ho * Wo * go * v * a * chain,
                  "dghost_add": B * Ho * Wo * go * v * abs(self.options["gamma"])}  # number of products x the largest of them
        accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert got.keys() == expected.keys()
        for name, reference in expected.items():
            assert got[name].shape == reference.shape and got[name].dtype == dtype, name
            if reference.numel() == 0:
                continue
            limit = 2 * torch.finfo(dtype).eps * reference.abs().max() + 4 * accumulator * scales[name]
            error = (got[name].double() - reference).abs().max()
            assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}, {self.options}"  # a NaN fails too


@st.composite
def problems(draw):
    one_of = lambda *values: draw(st.sampled_from(values))
    attention = draw(st.integers(0, 9)) > 0
    runs = draw(st.booleans())  # of four pixels, which the Triton kernels compute together for these strides, dilations and dtypes
    return dict(seed=draw(st.integers(0, 2 ** 16)), B=one_of(1, 1, 2), H=draw(st.integers(1, 7)), W=draw(st.integers(1, 9)),
                heads=one_of(1, 2, 3) if attention else 1, width=one_of(1, 2, 3, 4, 6), kernel_size=one_of(1, 3, 3, 3, 5),
                dilation=1 if runs else one_of(1, 1, 2, 3), stride=1 if runs else one_of(1, 1, 2, 3), mul=one_of(*FILTERS) if attention else None,
                add=one_of(*FILTERS) if attention else one_of("static", "per-sample"), lam=one_of(0, 1, 1, 2),
                gamma=one_of(0, 1, 1, -0.5) if attention else 1, normalize=draw(st.booleans()), attention=attention,
                dtype=one_of(torch.float32 if runs else torch.float64, torch.float32, torch.float16, torch.bfloat16),
                v_layout=one_of("contiguous", "slice of a projection", "nchw"), logits_layout=one_of("nchw", "nhwc", "cropped"))


def hypothesis_settings(examples):
    return settings(max_examples=examples, deadline=None, derandomize=bool(os.environ.get("CI")),
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@hypothesis_settings(150)
@given(problems())
def test_cpu_equals_reference(problem):
    with backend("cpu") as device:
        Case(**problem, device=device).check()


@pytest.mark.parametrize("filters", ("static", "per-sample"))
def test_cpu_in_chunks_of_the_batch(filters, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 2 * 5 * 6 * 6)  # two samples
    Case(B=5, mul=filters, add=filters).check()


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@hypothesis_settings(20)
@given(problems())
def test_triton_equals_reference(problem):
    with backend("triton") as device:
        Case(**problem, device=device).check()


@pytest.mark.parametrize("name", BACKENDS)
def test_more_taps_in_a_row_than_one_program_sums(name):
    with backend(name) as device:
        Case(B=2, H=3, W=6, heads=1, width=2, kernel_size=9, mul="static", dtype=torch.float32, device=device).check()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("index", range(9))
def test_golden(name, index):
    """Values and gradients of the published implementation, float64."""
    with backend(name) as device:
        spec, arrays = json.loads((GOLDEN / "op_cases.json").read_text())[index], np.load(GOLDEN / "op.npz")
        B, G, D, H, W, k = (spec[key] for key in ("B", "heads", "head_dim", "H", "W", "kernel_size"))
        read = lambda key: torch.from_numpy(arrays[f"case{index}_{key}"]).to(device)
        last = lambda key: read(key).view(B, G * D, H, W).permute(0, 2, 3, 1)
        v, logits = last("v").requires_grad_(), read("logits").view(B, G * k * k, H, W).requires_grad_()
        filters = [read(key).requires_grad_() for key in ("ghost_mul", "ghost_add")]
        out = elsa_attention(v, logits, *filters, **{key: spec[key] for key in ("kernel_size", "dilation", "lam", "gamma")})
        grads = torch.autograd.grad(out, (v, logits, *filters), last("grad_out"), allow_unused=True)
        expected = [last("out"), last("dv"), read("dlogits").view_as(logits), read("dghost_mul"), read("dghost_add")]
        for name, got, want in zip(("out", "dv", "dlogits", "dghost_mul", "dghost_add"), (out, *grads), expected):
            got = torch.zeros_like(want) if got is None else got
            assert (got - want).abs().max() <= 1e-9 * want.abs().max(), name


@pytest.mark.parametrize("name", BACKENDS)
def test_linear_in_v(name):
    with backend(name) as device:
        case = Case(mul="static", dtype=torch.float64, device=device)
        v, *rest = case.tensors.values()
        w = torch.flip(v, [1])
        run = lambda x: elsa_attention(x, *rest, **case.options)
        torch.testing.assert_close(run(2 * v - 3 * w), 2 * run(v) - 3 * run(w), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BACKENDS)
def test_constant_added_to_all_logits_of_a_pixel_changes_nothing(name):
    with backend(name) as device:
        case = Case(heads=2, device=device)
        before = case.run(elsa_attention)
        case.tensors["logits"] = case.tensors["logits"].unflatten(1, (2, 9)) + torch.randn(1, 2, 1, 5, 6, dtype=torch.float64, device=device) * 50
        case.tensors["logits"] = case.tensors["logits"].flatten(1, 2)
        for key, value in case.run(elsa_attention).items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BACKENDS)
def test_heads_permute(name):
    with backend(name) as device:
        case = Case(heads=3, width=4, mul="static", device=device)
        out = case.run(elsa_attention)["out"]
        order = torch.tensor([2, 0, 1], device=device)
        swap = lambda x, dim: x.unflatten(dim, (3, -1)).index_select(dim, order).flatten(dim, dim + 1)
        swapped = [swap(x, dim) for x, dim in zip(case.tensors.values(), (3, 1, 0, 0))]
        # The CPU's vectorised softmax rounds the end of an image otherwise than its middle.
        torch.testing.assert_close(elsa_attention(*swapped, **case.options), swap(out, 3), rtol=0, atol=1e-14 if name == "cpu" else 0)


@pytest.mark.parametrize("name,filters", list(itertools.product(BACKENDS, ("static", "per-sample"))))
def test_batch_entries_do_not_touch_each_other(name, filters):
    with backend(name) as device:
        case = Case(B=3, mul=filters, add=filters, device=device)
        together = case.run(elsa_attention)
        one = slice(1, 2)
        case.tensors = {key: x[one] if x.ndim == 4 else x for key, x in case.tensors.items()}
        case.grad_out = case.grad_out[one]
        alone = case.run(elsa_attention)
        for key in ("out", "dv", "dlogits", *(("dghost_mul", "dghost_add") if filters == "per-sample" else ())):
            torch.testing.assert_close(alone[key], together[key][one], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name,stride", list(itertools.product(BACKENDS, (1, 2))))
def test_nan_spreads_only_to_the_pixels_whose_taps_reach_it(name, stride):
    with backend(name) as device:
        case = Case(H=9, W=8, dilation=2, stride=stride, device=device)
        case.tensors["v"][0, 4, 4, 1] = float("nan")
        got = elsa_attention(*case.tensors.values(), **case.options)
        reaches = torch.zeros(9 // stride, 8 // stride, dtype=torch.bool, device=device)
        for y, x in itertools.product(range(9 // stride), range(8 // stride)):
            reaches[y, x] = abs(4 - y * stride) in (0, 2) and abs(4 - x * stride) in (0, 2)
        expected = torch.zeros_like(got, dtype=torch.bool)
        expected[0, :, :, 1] = reaches
        assert reaches.any() and torch.equal(got.isnan(), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_logits_of_minus_infinity_mask_their_taps(name):
    with backend(name) as device:
        case = Case(device=device)
        case.tensors["logits"][:, 0:4] = -float("inf")
        case.check()


@pytest.mark.parametrize("name,dtype", list(itertools.product(BACKENDS, (torch.float32, torch.bfloat16))))
def test_two_runs_are_bit_identical(name, dtype):
    with backend(name) as device:
        case = Case(B=2, H=9, W=7, mul="static", dtype=dtype, device=device)
        first, second = case.run(elsa_attention), case.run(elsa_attention)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", BACKENDS)
def test_zero_stride_and_non_contiguous_gradient(name):
    """A sum's gradient is expanded from one number; a transposed loss hands down permuted strides."""
    with backend(name) as device:
        for seed, reduce in enumerate((lambda out: out.sum(), lambda out: (out.permute(0, 3, 1, 2).flatten(2) ** 2).sum())):
            case = Case(seed=seed, device=device)
            tensors = [x.requires_grad_() for x in case.tensors.values() if x is not None]
            run = lambda operator: torch.autograd.grad(reduce(operator(tensors[0], tensors[1], None, tensors[2], **case.options)), tensors)
            for got, want in zip(run(elsa_attention), run(elsa_attention_reference)):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name,shape", list(itertools.product(BACKENDS, ((0, 5, 6), (2, 0, 6), (2, 1, 1)))))
def test_empty_batches_return_empty_outputs(name, shape):
    B, H, W = shape
    with backend(name) as device:
        case = Case(B=B, H=H, W=W, stride=2, mul="static", device=device)
        result = case.run(elsa_attention)
        assert result["out"].shape == (B, H // 2, W // 2, 6)
        assert all(result[f"d{key}"].shape == x.shape and not result[f"d{key}"].any() for key, x in case.tensors.items())


@pytest.mark.parametrize("name", BACKENDS)
def test_only_the_wanted_gradients_are_computed(name):
    with backend(name) as device:
        case = Case(mul="static", device=device)
        want = case.run(elsa_attention)
        for wanted in case.tensors:
            tensors = {key: x.detach().requires_grad_(key == wanted) for key, x in case.tensors.items()}
            out = elsa_attention(*tensors.values(), **case.options)
            torch.testing.assert_close(torch.autograd.grad(out, tensors[wanted], case.grad_out)[0], want[f"d{wanted}"], rtol=0, atol=1e-12)


# The registered operator

@pytest.mark.parametrize("name,mul,normalize", [("cpu", "static", True), ("cpu", None, False), (BACKENDS[-1], "per-sample", True)])
def test_opcheck(name, mul, normalize):
    with backend(name) as device:
        case = Case(mul=mul, dtype=torch.float32, device=device)
        tensors = [None if x is None else x.requires_grad_() for x in case.tensors.values()]
        opcheck(torch.ops.elsa.attention.default, (*tensors, 3, 1, 1, normalize), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compiles_as_one_graph(name, compiler):
    if compiler == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile's CPU code generator needs a C++ compiler")
    with backend(name) as device:
        for layout in ("nchw", "nhwc", "cropped"):
            case = Case(mul="static", stride=2, H=6, dtype=torch.float32, logits_layout=layout, device=device)
            torch._dynamo.reset()
            run = torch.compile(lambda *args, **options: elsa_attention(*args, **options) * 1.0, fullgraph=True, backend=compiler)
            case.check(case.run(run))


@pytest.mark.parametrize("name", BACKENDS)
def test_exports(name):
    class Layer(torch.nn.Module):
        def forward(self, v, logits, mul, add):
            return elsa_attention(v, logits, mul, add, kernel_size=3)

    with backend(name) as device:
        case = Case(mul="static", dtype=torch.float32, device=device)
        args = tuple(case.tensors.values())
        program = torch.export.export(Layer(), args)
        assert torch.equal(program.module()(*args), Layer()(*args))


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_casts_v_and_logits_and_keeps_the_filters(name):
    with backend(name) as device:
        case = Case(mul="static", dtype=torch.float32, device=device)
        run = lambda *args, **options: elsa_attention(*args, **options)
        with torch.autocast(device.type, torch.bfloat16):
            for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
                tensors = [x.detach().requires_grad_() for x in case.tensors.values()]
                out = call(*tensors, **case.options)
                assert out.dtype == torch.bfloat16
                out.float().square().sum().backward()
                assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in tensors)
                want = elsa_attention_reference(*(x.bfloat16().double() for x in case.tensors.values()), **case.options)
                assert (out.double() - want).abs().max() <= 2 ** -6 * want.abs().max()


def test_double_backward_is_refused():
    case = Case(dtype=torch.float64)
    v, logits, _, add = (None if x is None else x.requires_grad_() for x in case.tensors.values())
    grad, = torch.autograd.grad(elsa_attention(v, logits, None, add, **case.options).square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        grad.sum().backward()


GOOD = dict(v=(1, 6, 7, 8), logits=(1, 2 * 9, 6, 7), ghost_mul=(8, 3, 3), ghost_add=(8, 3, 3))


@pytest.mark.parametrize("change,error,message", [
    (dict(kernel_size=4), ValueError, r"kernel_size: got 4, expected an odd"),
    (dict(kernel_size=0), ValueError, r"kernel_size: got 0"),
    (dict(kernel_size=3.0), TypeError, r"kernel_size: got 3.0, expected an integer"),
    (dict(kernel_size=True), TypeError, r"kernel_size: got True"),
    (dict(dilation=0), ValueError, r"dilation: got 0"),
    (dict(stride=-1), ValueError, r"stride: got -1"),
    (dict(lam=0.5), ValueError, r"lam: got 0.5, expected an integer"),
    (dict(lam=-1), ValueError, r"lam: got -1"),
    (dict(lam="1"), TypeError, r"lam: got '1'"),
    (dict(gamma=float("nan")), ValueError, r"gamma: got nan"),
    (dict(v=[1]), TypeError, r"v: got list"),
    (dict(v=torch.zeros(1, 6, 7, 8, dtype=torch.int64)), TypeError, r"v: got dtype torch.int64, expected .*float32"),
    (dict(v=torch.zeros(6, 7, 8)), ValueError, r"v: got shape \(6, 7, 8\), expected \(B, H, W, C\)"),
    (dict(logits=torch.zeros(1, 18, 6, 7, dtype=torch.float16)), TypeError, r"logits: got dtype torch.float16, expected torch.float32"),
    (dict(logits=torch.zeros(1, 18, 6, 7, device="meta")), ValueError, r"logits: got a tensor on meta, expected v's device cpu"),
    (dict(logits=torch.zeros(1, 17, 6, 7)), ValueError, r"logits: got shape \(1, 17, 6, 7\), expected \(B, heads \* 9"),
    (dict(logits=torch.zeros(1, 0, 6, 7)), ValueError, r"logits: got shape \(1, 0, 6, 7\)"),
    (dict(logits=torch.zeros(1, 18, 7, 6)), ValueError, r"logits: got shape \(1, 18, 7, 6\).*6, 7\)"),
    (dict(logits=torch.zeros(1, 27, 6, 7)), ValueError, r"3 heads, expected a number of heads that divides v's 8 channels"),
    (dict(ghost_mul=torch.zeros(4, 3, 3)), ValueError, r"ghost_mul: got shape \(4, 3, 3\), expected \(8, 3, 3\)"),
    (dict(ghost_add=torch.zeros(2, 8, 3, 3)), ValueError, r"ghost_add: got shape \(2, 8, 3, 3\).*one filter a sample"),
    (dict(ghost_add=torch.zeros(8, 3, 3, dtype=torch.float64)), TypeError, r"ghost_add: got dtype torch.float64"),
    (dict(logits=None, ghost_add=None), ValueError, r"logits: None leaves ghost_add alone"),
])
def test_bad_arguments_are_named(change, error, message):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | dict(kernel_size=3) | change
    with pytest.raises(error, match=message):
        elsa_attention(**arguments)


def test_samples_past_32_bit_offsets_are_refused():
    """Shapes alone decide, so tensors without memory will do; the batch may pass 2**31 elements, its offsets are 64-bit."""
    with pytest.raises(ValueError, match=r"v: got \(33000, 33000, 2\) a sample, expected fewer than 2\*\*31"):
        elsa_attention(torch.empty(1, 33000, 33000, 2, device="meta"), None, None, torch.empty(2, 3, 3, device="meta"), kernel_size=3)
    out = elsa_attention(torch.empty(5, 30000, 30000, 2, device="meta"), None, None, torch.empty(2, 3, 3, device="meta"), kernel_size=3)
    assert out.shape == (5, 30000, 30000, 2)


# The tuner, with a clock of its own in place of a GPU

@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_table", None)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretend GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(pytest.importorskip("triton").testing, "do_bench", lambda run, **_: run())
    return torch.device("cuda")


CONFIGS = [dict(BP=1), dict(BP=2), dict(BP=3)]


def slow(BP):
    return {1: 5.0, 2: 1.0, 3: 2.0}[BP]


def test_tuner_takes_the_fastest_and_remembers_it_on_disk(gpu, monkeypatch, tmp_path):
    assert tuning.launch("forward", dict(k=3), CONFIGS, slow, gpu) == 1.0
    assert list(tuning.tuned().values()) == [dict(BP=2)]
    monkeypatch.setattr(tuning, "_table", None)  # as a new process
    monkeypatch.setattr(tuning, "_measure", lambda *_: pytest.fail("measured again"))
    assert tuning.launch("forward", dict(k=3), CONFIGS, slow, gpu) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


def test_tuner_measures_again_what_is_damaged_or_out_of_date(gpu, monkeypatch, tmp_path):
    for content in ("{half a fi", "[]", None):
        monkeypatch.setattr(tuning, "_table", None)
        if content is None:  # a candidate that exists no more
            table = tuning.tuned()
            tuning.set_tuned({key: dict(BP=64) for key in table})
        else:
            tuning.cache_file().write_text(content)
        assert tuning.launch("forward", dict(k=3), CONFIGS, slow, gpu) == 1.0


def test_tuner_skips_what_does_not_fit_and_says_when_nothing_does(gpu):
    from triton.runtime.errors import OutOfResources

    def run(BP):
        if BP != 3:
            raise OutOfResources(2, 1, "shared memory")
        return 7.0
    assert tuning.launch("dv", dict(k=5), CONFIGS, run, gpu) == 7.0
    with pytest.raises(RuntimeError, match="dv: none of"):
        tuning.launch("dv", dict(k=7), CONFIGS[:2], run, gpu)


def test_tuner_takes_the_first_without_a_gpu(gpu, tmp_path):
    assert tuning.launch("forward", dict(k=3), CONFIGS, slow, torch.device("cpu")) == 5.0
    assert not list(tmp_path.iterdir())


def test_known_gpus_are_not_tuned(gpu, monkeypatch, tmp_path, capsys):
    tuning.launch("forward", dict(k=3), CONFIGS, slow, gpu)
    assert capsys.readouterr().err.startswith("tuning Pretend GPU | forward | k=3 ... BP=2 ")
    path = tuning.ship(gpu)
    assert path == tmp_path / "shipped/Pretend-GPU.json" and json.loads(path.read_text()) == {"Pretend GPU | forward | k=3": dict(BP=2)}
    tuning.cache_file().unlink()
    monkeypatch.setattr(tuning, "_table", None)
    monkeypatch.setattr(tuning, "_measure", lambda *_: pytest.fail("measured again"))
    assert tuning.launch("forward", dict(k=3), CONFIGS, slow, gpu) == 1.0
    assert not capsys.readouterr().err


def test_ranks_share_one_table(gpu):
    tuning.set_tuned({"Pretend GPU | x": dict(BP=1)})
    assert tuning.tuned() == {"Pretend GPU | x": dict(BP=1)}
