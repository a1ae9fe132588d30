"""Problems for the aggregation, drawn at random, and how closely a result must agree with the reference."""
import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kernels import elsa_attention, elsa_attention_reference

FILTERS = (None, "static", "per-sample")


class Case:
    """One problem: tensors by name, keyword arguments, and how to run it."""

    def __init__(self, seed=0, B=1, H=5, W=6, heads=2, width=3, kernel_size=3, dilation=1, stride=1, mul=None,
                 add="static", lam=1, gamma=1, normalize=True, attention=True, dtype=torch.float64,
                 v_layout="contiguous", logits_layout="nchw", device="cpu"):
        C, K = heads * width, kernel_size ** 2
        Ho, Wo = H // stride, W // stride
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        layouts = {
            "contiguous": lambda: draw(B, H, W, C),
            "slice of a projection": lambda: draw(B, H, W, C + 5)[..., 3:3 + C],
            "nchw": lambda: draw(B, C, H, W).permute(0, 2, 3, 1),
        }
        v = layouts[v_layout]()
        logits = draw(B, heads * K, Ho, Wo)
        if logits_layout == "nhwc":
            logits = logits.contiguous(memory_format=torch.channels_last)
        elif logits_layout == "cropped":  # rows do not follow each other: a copy is due
            logits = draw(B, heads * K, Ho + 1, Wo + 2)[:, :, :Ho, :Wo]
        elif logits_layout == "slice of a projection":
            logits = draw(B, Ho, Wo, heads * K + 5)[..., 3:3 + heads * K].permute(0, 3, 1, 2)
        elif logits_layout == "expanded":  # its gradient is not
            logits = draw(B, 1, Ho, Wo).expand(B, heads * K, Ho, Wo)
        filters = {
            None: lambda: None,
            "static": lambda: draw(C, kernel_size, kernel_size),
            "per-sample": lambda: draw(B, C, kernel_size, kernel_size),
        }
        logits = logits if attention else None
        self.tensors = dict(v=v, logits=logits, ghost_mul=filters[mul](), ghost_add=filters[add]())
        self.options = dict(kernel_size=kernel_size, dilation=dilation, stride=stride, lam=lam, gamma=gamma,
                            normalize=normalize)
        self.grad_out = draw(B, Ho, Wo, C)

    def run(self, operator, dtype=None, device=None):
        """{"out": ..., "dv": ..., ...}; gradients of what the operator ignores are absent or zero."""
        cast = lambda x: x.detach().to(dtype=dtype, device=device) if dtype or device else x.detach()  # keeps strides
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
        scales = self.scales()
        accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert got.keys() == expected.keys()
        for name, reference in expected.items():
            assert got[name].shape == reference.shape and got[name].dtype == dtype, name
            if reference.numel() == 0:
                continue
            limit = 2 * torch.finfo(dtype).eps * reference.abs().max() + 4 * accumulator * scales[name]
            error = (got[name].double() - reference).abs().max()
            assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}, {self.options}"  # a NaN fails too

    def scales(self):
        """Of every result the number of products in its sum times the largest of them."""
        largest = lambda x, missing: missing if x is None or not x.numel() else x.double().abs().max().item()
        v, logits, ghost_mul, ghost_add = self.tensors.values()
        lam, gamma = self.options["lam"], abs(self.options["gamma"])
        a = 1 if self.options["normalize"] else largest(logits, 0)
        v, go, ghost_mul = largest(v, 0), largest(self.grad_out, 0), largest(ghost_mul, 1)
        mul, dmul = ghost_mul ** lam, max(1, lam * ghost_mul ** max(0, lam - 1))
        f = a * mul + gamma * largest(ghost_add, 0)
        B, Ho, Wo, C = self.grad_out.shape
        K, pixels = self.options["kernel_size"] ** 2, B * Ho * Wo
        return {"out": K * v * f, "dv": K * go * f, "dlogits": K * C * go * v * mul * a,
                "dghost_mul": pixels * go * v * a * dmul, "dghost_add": pixels * go * v * gamma}


SMALL = ((1, 1), (1, 1), (1, 2), (1, 3), (2, 1))  # samples and heads: a program of its own each


@st.composite
def problems(draw, samples_and_heads=None):
    """Arguments of Case; samples_and_heads: pairs to choose from, all of 1 to 2 and 1 to 3 unless given."""
    one_of = lambda *values: draw(st.sampled_from(values))
    attention = draw(st.integers(0, 9)) > 0
    # Of four pixels, which the Triton kernels compute together for these strides, dilations and dtypes.
    strips = draw(st.booleans())
    B, heads = one_of(*samples_and_heads) if samples_and_heads else (one_of(1, 1, 2), one_of(1, 2, 3))
    few = not samples_and_heads or B * heads == 1
    return dict(
        seed=draw(st.integers(0, 2 ** 16)), B=B, H=draw(st.integers(1, 7)), W=draw(st.integers(1, 9)),
        heads=heads if attention else 1, width=one_of(1, 2, 3, 4, 6),
        kernel_size=one_of(1, 3, 3, 3, 5) if few else one_of(1, 3, 3, 3),
        dilation=1 if strips else one_of(1, 1, 2, 3), stride=1 if strips else one_of(1, 1, 2, 3),
        mul=one_of(*FILTERS) if attention else None,
        add=one_of(*FILTERS) if attention else one_of("static", "per-sample"),
        lam=one_of(0, 1, 1, 2), gamma=one_of(0, 1, 1, -0.5) if attention else 1,
        normalize=draw(st.booleans()), attention=attention,
        dtype=one_of(torch.float32 if strips else torch.float64, torch.float32, torch.float16, torch.bfloat16),
        v_layout=one_of("contiguous", "slice of a projection", "nchw"), logits_layout=one_of("nchw", "nhwc", "cropped"))


def hypothesis_settings(examples):
    return settings(max_examples=examples, deadline=None, derandomize=bool(os.environ.get("CI")),
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
