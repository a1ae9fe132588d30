"""kernels/transforms.py: both operators under torch.func and forward-mode differentiation, against plain torch."""
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, linearize, vmap

from backends import BACKENDS, backend
from kernels import elsa_attention, elsa_attention_reference, hadamard

OPTIONS = dict(kernel_size=3, lam=2, gamma=0.5)


def tensors(device, dtype=torch.float64):
    """v, logits of two heads, ghost filters, the multiplicative one of each sample; and a tangent of each."""
    torch.manual_seed(0)
    shapes = (2, 3, 4, 4), (2, 18, 3, 4), (2, 4, 3, 3), (4, 3, 3)
    return [tuple(torch.randn(shape, dtype=dtype, device=device) for shape in shapes) for _ in range(2)]


def attention(operator, **options):
    return lambda *primals: operator(*primals, **{**OPTIONS, **options})


def plain_hadamard(q, k, weight, bias):
    u = F.conv2d((q * k * 0.3).permute(0, 3, 1, 2), weight, bias, padding=1, groups=2)
    return F.gelu(u).permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("options", [{}, dict(normalize=False), dict(dilation=2, stride=2)])
def test_tangents(name, which, options):
    with backend(name) as device:
        primals, tangents = tensors(device)
        if options.get("stride"):
            primals, tangents = ((v, logits[:, :, :1, :2], *ghosts) for v, logits, *ghosts in (primals, tangents))
        tangents = [x if i in which else torch.zeros_like(x) for i, x in enumerate(tangents)]
        want = jvp(attention(elsa_attention_reference, **options), primals, tuple(tangents))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, tangents[i]) if i in which else x for i, x in enumerate(primals)]
            out = forward_ad.unpack_dual(attention(elsa_attention, **options)(*duals))
            torch.testing.assert_close(tuple(out), want, rtol=0, atol=1e-12)


def test_without_attention_and_ways_to_ask_for_tangents():
    primals, tangents = tensors("cpu")
    ours, plain = attention(elsa_attention), attention(elsa_attention_reference)
    want = jvp(plain, primals, tangents)[1]
    torch.testing.assert_close(linearize(ours, *primals)[1](*tangents), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(jacfwd(ours, 2)(*primals), jacfwd(plain, 2)(*primals), rtol=0, atol=1e-12)
    convolution = [lambda v, add, f=f: f(v, None, None, add, **OPTIONS)
                   for f in (elsa_attention, elsa_attention_reference)]
    got, want = (jvp(f, primals[::3], tangents[::3]) for f in convolution)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    got, want = (grad(lambda v: jvp(lambda x: f(v, x, *primals[2:]), primals[1:2], tangents[1:2])[1].square().sum())(
        primals[0]) for f in (ours, plain))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)  # backward through a tangent


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_hadamard(name, which):
    torch.manual_seed(0)
    shapes = (2, 3, 4, 8), (2, 3, 4, 8), (8, 4, 3, 3), (8,)
    with backend(name) as device:
        primals, tangents = (tuple(torch.randn(shape, device=device) for shape in shapes) for _ in range(2))
        ours = lambda *x: hadamard(*x, scale=0.3)
        out, tangent = jvp(lambda *x: ours(*(x[which.index(i)] if i in which else y for i, y in enumerate(primals))),
                           tuple(primals[i] for i in which), tuple(tangents[i] for i in which))
        want = jvp(plain_hadamard, primals, tuple(x * (i in which) for i, x in enumerate(tangents)))
        torch.testing.assert_close((out, tangent), want, rtol=1e-5, atol=1e-5)
        loss = lambda f: lambda *x: f(*x).square().sum()
        torch.testing.assert_close(grad(loss(ours), which)(*primals), grad(loss(plain_hadamard), which)(*primals),
                                   rtol=1e-5, atol=1e-4)
        if name == "triton":  # on the other path it is torch's, which has one
            with pytest.raises(RuntimeError, match="first derivative only"):
                jacfwd(jacfwd(lambda bias: ours(*primals[:3], bias).sum()))(primals[3])


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_of_samples(name):
    """vmap inside and outside of grad, along axes that are not the first."""
    with backend(name) as device:
        (v, logits, mul, add), _ = tensors(device)

        def loss(operator, v, logits, mul, add):
            return attention(operator)(v[None], logits[None], mul, add).square().sum()

        def results(operator):
            one = lambda *sample: loss(operator, *sample)
            logits_last = logits.movedim(0, -1)
            samples = vmap(grad(one, (0, 1, 2, 3)), (0, -1, 0, None))(v, logits_last, mul, add)
            batch = grad(lambda add: vmap(one, (0, -1, 0, None))(v, logits_last, mul, add).sum())(add)
            last = vmap(lambda v: attention(operator)(v, logits, mul, add), -1, -1)(torch.stack([v, v + 1], -1))
            return *samples, batch, last

        torch.testing.assert_close(results(elsa_attention), results(elsa_attention_reference), rtol=0, atol=1e-11)


def test_second_derivatives_and_compiled_tangents_are_refused():
    (v, *rest), _ = tensors("cpu")
    loss = lambda v: attention(elsa_attention)(v, *rest).square().sum()
    tangent = lambda x: jvp(loss, (x,), (x,))[1]
    for second in (grad(lambda v: grad(loss)(v).sum()), lambda v: jvp(tangent, (v,), (v,)),
                   lambda v: jvp(grad(loss), (v,), (v,)), hessian(loss)):
        with pytest.raises(RuntimeError, match="first derivative only"):
            second(v)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="inside torch.compile"):
        torch.compile(tangent, backend="eager", fullgraph=True)(v)


def test_what_forward_mode_keeps_is_freed():
    """Otherwise recomputing activations in the backward pass, or storing them elsewhere, would save no memory."""
    (v, logits, *ghosts), _ = tensors("cpu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda _: None):
        logits = logits.clone()
        out = attention(elsa_attention)(v.requires_grad_(), logits, *ghosts)
    assert logits.data_ptr() in saved and out.requires_grad
    alive = weakref.ref(logits)
    del logits
    assert alive() is None


def test_meta_tensors():
    v, logits, mul, add = (x.to("meta").requires_grad_() for x in tensors("cpu")[0])
    out = elsa_attention(v, logits, mul, add, **OPTIONS)
    out.sum().backward()
    assert out.device.type == "meta" and out.shape == v.shape and add.grad.shape == add.shape
    q, weight = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((2, 3, 4, 8), (8, 4, 3, 3)))
    hadamard(q, q, weight, torch.empty(8, device="meta")).sum().backward()
    assert weight.grad.shape == weight.shape
