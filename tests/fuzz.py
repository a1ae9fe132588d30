"""python -m tests.fuzz --seconds 60: random calls of both operators, each checked element by element.

A call follows from (seed, number) alone: sizes, memory layouts of all tensors and of the output's gradient, which of
them require one, dtypes, autocast, inference mode, now and then torch.compile, extreme values, and mistakes. What is
right is said by limits.py. Printed are how many calls gave what they should, how many were refused by an error of ours
that names the argument, as they should have been, and those that went wrong, with the command that repeats them.
"""
import argparse
import contextlib
import dataclasses
import os
import random
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # Triton decides when the kernels are imported whether it interprets
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("ELSA_CACHE_DIR", "/nonexistent")
    if "interpreter" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"

import torch

import limits
from backends import backend
from kernels import elsa_attention, hadamard
from simulated import simulated

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
BACKENDS = "cpu", "interpreter", "simulated", "cuda"
EXTREMES = ("logits of 1e4", "a logit of inf", "logits of -inf", "all -inf", "all the least", "nan in v", "inf in v",
            "nan in grad_out", "large grad_out")


@dataclasses.dataclass
class Call:
    operator: object
    tensors: dict
    options: dict
    grad_out: torch.Tensor
    wanted: list  # names of tensors whose gradients are asked for
    autocast: torch.dtype | None = None
    extreme: str | None = None
    mistake: str | None = None  # the argument that should be refused
    way: str = "eager"  # or "inference", "compiled"

    def __str__(self):
        describe = lambda x: x if not isinstance(x, torch.Tensor) else f"{tuple(x.shape)} {x.stride()} {x.dtype}"
        given = ", ".join(f"{name}={describe(x)}" for name, x in (*self.tensors.items(), *self.options.items()))
        return (f"{self.operator.__name__}({given}), grad_out={describe(self.grad_out)}, wanted={self.wanted}, "
                f"autocast={self.autocast}, {self.extreme}, mistake={self.mistake}, {self.way}")


class Draw:
    """Random numbers of one call."""

    def __init__(self, seed, number, small):
        self.random, self.small = random.Random(f"{seed}/{number}"), small
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(32))

    def one_of(self, *values):
        return self.random.choice(values)

    def chance(self, probability):
        return self.random.random() < probability

    def tensor(self, *shape, dtype):
        """Normal numbers, in a memory layout of any kind."""
        x = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)
        kind = self.one_of("contiguous", "contiguous", "permuted", "sliced", "stepped", "expanded", "channels last")
        if kind == "permuted":
            order = self.random.sample(range(x.ndim), x.ndim)
            return x.permute(order).contiguous().permute([order.index(n) for n in range(x.ndim)])
        if kind in ("sliced", "stepped"):  # what lies around it is NaN
            step = 2 if kind == "stepped" else 1
            dim = self.random.randrange(x.ndim)
            around = [n * step + 3 if m == dim else n for m, n in enumerate(x.shape)]
            inside = torch.full(around, float("nan"), dtype=dtype).narrow(dim, 2, x.shape[dim] * step)
            inside = inside[(slice(None),) * dim + (slice(None, None, step),)]
            return inside.copy_(x)
        if kind == "expanded":
            dim = self.random.randrange(x.ndim)
            return x.narrow(dim, 0, min(1, x.shape[dim])).expand(x.shape)
        if kind == "channels last" and x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def size(self, most):
        return 0 if self.chance(0.02) else self.random.randint(1, most)

    def subset(self, names):
        return [name for name in names if self.chance(0.7)]


def draw_call(seed, number, small):
    draw = Draw(seed, number, small)
    call = (draw_hadamard if draw.chance(0.3) else draw_aggregation)(draw)
    if draw.chance(0.08):
        plant_mistake(draw, call)
    elif draw.chance(0.1):
        call.way, call.wanted = "inference", []
    elif draw.chance(0.003):
        call.way = "compiled"
    return call


def draw_aggregation(draw):
    one_of = draw.one_of
    side = 5 if draw.small else 8
    k = one_of(1, 3, 3, 3, 5) if draw.small else one_of(1, 3, 3, 3, 5, 5, 7, 9)
    dilation, stride = (1, 1) if draw.chance(0.5) else (one_of(1, 2, 3, 12), one_of(1, 2, 3))
    B, H, W, heads = one_of(1, 1, 2), draw.size(side), draw.size(side + 1), one_of(1, 1, 2, 3)
    B = 0 if draw.chance(0.01) else B
    C, width = heads * one_of(1, 2, 3, 4, 8, 12), one_of(torch.float32, None)
    dtype, mixed = one_of(*DTYPES), draw.chance(0.15)
    autocast = one_of(torch.bfloat16, torch.float16) if mixed else None
    dtype = one_of(torch.float32, torch.float32, torch.float64) if mixed else dtype
    of_logits = autocast if mixed and dtype != torch.float64 and draw.chance(0.5) else dtype
    kinds = one_of(("none", "static"), ("static", "static"), ("static", "none"), ("per sample", "per sample"),
                   ("none", "none"), ("per sample", "static"))
    ghosts = [{"none": None, "static": (C, k, k), "per sample": (B, C, k, k)}[kind] for kind in kinds]
    attention = ghosts[1] is None or draw.chance(0.85)
    tensors = dict(
        v=draw.tensor(B, H, W, C, dtype=dtype),
        logits=draw.tensor(B, heads * k * k, H // stride, W // stride, dtype=of_logits) if attention else None,
        **{name: shape and draw.tensor(*shape, dtype=width or dtype)
           for name, shape in zip(("ghost_mul", "ghost_add"), ghosts)})
    options = dict(kernel_size=k, dilation=dilation, stride=stride, lam=one_of(0, 1, 1, 1, 2),
                   gamma=one_of(0, 1, 1, -0.5) if attention else one_of(1, -0.5), normalize=draw.chance(0.7))
    rounded = autocast if autocast and dtype != torch.float64 else dtype
    call = Call(elsa_attention, tensors, options, draw.tensor(B, H // stride, W // stride, C, dtype=rounded),
                draw.subset([name for name, x in tensors.items() if x is not None]), autocast)
    if draw.chance(0.2) and min(call.grad_out.shape, default=0):
        make_extreme(draw, call, one_of(*EXTREMES))
    return call


def draw_hadamard(draw):
    one_of = draw.one_of
    side, width = 4 if draw.small else 8, one_of(1, 2, 3, 4, 4, 8, 16, 17)
    B, H, W, Q = one_of(1, 1, 2), draw.size(side), draw.size(side), width * one_of(1, 1, 2, 3, 5)
    k, dtype, parameters = one_of(1, 3, 3, 5), one_of(*DTYPES), one_of(torch.float32, None)
    autocast = one_of(torch.bfloat16, torch.float16) if draw.chance(0.15) else None
    dtype = one_of(torch.float32, torch.float32, torch.float64) if autocast else dtype
    q, k_ = (draw.tensor(B, H, W, Q, dtype=dtype) for _ in range(2))
    if draw.chance(0.5):
        q, k_ = draw.tensor(B, H, W, 2 * Q, dtype=dtype).split(Q, -1)
    tensors = dict(q=q, k=k_, weight=draw.tensor(Q, width, k, k, dtype=parameters or dtype),
                   bias=draw.tensor(Q, dtype=parameters or dtype))
    rounded = autocast if autocast and dtype != torch.float64 else dtype
    call = Call(hadamard, tensors, dict(scale=one_of(1.0, 1, 0.3, -2.0), dilation=one_of(1, 1, 2, 3)),
                draw.tensor(B, H, W, Q, dtype=rounded), draw.subset(tensors), autocast)
    return call


def make_extreme(draw, call, extreme):
    call.extreme = extreme
    tensors = {name: x if x is None else x.clone() for name, x in call.tensors.items()}
    call.tensors, v, logits = tensors, tensors["v"], tensors["logits"]
    place = lambda x: tuple(draw.random.randrange(n) for n in x.shape)
    if logits is not None and call.autocast is None or "logit" not in extreme and "all" not in extreme:
        if extreme == "logits of 1e4":
            tensors["logits"] = logits.sign() * 1e4
        elif extreme == "a logit of inf":
            logits[place(logits)] = float("inf")
        elif extreme == "logits of -inf":
            logits[torch.rand(logits.shape, generator=draw.generator) < 0.5] = -float("inf")
        elif extreme == "all -inf":
            b, _, y, x = place(logits)
            logits[b, :, y, x] = -float("inf")
        elif extreme == "all the least":
            logits.fill_(torch.finfo(logits.dtype).min)
        elif extreme.endswith("in v"):
            v[place(v)] = float(extreme[:3])
        elif extreme == "nan in grad_out":
            call.grad_out = call.grad_out.clone()
            call.grad_out[place(call.grad_out)] = float("nan")
        elif extreme == "large grad_out":
            call.grad_out = call.grad_out * 2e4
    if extreme in ("a logit of inf", "logits of 1e4", "logits of -inf", "all -inf", "all the least"):
        call.options["normalize"] = True


def plant_mistake(draw, call):
    tensors, options = call.tensors, call.options
    name = call.mistake = draw.one_of(*(name for name, x in (*tensors.items(), *options.items())
                                        if x is not None and name not in ("normalize", "gamma")))
    x = tensors.get(name)
    if x is None:  # a number
        options[name] = draw.one_of(-1, 0.5, "2", None) if name in ("kernel_size", "dilation", "stride", "lam") else (
            draw.one_of(float("nan"), "2", None))
        return
    others = [torch.int64] if name in ("v", "q") or call.autocast else [torch.int64, *DTYPES]
    wrong = [dtype for dtype in others if dtype not in (tensors["v" if "v" in tensors else "q"].dtype, torch.float32)]
    tensors[name] = draw.one_of(
        lambda: x[None, None], lambda: x[..., None, None], lambda: x.numpy, lambda: x.to("meta"),
        lambda: x.to(draw.one_of(*wrong)), lambda: torch.cat([x, x[:1]]) if x.ndim < 4 else x[None])()
    call.wanted = []


def run(call, device):
    """{"out": ..., "dv": ..., ...} of what is wanted."""
    to = lambda x: x.to(device) if isinstance(x, torch.Tensor) and x.device.type != "meta" else x
    leaves = {name: to(x).detach().requires_grad_(name in call.wanted) if isinstance(x, torch.Tensor) else x
              for name, x in call.tensors.items()}
    operator = call.operator
    if call.way == "compiled":
        torch._dynamo.reset()
        operator = torch.compile(lambda **given: call.operator(**given), fullgraph=True, backend="aot_eager")
    with torch.inference_mode(call.way == "inference"), (
            torch.autocast(device.type, call.autocast) if call.autocast else contextlib.nullcontext()):
        out = operator(**leaves, **call.options)
    wanted = [leaves[name] for name in call.wanted]
    grads = torch.autograd.grad(out, wanted, to(call.grad_out), allow_unused=True) if out.requires_grad else ()
    results = {"out": out.detach()}
    for name, leaf, grad in zip(call.wanted, wanted, grads):
        results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
        assert results[f"d{name}"].dtype == leaf.dtype, f"d{name} of {results[f'd{name}'].dtype}"
    return {name: x.cpu() for name, x in results.items()}


def compare(call, results, backend):
    """Raises AssertionError with the first element that is wrong."""
    lead = call.tensors["v" if call.operator is elsa_attention else "q"]
    rounded = call.autocast if call.autocast and lead.dtype != torch.float64 else lead.dtype
    tensors = {name: x.to(rounded) if name in ("v", "logits", "q", "k") and x is not None else x
               for name, x in call.tensors.items()}
    assert results["out"].dtype == rounded and results["out"].shape == call.grad_out.shape, results["out"].shape
    if 0 in call.grad_out.shape:
        assert not any(x.any() for x in results.values())
        return
    arguments = tensors, call.options, call.grad_out
    accumulator = torch.finfo(torch.promote_types(rounded, torch.float32)).eps
    narrow = torch.finfo(rounded).eps
    if call.operator is elsa_attention:
        exact, strict = limits.aggregation(*arguments), limits.aggregation(*arguments, strict=True)
        sums = 300 * accumulator
        bounds = limits.aggregation_limits(*arguments, exact, lambda name: sums)
    else:
        exact = strict = limits.hadamard(*arguments)
        sums = 300 * accumulator + (4 * narrow if backend != "cpu" else 0)  # the kernels round q * k, weight and u
        bounds = limits.hadamard_limits(*arguments, exact, lambda name: sums)
    for name, got in results.items():
        own = torch.finfo(got.dtype)
        last = max(torch.finfo(rounded).eps if name in ("out", "dv", "dlogits", "dq", "dk") else 0, own.eps)
        smallest = max(own.smallest_normal, torch.finfo(rounded).smallest_normal)
        got, want, other = got.double(), exact[name], strict[name]
        limit = bounds[name] + 2 * last * want.abs() + smallest
        right = (got - want).abs() <= limit
        if call.extreme:  # in the shadow of a NaN roughly, for its magnitude is NaN
            rough = 1e-2 * other[other.isfinite()].abs().sum() + smallest
            right |= ~want.isfinite() & ((got - other).abs() <= rough)
        largest = min(own.max, torch.finfo(rounded).max if name in ("out", "dv", "dlogits", "dq", "dk") else own.max)
        overflows = ~want.isfinite() | (want.abs() + limit >= largest)
        right |= ~got.isfinite() & overflows
        if not right.all():
            first = tuple((~right).nonzero()[0].tolist())
            raise AssertionError(f"{name}{list(first)} is {got[first]:.9g}, should be {want[first]:.9g} within "
                                 f"{limit[first]:.2g}; {int((~right).sum())} of {right.numel()} are wrong")


def attempt(call, device, backend):
    """"equal", "refused", or what is wrong."""
    try:
        results = run(call, device)
        if call.mistake:
            return f"{call.mistake} should have been refused"
        compare(call, results, backend)
        return "equal"
    except (TypeError, ValueError) as error:
        names = [name for name in (*call.tensors, *call.options, "q, k") if str(error).startswith(f"{name}: got ")]
        if call.mistake and names:
            return "refused"
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def calling(name):
    """A context in which calls take this path -> device."""
    if name == "simulated":
        return simulated(90)
    return backend("cpu" if name == "cpu" else "triton")


def fuzz(name, seed, first, calls, seconds=float("inf"), report=print):
    """{"equal": how many, "refused": ..., "wrong": ...}"""
    counts, end = dict(equal=0, refused=0, wrong=0), time.monotonic() + seconds
    for number in range(first, first + calls):
        if time.monotonic() >= end:
            break
        call = draw_call(seed, number, small=name in ("interpreter", "simulated"))
        with calling(name) as device:
            outcome = attempt(call, device if isinstance(device, torch.device) else torch.device("cpu"), name)
        counts[outcome if outcome in counts else "wrong"] += 1
        if outcome not in counts:
            report(f"{outcome}\n  {call}\n  python -m tests.fuzz --backend {name} --seed {seed} --first {number} "
                   "--calls 1")
    return counts


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--calls", type=int, default=10 ** 9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    args = parser.parse_args()
    counts = fuzz(args.backend, args.seed, args.first, args.calls, args.seconds)
    print(f"{args.backend}, seed {args.seed}, calls from {args.first}: "
          + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    sys.exit(counts["wrong"] > 0)


if __name__ == "__main__":
    main()
