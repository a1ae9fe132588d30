"""kernels.hadamard, which makes ELSA's attention maps, against torch's own convolution, on both paths."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from backends import BACKENDS, backend
from kernels import hadamard
from models.elsa import ELSA
from published import assert_close

on_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def problem(seed=0, B=2, H=4, W=5, groups=3, width=4, k=3, dtype=torch.float32):
    """q, k as slices of one projection, weight, bias: leaves; and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    Q = groups * width
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    projection = draw(B, H, W, 2 * Q + 3).to(dtype)
    weight, bias = draw(Q, width, k, k) / (width * k * k) ** 0.5, draw(Q)
    return projection, [weight, bias], draw(B, H, W, Q).to(dtype)


def expected(projection, parameters, grad, scale, dilation):
    """Output and gradients of (projection, weight, bias) in float64."""
    projection, weight, bias = leaves = [x.double().requires_grad_() for x in (projection, *parameters)]
    Q, width, k, _ = weight.shape
    h = (projection[..., :Q] * projection[..., Q:2 * Q] * scale).permute(0, 3, 1, 2)
    u = F.conv2d(h, weight, bias, padding=k // 2 * dilation, dilation=dilation, groups=Q // width)
    z = F.gelu(u).permute(0, 2, 3, 1)
    return [z, *torch.autograd.grad(z, leaves, grad.double())]


def ours(projection, parameters, grad, scale, dilation, device):
    projection, weight, bias = leaves = [x.to(device).requires_grad_() for x in (projection, *parameters)]
    Q = weight.shape[0]
    q, k = projection[..., :Q], projection[..., Q:2 * Q]
    z = hadamard(q, k, weight, bias, scale=scale, dilation=dilation)
    return [x.cpu().double() for x in (z, *torch.autograd.grad(z, leaves, grad.to(device)))]


def compare(case, scale, dilation, name, tolerance):
    wanted = expected(*case, scale, dilation)
    with backend(name) as device, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        results = ours(*case, scale, dilation, device)
        for part, reference, result in zip(("z", "dprojection", "dweight", "dbias"), wanted, results):
            assert_close(f"{part}, {name}", reference, result, tolerance)


@settings(deadline=None, max_examples=25)
@given(H=st.integers(1, 6), W=st.integers(1, 6), groups=st.integers(1, 5), width=st.sampled_from([1, 3, 4, 8]),
       k=st.sampled_from([1, 3, 5]), dilation=st.integers(1, 2), scale=st.sampled_from([1.0, 0.3]),
       seed=st.integers(0, 999))
def test_cpu_path_of_torchs_convolution(H, W, groups, width, k, dilation, scale, seed):
    compare(problem(seed, 1, H, W, groups, width, k), scale, dilation, "cpu", 1e-4)


@on_triton
@settings(deadline=None, max_examples=6)
@given(H=st.integers(1, 5), W=st.integers(1, 5), groups=st.integers(1, 5),
       width=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17]), k=st.sampled_from([1, 3]), dilation=st.integers(1, 2),
       scale=st.sampled_from([1.0, 0.3]), seed=st.integers(0, 999))
@example(H=4, W=5, groups=2, width=40, k=3, dilation=2, scale=0.3, seed=0)  # so wide that a row takes two products
@example(H=9, W=8, groups=2, width=3, k=3, dilation=3, scale=1.0, seed=1)  # patches of pixels three apart
@example(H=3, W=7, groups=3, width=1, k=5, dilation=1, scale=0.3, seed=2)  # patches of four columns
@example(H=2, W=11, groups=1, width=2, k=11, dilation=1, scale=1.0, seed=3)  # more neighbours than patches read
def test_kernels_of_torchs_convolution(H, W, groups, width, k, dilation, scale, seed):
    compare(problem(seed, 1, H, W, groups, width, k), scale, dilation, "triton", 1e-4)


@on_triton
def test_taps_beyond_everything_cost_no_patches():
    from kernels import convolution
    q, weight = torch.zeros(2, 3, 5, 8), torch.zeros(8, 4, 3, 3)
    assert convolution._Geometry(q, weight, 10 ** 9).num_patches(1) == 2 * 5 * 5
    case = problem(0, 2, 3, 5, 2, 4, 3)
    with backend("triton") as device:
        results = [ours(*case, 1.0, dilation, device) for dilation in (5, 6, 10 ** 9)]
    for want, *others in zip(expected(*case, 1.0, 5), *results):
        assert_close("at 5", want, others[0], 1e-4)
        assert all(torch.equal(others[0], other) for other in others[1:])


@on_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_kernels_at_the_published_size_of_window_and_in_every_dtype(dtype):
    compare(problem(1, 2, 9, 8, 4, 4, 7, dtype), 1.0, 1, "triton", TOLERANCE[dtype])


@on_triton
@pytest.mark.parametrize("programs", (512, 3), ids=("of few pixels", "few"))
def test_many_splits_of_the_sum_over_pixels(monkeypatch, programs):
    """More than are added at a time; or one that takes several products."""
    from kernels import convolution
    for name, value in dict(SPLIT_SIZE=32, MAX_BLOCK_P=32, MAX_PROGRAMS=programs).items():  # as many as in a product
        monkeypatch.setattr(convolution, name, value)
    compare(problem(2, 4, 23, 11, 2, 4, 3), 1.0, 1, "triton", 1e-4)


@on_triton
def test_two_runs_are_bit_identical_and_the_operator_is_registered_rightly():
    projection, (weight, bias), grad = problem(3)
    with backend("triton") as device:
        first, second = (ours(projection, (weight, bias), grad, 1.0, 1, device) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        q, k = (x.to(device).detach().requires_grad_() for x in (projection[..., :12], projection[..., 12:24]))
        arguments = (q, k, weight.to(device).requires_grad_(), bias.to(device).requires_grad_(), 1.0, 1)
        opcheck(torch.ops.elsa.hadamard, arguments)
        compiled = torch.compile(lambda *x: hadamard(*x) * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments[:4]), hadamard(*arguments[:4]) * 2)
        with pytest.raises(RuntimeError, match="first derivative only|second"):
            z = hadamard(*arguments[:4])
            gradient, = torch.autograd.grad(z.sum(), q, create_graph=True)
            gradient.sum().backward()


@on_triton
def test_a_layer_is_the_same_on_both_paths():
    torch.manual_seed(0)
    layer, x = ELSA(12, 2, kernel_size=3, group_width=4, qk_scale=1), torch.randn(2, 5, 4, 12)
    wanted = layer(x)
    with backend("triton") as device:
        assert_close("layer", wanted, layer.to(device)(x.to(device)).cpu(), 1e-5)


class Stop(torch.autograd.Function):
    """Has no gradient, which is not one of zeros."""
    forward, backward = staticmethod(lambda ctx, x: x.clone()), staticmethod(lambda ctx, grad: None)


@on_triton
def test_where_no_gradient_comes_none_goes():
    with backend("triton") as device:
        leaves = [torch.ones(shape, device=device, requires_grad=True)
                  for shape in ((1, 2, 2, 4), (1, 2, 2, 4), (4, 4, 3, 3), (4,))]
        assert torch.autograd.grad(Stop.apply(hadamard(*leaves)).sum(), leaves, allow_unused=True) == (None,) * 4


@on_triton
@pytest.mark.parametrize("layout", ("surrounded by NaN", "channels first"))
def test_what_lies_beside_the_channels_in_memory_is_not_read(layout):
    """A block of channels reaches past the last group. NaN there must not come through, not even times zero."""
    projection, parameters, grad = problem(4, groups=3)
    Q = 12

    def elsewhere(x):
        if layout == "channels first":
            return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        wide = torch.full((*x.shape[:3], Q + 7), float("nan"), device=x.device)
        wide[..., 3:3 + Q] = x
        return wide[..., 3:3 + Q]

    def run(place):
        q, k, weight, bias = (x.to(device).detach()
                              for x in (projection[..., :Q], projection[..., Q:2 * Q], *parameters))
        leaves = [x.requires_grad_() for x in (place(q), place(k), weight, bias)]
        z = hadamard(*leaves)
        return z, *torch.autograd.grad(z, leaves, place(grad.to(device)))

    with backend("triton") as device:
        for alone, beside in zip(run(torch.clone), run(elsewhere)):
            assert torch.equal(alone, beside)


@on_triton
def test_nan_stays_in_its_block_of_channels_and_sample_and_near_its_pixel():
    """A group of five leaves three channels of a block of eight; in memory those are the first of the next block."""
    projection, parameters, grad = problem(5, groups=3, width=5, H=6, W=9)
    with backend("triton") as device:
        clean = ours(*problem(5, groups=3, width=5, H=6, W=9), 1.0, 1, device)
        projection[0, 1, 1, 5], grad[0, 1, 1, 5] = float("nan"), float("nan")
        z, dprojection, dweight, dbias = ours(projection, parameters, grad, 1.0, 1, device)
    assert z[0, 1, 1, 5:10].isnan().all()
    for dirty, right in ((z[..., :5], clean[0][..., :5]), (dprojection[..., :5], clean[1][..., :5]),
                         (dprojection[..., 10:20], clean[1][..., 10:20]), (dweight[:5], clean[2][:5]),
                         (dbias[10:], clean[3][10:]), (z[1], clean[0][1]), (dprojection[1], clean[1][1]),
                         (z[0, :, 4:], clean[0][0, :, 4:]), (dprojection[0, :, 6:], clean[1][0, :, 6:])):
        assert torch.equal(dirty, right)


SHAPES = dict(q=(1, 4, 5, 12), k=(1, 4, 5, 12), weight=(12, 4, 3, 3), bias=(12,))
of = lambda dtype, *names: {name: torch.zeros(SHAPES[name], dtype=dtype) for name in names}


@pytest.mark.parametrize("change, error, words", [
    (dict(q=torch.zeros(1, 4, 5, 8)), ValueError, "q, k: got shapes"),
    (dict(q=torch.zeros(4, 5, 12), k=torch.zeros(4, 5, 12)), ValueError, "q, k: got shapes"),
    (dict(weight=torch.zeros(12, 5, 3, 3)), ValueError, "a width that divides 12"),
    (dict(weight=torch.zeros(12, 0, 3, 3)), ValueError, r"weight: got shape \(12, 0, 3, 3\)"),
    (dict(weight=torch.zeros(12, 4, 2, 2)), ValueError, "an odd k"),
    (dict(weight=torch.zeros(12, 4, 3, 5)), ValueError, "weight: got shape"),
    (dict(bias=torch.zeros(11)), ValueError, r"bias: got shape \(11,\)"),
    (dict(bias=None), TypeError, "bias: got NoneType, expected a torch.Tensor"),
    (dict(q=[1]), TypeError, "q: got list"),
    (dict(dilation=0), ValueError, "dilation: got 0, expected at least 1"),
    (dict(dilation=-1), ValueError, "dilation: got -1"),
    (dict(dilation=1.0), TypeError, "dilation: got 1.0, expected an integer"),
    (dict(dilation=True), TypeError, "dilation: got True"),
    (dict(scale=float("inf")), ValueError, "scale: got inf, expected a finite number"),
    (dict(scale=torch.tensor(2.0)), TypeError, r"scale: got tensor\(2.\)"),  # which would get no gradient
    (of(torch.int64, "q", "k"), TypeError, r"q: got dtype torch.int64, expected .*with .to\(torch.float32\)"),
    (of(torch.bfloat16, "q"), TypeError, "k: got dtype torch.float32, expected torch.bfloat16 beside q of torch.bfl"),
    (of(torch.float64, "weight"), TypeError, "weight: got dtype torch.float64, expected torch.float32 beside q"),
    (of(torch.bfloat16, "bias"), TypeError, "bias: got dtype torch.bfloat16"),
    (dict(weight=torch.zeros(12, 4, 3, 3, device="meta")), ValueError,
     "weight: got a tensor on meta, expected q's device cpu")])
@pytest.mark.parametrize("name", BACKENDS)
def test_mistakes_are_named(name, change, error, words):
    with backend(name), pytest.raises(error, match=words):
        hadamard(**{**of(torch.float32, *SHAPES), **change})


def test_samples_past_32_bit_offsets_are_refused():
    """Of q, of k, or of what the kernels make of them: whole blocks of channels, eight at least."""
    meta = lambda *shape: torch.empty(shape, device="meta")
    parameters = meta(2, 2, 3, 3), meta(2)
    with pytest.raises(ValueError, match=r"q: got \(33000, 33000, 2\) a sample, expected fewer than 2\*\*31"):
        hadamard(meta(1, 33000, 33000, 2), meta(1, 33000, 33000, 2), *parameters)
    sparse = torch.empty(2 ** 32, device="meta").as_strided((1, 2, 2, 2), (8, 2 ** 31 - 2, 1, 1))
    with pytest.raises(ValueError, match=r"k: got \(2, 2, 2\) a sample"):
        hadamard(meta(1, 2, 2, 2), sparse, *parameters)
    with pytest.raises(ValueError, match=r"q: got \(17000, 17000, 2\) a sample"):
        hadamard(meta(1, 17000, 17000, 2), meta(1, 17000, 17000, 2), *parameters)
    with pytest.raises(ValueError, match=r"q: got 18 samples of 11000 x 11000, expected fewer than 2\*\*31 pixels"):
        hadamard(meta(18, 11000, 11000, 2), meta(18, 11000, 11000, 2), *parameters)
    assert hadamard(meta(9, 11000, 11000, 2), meta(9, 11000, 11000, 2), *parameters).shape == (9, 11000, 11000, 2)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 5, 12), (1, 0, 5, 12), (2, 4, 0, 12)])
def test_empty_maps(name, shape):
    with backend(name) as device:
        leaves = [torch.zeros(size, device=device, requires_grad=True) for size in (shape, shape, (12, 4, 3, 3), (12,))]
        z = hadamard(*leaves)
        assert z.shape == shape
        for leaf, grad in zip(leaves, torch.autograd.grad(z.sum(), leaves)):
            assert grad.shape == leaf.shape and not grad.any()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype, parameters, autocast", [
    (torch.bfloat16, torch.float32, False), (torch.float16, torch.float16, False),
    (torch.float64, torch.float32, False),
    (torch.float32, torch.float32, True), (torch.bfloat16, torch.float32, True), (torch.float64, torch.float64, True)],
    ids=str)
def test_both_paths_take_the_same_dtypes_and_round_sums_once(name, dtype, parameters, autocast):
    """A bias that is a column of a matrix is as good as another."""
    projection, (weight, bias), grad = problem(6, dtype=dtype)
    weight, bias = weight.to(parameters), bias.to(parameters)
    result = torch.bfloat16 if autocast and dtype != torch.float64 else dtype
    with backend(name) as device:
        leaves = [x.to(device).requires_grad_() for x in (projection, weight, torch.stack([bias, bias], 1)[:, 0])]
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            z = hadamard(leaves[0][..., :12], leaves[0][..., 12:24], *leaves[1:])
        assert z.dtype == result
        results = z, *torch.autograd.grad(z, leaves, grad.to(device, result))
    wanted = expected(projection.to(result), [weight, bias], grad.to(result), 1.0, 1)
    for last, want, got, leaf in zip((result, result, parameters, parameters), wanted, results, (z, *leaves)):
        assert got.dtype == leaf.dtype
        limit = torch.finfo(last).eps * want.abs() + 2e-5 * (1 + want.abs().max())
        if name == "triton":  # the kernels round q * k, weight and u, too
            limit += 4 * torch.finfo(result).eps * want.abs().max()
        assert ((got.cpu().double() - want).abs() <= limit).all(), leaf.shape
