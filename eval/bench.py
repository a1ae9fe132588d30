"""How fast this machine computes ELSA beside what else could stand there: `python run.py bench`.

What is timed: providers.py. What is printed and written: bench_report.py. Without a GPU: bench_compiled.py.
"""
import argparse
import contextlib
import datetime
import importlib.metadata
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch

from eval import bench_input, bench_report, printed_as_json, providers
from eval.providers import CHECKED, CHECKED_IMAGES, COMPILED, DTYPES, LEVELS, MODELS, cases, default_batch_size
from kernels import backend, tuning
from train.command_line import Parser
from train.progress import Remaining

MAX_RUN_TIME = 10.0  # seconds after which a row is repeated no more


# Command line

def main(argv):
    args, device, dtype, benchmarks = parse(argv)
    if args.json:
        return printed_as_json(lambda: time_all(args, device, dtype, benchmarks))
    if args.compile_only:
        if not backend.HAS_TRITON:
            raise ValueError("--compile-only: triton, which compiles the kernels, is not installed; there are packages "
                             "for Linux: `pip install triton`")
        from eval import bench_compiled  # not above: it needs Triton
        return bench_compiled.main(args.arch, args.dtype or "bfloat16")
    if args.tune:
        return tune(device, dtype)
    if args.level == ["input"]:
        return bench_input.main(args, device, environment(device))
    time_all(args, device, dtype, benchmarks)
    return None


def time_all(args, device, dtype, benchmarks):
    """Measures, prints and writes what main() was asked for -> the report, a dict."""
    bench_report.check_out(args.out)
    print(f"bench {', '.join(dict.fromkeys(level for level, *_ in benchmarks))} of "
          f"{', '.join(dict.fromkeys(name for _, name, _ in benchmarks))} on {device}, made-up numbers in "
          f"{str(dtype).removeprefix('torch.')}, to {args.out}, .md and .png", flush=True)
    report = {
        **environment(device),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": args.repeats,
        "copy_gb_per_s": copy_bandwidth(device),
        "matrix_tflops": matmul_rate(device, dtype),
        "rows": [],
    }
    print(bench_report.heading(report), flush=True)
    last_level, remaining = None, Remaining(2 * len(benchmarks), unit=None)
    for number, (level, name, shape) in enumerate(benchmarks):
        if level != last_level:
            print(f"\n{level}\n{bench_report.line(bench_report.COLUMNS)}\n{bench_report.RULE}", flush=True)
            last_level = level
        for backward in (False, True):
            for row in run(level, name, shape, backward, args, dtype, device, report["copy_gb_per_s"]):
                report["rows"].append(row)
                print(bench_report.line(bench_report.cells(row)), flush=True)
            bench_report.write(report, args.out)  # each time: it may be stopped
            done = 2 * number + 1 + backward
            if left := remaining.after(done):
                print(f"{done} of {2 * len(benchmarks)} measured,{left}", file=sys.stderr, flush=True)
    bench_report.write_plot(report, args.out)
    print(f"written: {args.out}, and beside it .md and .png")
    return report


def argument_parser():
    shapes = [*providers.SHAPES, *dict.fromkeys(name.split()[0] for name in providers.SHAPES)]
    description = "Time ELSA as operator, layer and model; write JSON, and beside it Markdown and PNG."
    parser = Parser(prog="run.py bench", description=description)
    add = parser.add_argument
    add("--level", nargs="+", choices=[*LEVELS, "input"], default=None,
        help="default: operator, layer and model, on a CPU the first two; input: what loads and augments photographs")
    add("--data", default=None, help="of --level input: as for `run.py train`")
    add("--images-per-s", nargs="+", type=float, default=[1000, 2000, 4000], metavar="N",
        help="of --level input: what a GPU takes, for which the cores are counted")
    add("--shapes", nargs="+", choices=shapes, default=None, metavar="SHAPE",
        help=f"{', '.join(shapes)}; without a stage: all stages, and the model; "
             "default: all, on a CPU swin_t and volo_d1")
    add("--batch-size", type=int, default=None, help="images; default: 128, on a CPU 4, of a detector 2 and 1")
    add("--dtype", choices=list(DTYPES), default=None, help="default: bfloat16, on a CPU float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--repeats", type=int, default=None,
        help=f"timed calls of a row, none after {MAX_RUN_TIME:.0f} s; default: 20, on a CPU 5")
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="the rows that need torch.compile, half a minute each; default: on a GPU")
    add("--out", type=Path, default=Path("runs/bench.json"), help="where the JSON goes")
    add("--json", action="store_true", help="the report on stdout, too, one JSON object, and all else on stderr")
    add("--compile-only", action="store_true",
        help="compile the kernels for --arch, a GPU that need not be there; time nothing")
    add("--arch", default="sm_90", help="of --compile-only")
    add("--tune", action="store_true",
        help="let the kernels choose their configurations for all shapes; time nothing")
    return parser


def parse(argv):
    """(arguments, device, dtype, [(level, name, shape)]); raises ValueError for what the user can mend."""
    args = argument_parser().parse(argv)
    for name, value in (("--batch-size", args.batch_size), ("--repeats", args.repeats)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if args.out.suffix != ".json":
        raise ValueError(f"--out: got {args.out}, expected a name that ends in .json; .md and .png go beside it")
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: got {args.device!r}, expected cpu, "
                         "or cuda or cuda:N where torch sees that GPU") from error
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32: naive is what others are checked against
    of_input = "input" in (args.level or ())
    if args.json and (args.compile_only or args.tune or of_input):
        raise ValueError("--json is for the times of kernels, layers and models; --compile-only, --tune and "
                         "--level input print none")
    if of_input:
        if len(args.level) > 1:
            raise ValueError(f"--level: got {' '.join(args.level)}; input is measured by itself")
        return args, device, None, []
    levels = args.level or (list(LEVELS) if gpu else ["operator", "layer"])
    shapes = args.shapes or (list(providers.SHAPES) if gpu else ["swin_t", "volo_d1"])
    benchmarks = [(level, *case) for level in levels for case in cases(level, shapes)]
    if not benchmarks:
        raise ValueError(f"--shapes: got {', '.join(shapes)}, expected some of {', '.join(MODELS)} for --level model")
    args.repeats = args.repeats or (20 if gpu else 5)
    args.compile = gpu if args.compile is None else args.compile
    return args, device, getattr(torch, args.dtype or ("bfloat16" if gpu else "float32")), benchmarks


def tune(device, dtype):
    """Lets the kernels choose anew for every shape of operator and layer, and keeps the choices in kernels/tuned/."""
    if device.type != "cuda":
        raise ValueError(f"--tune: got device {device}, expected a GPU; on a CPU there is nothing to choose")
    tuning.set_tuned({})
    for level in ("operator", "layer"):
        for name, shape in cases(level, list(providers.SHAPES)):
            builders, grad_out = LEVELS[level](shape, default_batch_size(name, device), dtype, device, backward=True)
            builders["ours"]()(grad_out)
    path, outdated = tuning.ship(device)
    print(f"written: {path}; taken out: {outdated} choices for kernels that have changed since")


# Measuring

def run(level, name, shape, backward, args, dtype, device, copy_gb_per_s):
    """Yields the rows of one shape and pass, as they stand in the JSON."""
    batch_size = args.batch_size or default_batch_size(name, device)
    builders, grad_out = LEVELS[level](shape, batch_size, dtype, device, backward)
    builders = {row: build for row, build in builders.items() if args.compile or row not in COMPILED}
    case = {
        "level": level,
        "shape": name,
        "input": [batch_size, 3, 224, 224] if level == "model" else list(grad_out.shape),
        "kernel_size": getattr(shape, "kernel_size", None),
        "pass": "forward+backward" if backward else "forward",
    }
    for measured in measure(builders, grad_out, backward, device, args.repeats):
        ms = measured["ms"]
        moved = measured["bytes"] if level == "operator" else None
        gb_per_s = moved / ms / 1e6 if ms and moved else None
        yield {
            **case,
            **measured,
            "bytes": moved,
            "gb_per_s": gb_per_s,
            "images_per_s": batch_size / ms * 1e3 if ms and level == "model" else None,
            "share_of_copy": gb_per_s and gb_per_s / copy_gb_per_s,
        }


def measure(builders, grad_out, backward, device, repeats):
    """Yields a dict a row: median, least and most milliseconds, or a note why there are none.

    builders: {row: function that builds its provider}; the one whose name ends in "naive" is the baseline of speed-ups.
    grad_out: gradient of the result, or what has its size where only the forward pass is timed.
    """
    gpu = device.type == "cuda"
    baseline = next(name for name in builders if name.endswith("naive"))
    ready, notes, peak_bytes = {}, {}, {}
    timed_grad = grad_out if backward else None
    reference = None
    if any(name in CHECKED for name in builders):
        with noted_failure(notes, baseline):
            first_grad = grad_out[:CHECKED_IMAGES] if backward else None
            reference = builders[baseline]().on_checked_images()(first_grad)
    for name, build in builders.items():
        if name in notes:
            continue
        with noted_failure(notes, name):
            provider = build()
            if name not in CHECKED:
                provider(timed_grad)
            elif not correct(provider, timed_grad, reference):
                notes[name] = "wrong"
                continue
            if gpu:
                provider(timed_grad)  # the first call tuned the kernels; now the clocks rise
                peak_bytes[name] = peak_memory(lambda: provider(timed_grad), device)
            ready[name] = provider

    times = {name: [] for name in builders}
    cache = torch.empty(2 ** 28, dtype=torch.int8, device=device) if gpu else None  # larger than the device's own
    for _ in range(repeats):
        for name, provider in ready.items():  # rows take turns, so that noise hits all alike
            if name not in notes and sum(times[name]) < MAX_RUN_TIME * 1e3:
                with noted_failure(notes, name):
                    times[name].append(time_ms(lambda: provider(timed_grad), device, cache))
    torch.compiler.reset()  # it limits how often a function is compiled anew

    medians = {name: statistics.median(times[name]) for name in builders if name not in notes}
    for name in builders:
        ms = medians.get(name)
        yield {
            "row": name,
            "ms": ms,
            "min": ms and min(times[name]),
            "max": ms and max(times[name]),
            "times": len(times[name]) if ms else 0,
            "speedup": medians[baseline] / ms if ms and baseline in medians else None,
            "peak_bytes": peak_bytes.get(name) if ms else None,
            "bytes": ready[name].bytes(grad_out, backward) if ms else None,
            "note": notes.get(name, ""),
        }


def correct(provider, grad_out, reference):
    """Whether out and gradients equal the reference's, which has the first CHECKED_IMAGES alone.

    grad_out is set to zero beyond those: then the gradients of the parameters are of those images too.
    """
    per_image = 1
    if grad_out is not None:
        grad_out = grad_out.clone()
        grad_out[CHECKED_IMAGES:] = 0
        per_image += len(provider.images)
    results = provider(grad_out)
    if reference is None:
        raise RuntimeError("unchecked, as naive did not run")
    return allclose([x[:CHECKED_IMAGES] for x in results[:per_image]] + list(results[per_image:]), reference)


def allclose(results, reference):
    """Within 8 roundings of each result's largest entry: 16-bit references round every intermediate."""
    def close(x, y):
        tolerance = max(8 * torch.finfo(y.dtype).eps, 1e-4)
        return (x.float() - y.float()).abs().max() <= tolerance * y.float().abs().max()

    return all(close(x, y) for x, y in zip(results, reference, strict=True))


@contextlib.contextmanager
def noted_failure(notes, name):
    """What fails in this block costs this row its time, and the others nothing."""
    try:
        yield
    except Exception as error:  # whatever a compiler, an allocator or a driver may raise
        full = re.search("out of memory|not enough memory|can't allocate memory", str(error))
        if full or isinstance(error, torch.OutOfMemoryError):
            notes[name] = "out of memory"
        else:
            phrase = re.split(r"\n|\. ", str(error).strip() or type(error).__name__)[0]
            notes[name] = f"failed: {phrase[:70]}"


def time_ms(call, device, cache=None):
    """Milliseconds of one call; on a GPU between two events, after writing to `cache` pushed out what is cached."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if cache is not None:
        cache.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def peak_memory(call, device):
    """Bytes that one call needs beyond what is allocated already."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


# The machine

def environment(device):
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cpu = names[0] if names else platform.processor()
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": importlib.metadata.version("triton") if backend.HAS_TRITON else "none",
    }


def copy_bandwidth(device):
    """GB/s of copying a large tensor, which moves two bytes a byte."""
    source = torch.zeros(2 ** 30 if device.type == "cuda" else 2 ** 28, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / warm_median_ms(lambda: target.copy_(source), device) / 1e6


def matmul_rate(device, dtype):
    """TFLOP/s of the product of two square matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n ** 3 / warm_median_ms(lambda: a @ b, device) / 1e9


def warm_median_ms(call, device):
    return statistics.median([time_ms(call, device) for _ in range(7)][2:])
