"""kernels.elsa_attention as callers and torch see it: arguments, gradients, compilers, autocast."""
import itertools
import shutil

import pytest
import torch
from torch.library import opcheck

from backends import BACKENDS, backend
from cases import Case
from kernels import attention, elsa_attention, elsa_attention_reference


@pytest.mark.parametrize("name,shape", list(itertools.product(BACKENDS, ((0, 5, 6), (2, 0, 6), (2, 1, 1)))))
def test_empty_batches_return_empty_outputs(name, shape):
    B, H, W = shape
    with backend(name) as device:
        case = Case(B=B, H=H, W=W, stride=2, mul="static", device=device)
        result = case.run(elsa_attention)
        assert result["out"].shape == (B, H // 2, W // 2, 6)
        for key, x in case.tensors.items():
            assert result[f"d{key}"].shape == x.shape and not result[f"d{key}"].any()


@pytest.mark.parametrize("name", BACKENDS)
def test_only_the_wanted_gradients_are_computed(name):
    with backend(name) as device:
        case = Case(mul="static", device=device)
        want = case.run(elsa_attention)
        for wanted in case.tensors:
            tensors = {key: x.detach().requires_grad_(key == wanted) for key, x in case.tensors.items()}
            out = elsa_attention(*tensors.values(), **case.options)
            got, = torch.autograd.grad(out, tensors[wanted], case.grad_out)
            torch.testing.assert_close(got, want[f"d{wanted}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BACKENDS)
def test_zero_stride_and_non_contiguous_gradient(name):
    """A sum's gradient is expanded from one number; a transposed loss hands down permuted strides."""
    with backend(name) as device:
        losses = lambda out: out.sum(), lambda out: (out.permute(0, 3, 1, 2).flatten(2) ** 2).sum()
        for seed, reduce in enumerate(losses):
            case = Case(seed=seed, device=device)
            tensors = [x.requires_grad_() for x in case.tensors.values() if x is not None]

            def run(operator):
                out = operator(tensors[0], tensors[1], None, tensors[2], **case.options)
                return torch.autograd.grad(reduce(out), tensors)

            for got, want in zip(run(elsa_attention), run(elsa_attention_reference)):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name,mul,normalize", [
    ("cpu", "static", True), ("cpu", None, False), (BACKENDS[-1], "per-sample", True)])
def test_opcheck(name, mul, normalize):
    with backend(name) as device:
        case = Case(H=3, heads=1 if name == "triton" else 2, mul=mul, dtype=torch.float32, device=device)
        tensors = [None if x is None else x.requires_grad_() for x in case.tensors.values()]
        opcheck(torch.ops.elsa.local_attention.default, (*tensors, 3, 1, 1, normalize), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compiles_as_one_graph(name, compiler):
    if compiler == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile's CPU code generator needs a C++ compiler")
    with backend(name) as device:
        for layout in ("nchw", "nhwc", "cropped"):
            case = Case(mul="static", stride=2, H=6, dtype=torch.float32, logits_layout=layout, device=device)
            torch._dynamo.reset()
            times_one = lambda *args, **options: elsa_attention(*args, **options) * 1.0
            case.check(case.run(torch.compile(times_one, fullgraph=True, backend=compiler)))


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
                v, logits, *filters = case.tensors.values()
                rounded = v.bfloat16().double(), logits.bfloat16().double(), *(x.double() for x in filters)
                want = elsa_attention_reference(*rounded, **case.options)
                # One rounding, of the sum: the interpreter's, which cuts off, is one unit in the last place.
                assert ((out.double() - want).abs() <= 2 ** -7 * want.abs() + 1e-5).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_casts_v_without_logits_and_logits_of_another_dtype(name):
    with backend(name) as device, torch.autocast(device.type, torch.bfloat16):
        case = Case(heads=1, dtype=torch.float32, device=device)
        v, logits, _, add = case.tensors.values()
        assert elsa_attention(v, None, None, add, **case.options).dtype == torch.bfloat16
        assert elsa_attention(v, logits.half(), None, add, **case.options).dtype == torch.bfloat16


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_leaves_float64_alone(name):
    with backend(name) as device, torch.autocast(device.type, torch.bfloat16):
        case = Case(dtype=torch.float64, device=device)
        assert elsa_attention(*case.tensors.values(), **case.options).dtype == torch.float64


def test_double_backward_is_refused():
    case = Case(dtype=torch.float64)
    v, logits, _, add = (None if x is None else x.requires_grad_() for x in case.tensors.values())
    loss = elsa_attention(v, logits, None, add, **case.options).square().sum()
    grad, = torch.autograd.grad(loss, v, create_graph=True)
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
    (dict(v=torch.zeros(1, 6, 7, 8, dtype=torch.int64)), TypeError,
     r"v: got dtype torch.int64, expected .*float32"),
    (dict(v=torch.zeros(6, 7, 8)), ValueError, r"v: got shape \(6, 7, 8\), expected \(B, H, W, C\)"),
    (dict(logits=torch.zeros(1, 18, 6, 7, dtype=torch.float16)), TypeError,
     r"logits: got dtype torch.float16, expected torch.float32"),
    (dict(logits=torch.zeros(1, 18, 6, 7, device="meta")), ValueError,
     r"logits: got a tensor on meta, expected v's device cpu"),
    (dict(logits=torch.zeros(1, 17, 6, 7)), ValueError,
     r"logits: got shape \(1, 17, 6, 7\), expected \(B, heads \* 9"),
    (dict(logits=torch.zeros(2, 18, 6, 7)), ValueError, r"logits: got shape \(2, 18, 6, 7\)"),
    (dict(logits=torch.zeros(1, 0, 6, 7)), ValueError, r"logits: got shape \(1, 0, 6, 7\)"),
    (dict(logits=torch.zeros(1, 18, 7, 6)), ValueError, r"logits: got shape \(1, 18, 7, 6\).*6, 7\)"),
    (dict(logits=torch.zeros(1, 27, 6, 7)), ValueError,
     r"3 heads, expected a number of heads that divides v's 8 channels"),
    (dict(ghost_mul=torch.zeros(4, 3, 3)), ValueError,
     r"ghost_mul: got shape \(4, 3, 3\), expected \(8, 3, 3\)"),
    (dict(ghost_add=torch.zeros(2, 8, 3, 3)), ValueError,
     r"ghost_add: got shape \(2, 8, 3, 3\).*one filter a sample"),
    (dict(ghost_add=torch.zeros(8, 3, 3, dtype=torch.float64)), TypeError, r"ghost_add: got dtype torch.float64"),
    (dict(logits=None, ghost_add=None), ValueError, r"logits: None leaves ghost_add alone"),
])
def test_bad_arguments_are_named(change, error, message):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | dict(kernel_size=3) | change
    with pytest.raises(error, match=message):
        elsa_attention(**arguments)


def test_a_gradient_is_allocated_once(monkeypatch):
    """What the operator's fake kernel would allocate to describe its results, on real tensors, is not needed."""
    monkeypatch.setattr(attention, "_fake_attention_backward", lambda *_: pytest.fail("described by allocating"))
    for layout in ("nhwc", "cropped", "expanded"):
        case = Case(mul="static", dtype=torch.bfloat16, v_layout="nchw", logits_layout=layout)
        case.check()


@pytest.mark.parametrize("name", BACKENDS)
def test_taps_beyond_everything(name):
    """From the image's size on, a dilation leaves the centre alone, however large it is."""
    with backend(name) as device:
        for dilation in (6, 2 ** 29, 2 ** 40):
            case = Case(heads=1, kernel_size=9, dilation=6, mul="static", device=device)
            want = case.run(elsa_attention_reference)
            case.options["dilation"] = dilation
            for key, got in case.run(elsa_attention).items():
                torch.testing.assert_close(got, want[key], rtol=0, atol=1e-11)


def test_samples_past_32_bit_offsets_are_refused():
    """Shapes alone decide, so tensors without memory will do. Batches may pass 2**31 elements: 64-bit offsets."""
    add = torch.empty(2, 3, 3, device="meta")
    with pytest.raises(ValueError, match=r"v: got \(33000, 33000, 2\) a sample, expected fewer than 2\*\*31"):
        elsa_attention(torch.empty(1, 33000, 33000, 2, device="meta"), None, None, add, kernel_size=3)
    with pytest.raises(ValueError, match=r"v: got \(2, 2, 2\) a sample, expected fewer than 2\*\*31"):
        elsa_attention(torch.empty(2 ** 32, device="meta").as_strided((1, 2, 2, 2), (8, 2 ** 31 - 2, 1, 1)),
                       None, None, add, kernel_size=3)
    with pytest.raises(ValueError, match=r"v: got \(33000, 33000, 2\) a sample"):  # what it gives is not expanded
        expanded = torch.empty(1, 1, 1, 2, device="meta").expand(1, 33000, 33000, 2)
        elsa_attention(expanded, None, None, add, kernel_size=3)
    out = elsa_attention(torch.empty(5, 30000, 30000, 2, device="meta"), None, None, add, kernel_size=3)
    assert out.shape == (5, 30000, 30000, 2)
