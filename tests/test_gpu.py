"""What only a GPU can show: the kernels at real sizes and dtypes. Skipped where there is none."""
import pytest
import torch

import limits
from kernels import elsa_attention, tuning
from models import create_model
from test_hadamard import expected, ours, problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# (B, H, W, heads, head width, k, stride, dilation, mul?)
SIZES = {
    "swin_t stage 1": (8, 56, 56, 3, 32, 7, 1, 1, False),
    "swin_t stage 3": (8, 14, 14, 12, 32, 7, 1, 1, False),
    "volo_d1": (8, 28, 28, 6, 32, 5, 1, 1, True),
    "detector": (1, 200, 334, 3, 32, 7, 1, 1, False),
    "strided": (4, 55, 41, 4, 24, 5, 2, 1, True),
    "dilated": (4, 33, 47, 2, 40, 3, 1, 3, True),
    "wide head": (2, 16, 16, 1, 256, 3, 1, 1, True),
}
NAMES = "v", "logits", "ghost_mul", "ghost_add"
MAPS = {"swin_t": (8, 56, 56, 16, 4, 7), "volo_d1": (8, 28, 28, 16, 8, 5), "detector": (1, 200, 334, 16, 4, 7)}


def draw(size, dtype, seed=0):
    B, H, W, G, D, k, stride, dilation, multiplicative = SIZES[size]
    torch.manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()
    v, logits = random(B, H, W, G * D), random(B, G * k * k, H // stride, W // stride)
    mul = random(G * D, k, k) if multiplicative else None
    return (v, logits, mul, random(G * D, k, k)), dict(kernel_size=k, stride=stride, dilation=dilation)


def run(tensors, options):
    """{"out": ..., "dv": ..., ...}. The gradient of out is random: of ones, no gradient shows a wrong neighbour."""
    out = elsa_attention(*tensors, **options)
    leaves = {f"d{name}": x for name, x in zip(NAMES, tensors) if x is not None}
    return dict(zip(("out", *leaves), (out.detach(), *torch.autograd.grad(out, list(leaves.values()), gradient(out)))))


def gradient(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_equals_reference_at_real_sizes(size, dtype):
    tensors, options = draw(size, dtype)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        got = run(tensors, options)
    finally:
        torch.use_deterministic_algorithms(False)
    named = dict(zip(NAMES, tensors))
    options = dict(dilation=1, stride=1, lam=1, gamma=1, normalize=True) | options
    limits.assert_each_element_close(got, *limits.aggregation_and_limits(named, options, gradient(got["out"])))


@pytest.mark.parametrize("size", SIZES)
def test_every_configuration_gives_the_same(size, monkeypatch):
    tensors, options = draw(size, torch.float32)
    want = run(tensors, options)
    for choice in range(4):
        launch = lambda kernel, problem, configs, call, device: call(**configs[choice % len(configs)])
        monkeypatch.setattr(tuning, "launch", launch)
        for name, x in run(tensors, options).items():
            error = (x - want[name]).abs().max() / want[name].abs().max()
            assert error <= 1e-5, (name, choice, error)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_two_runs_are_bit_identical(dtype):
    tensors, options = draw("swin_t stage 1", dtype)
    first, second = run(tensors, options), run(tensors, options)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", MAPS)
def test_every_configuration_gives_the_same_maps(size, dtype, monkeypatch):
    """kernels.hadamard at real sizes."""
    case = projection, parameters, grad = problem(0, *MAPS[size], dtype)
    want = expected(projection.cuda(), [x.cuda() for x in parameters], grad.cuda(), 1.0, 1)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for choice in range(3):
        launch = lambda kernel, problem, configs, call, device: call(**configs[choice])
        monkeypatch.setattr(tuning, "launch", launch)
        for x, y in zip(ours(*case, 1.0, 1, torch.device("cuda")), want):
            assert (x - y.cpu()).norm() <= limit * y.norm(), choice


def test_tuning_is_remembered_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(tuning, "_table", None)
    tensors, options = draw("volo_d1", torch.bfloat16)
    run(tensors, options)
    assert len(tuning.tuned()) == 4 and (tmp_path / "tuned.json").exists()
    monkeypatch.setattr(tuning, "_table", None)
    monkeypatch.setattr(tuning, "_measure", lambda *_: pytest.fail("measured again"))
    run(tensors, options)


def test_a_batch_of_more_than_2_to_the_31_elements():
    """v of 2.2e9 elements, 16-bit: the last samples lie beyond 32-bit offsets."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2 ** 30:
        pytest.skip("needs 40 GB of GPU memory")
    B, H, W, C = 700, 256, 256, 48
    v = torch.randn(1, H, W, C, device="cuda", dtype=torch.bfloat16).expand(B, H, W, C).contiguous()
    logits = torch.randn(1, 9, H, W, device="cuda", dtype=torch.bfloat16)
    out = elsa_attention(v, logits.expand(B, -1, -1, -1), kernel_size=3)
    assert v.numel() > 2 ** 31 and torch.equal(out[0], out[-1])
    assert torch.equal(out[0], elsa_attention(v[:1], logits, kernel_size=3)[0])


@pytest.mark.parametrize("compiled", (False, True))
def test_elsa_swin_trains_a_step_in_mixed_precision(compiled):
    torch.manual_seed(0)
    model = create_model("swin_t", attn="elsa").cuda()
    step = torch.compile(model) if compiled else model
    images = torch.randn(4, 3, 224, 224, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(step(images).float(), torch.arange(4, device="cuda"))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gpu_equals_cpu():
    torch.manual_seed(0)
    model = create_model("swin_t", attn="elsa").eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        want, got = model(images), model.cuda()(images.cuda()).cpu()
    assert (got - want).abs().max() <= 1e-3 * want.std()
