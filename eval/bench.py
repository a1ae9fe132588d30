"""How fast this machine computes ELSA beside what else could stand there: `python run.py bench`. What is timed: contenders.py."""
import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import re
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from eval import contenders
from eval.contenders import COMPILED, DTYPES, IMAGES, LEVELS, MODELS, SAME, cases, default_batch
from train.config import Parser
from train.run_folder import replace_atomically

SLOW = 10.0  # seconds after which a row is repeated no more


def main(argv):
    args, device, dtype, todo = parse(argv)
    if args.compile_only:
        from kernels import compile
        return compile.main(args.arch, args.dtype or "bfloat16")
    if args.tune:
        return tune(device, dtype)
    report = dict(machine(device), dtype=str(dtype)[6:], repeats=args.repeats, copy_gb_per_s=copy_bandwidth(device),
                  matrix_tflops=matrix_rate(device, dtype), rows=[])
    print(heading(report), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for i, (level, name, shape) in enumerate(todo):
        if i == 0 or level != todo[i - 1][0]:
            print(f"\n{level}\n{line(COLUMNS)}\n{RULE}", flush=True)
        batch_size = args.batch_size or default_batch(name, device)
        for backward in (False, True):
            makers, grad_out = LEVELS[level](shape, batch_size, dtype, device, backward)
            makers = {row: make for row, make in makers.items() if args.compile or row not in COMPILED}
            case = {"level": level, "shape": name, "input": [batch_size, 3, 224, 224] if level == "model" else list(grad_out.shape),
                    "kernel_size": getattr(shape, "kernel_size", None), "pass": "forward+backward" if backward else "forward"}
            for row in measure(makers, grad_out, backward, device, args.repeats):
                ms, moved = row["ms"], row["bytes"] if level == "operator" else None
                speed = moved / ms / 1e6 if ms and moved else None
                rate = batch_size / ms * 1e3 if ms and level == "model" else None
                report["rows"].append({**case, **row, "bytes": moved, "gb_per_s": speed, "images_per_s": rate,
                                       "share_of_copy": speed and speed / report["copy_gb_per_s"]})
                print(line(cells(report["rows"][-1])), flush=True)
            replace_atomically(args.out, lambda file: file.write(json.dumps(report, indent=1).encode()))  # each time: it may be stopped
            replace_atomically(args.out.with_suffix(".md"), lambda file: file.write(markdown(report).encode()))
    replace_atomically(args.out.with_suffix(".png"), lambda file: plot(report, file))
    print(f"written: {args.out}, and beside it .md and .png")


def parse(argv):
    """(arguments, device, dtype, [(level, name, shape)]); raises ValueError for what the user can mend."""
    parser = Parser(prog="run.py bench", description="Time ELSA as operator, layer and model; write JSON, and beside it Markdown and PNG.")
    shapes = [*contenders.SHAPES, *dict.fromkeys(name.split()[0] for name in contenders.SHAPES)]
    parser.add_argument("--level", nargs="+", choices=list(LEVELS), default=None, help="default: all, on a CPU operator and layer")
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=None, metavar="SHAPE",
                        help=f"{', '.join(shapes)}; without a stage: all stages, and the model; default: all, on a CPU swin_t and volo_d1")
    parser.add_argument("--batch-size", type=int, default=None, help="images; default: 128, on a CPU 4, of a detector 2 and 1")
    parser.add_argument("--dtype", choices=list(DTYPES), default=None, help="default: bfloat16, on a CPU float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--repeats", type=int, default=None, help=f"timed calls of a row, none after {SLOW:.0f} s; default: 20, on a CPU 5")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="the rows that need torch.compile, half a minute each; default: on a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="where the JSON goes")
    parser.add_argument("--compile-only", action="store_true", help="compile the kernels for --arch, a GPU that need not be there; time nothing")
    parser.add_argument("--arch", default="sm_90", help="of --compile-only")
    parser.add_argument("--tune", action="store_true", help="let the kernels choose their configurations for all shapes; time nothing")
    args = parser.parse(argv)
    for name, value in (("--batch-size", args.batch_size), ("--repeats", args.repeats)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if args.out.suffix != ".json":
        raise ValueError(f"--out: got {args.out}, expected a name that ends in .json; .md and .png go beside it")
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: got {args.device!r}, expected cpu, or cuda or cuda:N where torch sees that GPU") from error
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32: naive is what others are checked against
    chosen = args.shapes or (list(contenders.SHAPES) if gpu else ["swin_t", "volo_d1"])
    todo = [(level, *case) for level in args.level or (LEVELS if gpu else ("operator", "layer")) for case in cases(level, chosen)]
    if not todo:
        raise ValueError(f"--shapes: got {', '.join(chosen)}, expected some of {', '.join(MODELS)} for --level model")
    args.repeats = args.repeats or (20 if gpu else 5)
    args.compile = gpu if args.compile is None else args.compile
    return args, device, getattr(torch, args.dtype or ("bfloat16" if gpu else "float32")), todo


def tune(device, dtype):
    """Lets the kernels choose anew for every shape of operator and layer, and keeps the choices in kernels/tuned/."""
    from kernels import tuning
    if device.type != "cuda":
        raise ValueError(f"--tune: got device {device}, expected a GPU; on a CPU there is nothing to choose")
    tuning.set_tuned({})
    for level in ("operator", "layer"):
        for name, shape in cases(level, list(contenders.SHAPES)):
            makers, grad_out = LEVELS[level](shape, default_batch(name, device), dtype, device, True)
            makers["ours"]()(grad_out)
    print(f"written: {tuning.ship(device)}")


def measure(makers, grad_out, backward, device, repeats):
    """Yields a dict a row: median, least and most milliseconds, or a note why there are none. Rows take turns, so that noise hits all alike.

    makers: {row: function that makes it}; grad_out: gradient of the result, or what has its size where only the forward pass is timed.
    """
    baseline = next(name for name in makers if name.endswith("naive"))
    gpu, rows, notes, peaks, times, reference = device.type == "cuda", {}, {}, {}, {name: [] for name in makers}, None
    timed = first = checked = grad_out if backward else None
    if backward and grad_out.ndim:  # zero beyond the first images: then the filters' gradients are those of the naive row on these alone
        first, checked = grad_out[:IMAGES], grad_out.clone()
        checked[IMAGES:] = 0
    if any(name in SAME for name in makers):
        with excused(notes, baseline):
            reference = makers[baseline]().on_few()(first)
    for name in [name for name in makers if name not in notes]:
        with excused(notes, name):
            row = makers[name]()
            results = row(checked)
            if name in SAME:
                if reference is None:
                    raise RuntimeError("unchecked, as naive did not run")
                of_images = 1 + backward * len(row.images)
                if not equal([x[:IMAGES] for x in results[:of_images]] + list(results[of_images:]), reference):
                    notes[name] = "wrong"
                    continue
            del results
            if gpu:  # the first call tuned the kernels; now the clocks rise
                row(timed)
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
                row(timed)
                peaks[name] = torch.cuda.max_memory_allocated(device) - before
            rows[name] = row
    flush = torch.empty(2 ** 28, dtype=torch.int8, device=device) if gpu else None  # larger than the cache
    for _ in range(repeats):
        for name, row in rows.items():
            if name not in notes and sum(times[name]) < SLOW * 1e3:
                with excused(notes, name):
                    times[name].append(milliseconds(lambda: row(timed), device, flush))
    torch.compiler.reset()  # it limits how often a function is compiled anew

    median = {name: None if name in notes else statistics.median(times[name]) for name in makers}
    for name, ms in median.items():
        yield {"row": name, "ms": ms, "min": ms and min(times[name]), "max": ms and max(times[name]), "times": len(times[name]) if ms else 0,
               "speedup": median[baseline] / ms if ms and median[baseline] else None, "peak_bytes": peaks.get(name) if ms else None,
               "bytes": rows[name].bytes(grad_out, backward) if ms else None, "note": notes.get(name, "")}


def equal(results, reference):
    """Within 8 roundings of each result's largest entry: 16-bit references round every intermediate."""
    return all((x.float() - y.float()).abs().max() <= max(2 ** 3 * torch.finfo(y.dtype).eps, 1e-4) * y.float().abs().max()
               for x, y in zip(results, reference, strict=True))


@contextlib.contextmanager
def excused(notes, name):
    """What fails in this block costs this row its time, and the others nothing."""
    try:
        yield
    except Exception as error:  # whatever a compiler, an allocator or a driver may raise
        full = isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|not enough memory|can't allocate memory", str(error))
        phrase = re.split(r"\n|\. ", str(error).strip() or type(error).__name__)[0]
        notes[name] = "out of memory" if full else f"failed: {phrase[:70]}"


def milliseconds(call, device, flush=None):
    """Of one call; on a GPU between two events, with a cold cache."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def copy_bandwidth(device):
    """GB/s of copying a large tensor, which moves two bytes a byte."""
    source = torch.zeros(2 ** 30 if device.type == "cuda" else 2 ** 28, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / statistics.median([milliseconds(lambda: target.copy_(source), device) for _ in range(7)][2:]) / 1e6


def matrix_rate(device, dtype):
    """TFLOP/s of the product of two square matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n ** 3 / statistics.median([milliseconds(lambda: a @ b, device) for _ in range(7)][2:]) / 1e9


def machine(device):
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return dict(date=datetime.date.today().isoformat(),
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else names[0] if names else platform.processor(),
                threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version(),
                triton=importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none")


# as wide as their cells
COLUMNS = ("shape           ", "input       ", "k", "pass            ", "row          ", "ms   ", "min-max    ", "GB/s  ", "of copy ", "peak MB",
           "x naive", "images/s", "note")
RULE = "|" + "|".join("-" * (len(column) + 2) for column in COLUMNS) + "|"


def line(cells):
    return "| " + " | ".join(cell.ljust(len(column)) for cell, column in zip(cells, COLUMNS)) + " |"


def cells(row):
    shown = lambda value, unit="": "" if value is None else number(value) + unit
    spread = f"{number(row['min'])}-{number(row['max'])}" if row["ms"] else ""
    share, peak = row["share_of_copy"] and 100 * row["share_of_copy"], row["peak_bytes"] and row["peak_bytes"] / 2 ** 20
    return (row["shape"], "x".join(map(str, row["input"])), shown(row["kernel_size"]), row["pass"], row["row"], shown(row["ms"]), spread,
            shown(row["gb_per_s"]), shown(share, " %"), shown(peak), shown(row["speedup"]), shown(row["images_per_s"]), row["note"])


def number(x):
    """Three digits, or more before the point."""
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def heading(report):
    return (f"bench on {report['device']}, {report['date']}, {report['threads']} threads, torch {report['torch']}, triton {report['triton']}, "
            f"Python {report['python']}; {report['dtype']}; ms is the median of up to {report['repeats']} calls; this device copies "
            f"{number(report['copy_gb_per_s'])} GB/s and multiplies matrices at {number(report['matrix_tflops'])} TFLOP/s")


def markdown(report):
    tables = []
    for level in dict.fromkeys(row["level"] for row in report["rows"]):
        tables += [f"\n## {level}\n", line(COLUMNS), RULE, *(line(cells(row)) for row in report["rows"] if row["level"] == level)]
    return "\n".join([heading(report), *tables, ""])


def plot(report, file):
    """Bars of milliseconds, a line of panels a shape: forward left, forward+backward right."""
    groups = {}
    for row in report["rows"]:
        groups.setdefault(f"{row['level']}, {row['shape']}, {'x'.join(map(str, row['input']))}", {}).setdefault(row["pass"], []).append(row)
    counts = [len(passes["forward"]) for passes in groups.values()]
    times = [row["ms"] for row in report["rows"] if row["ms"]] or [1]
    colors = {**dict.fromkeys(("ours", "elsa", "elsa compiled"), "C1"), **dict.fromkeys(("naive", "unfold", "torch.compile", "elsa naive"), "C0")}
    figure = Figure(figsize=(13, 1.2 + sum(0.25 * n + 0.6 for n in counts)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False, height_ratios=[n + 1 for n in counts])
    for (group, passes), pair in zip(groups.items(), panels):
        for (kind, rows), axes in zip(passes.items(), pair):
            for y, row in enumerate(rows):
                if row["ms"]:
                    axes.barh(y, row["ms"], color=colors.get(row["row"], "0.7"))
                    axes.plot([row["min"], row["max"]], [y, y], "k-", linewidth=1)
                gain = f", {number(row['speedup'])}x" if row["speedup"] else ""
                label = f" {number(row['ms'])} ms{gain}" if row["ms"] else f" {row['note']}"
                axes.text(row["max"] or min(times) / 2, y, label, va="center", fontsize=8)
            axes.set(xscale="log", xlim=(min(times) / 2, max(times) * 20), ylim=(len(rows) - 0.4, -0.6),
                     yticks=range(len(rows)), yticklabels=[row["row"] for row in rows])
            axes.set_title(f"{group}: {kind}", fontsize=9)
            axes.grid(axis="x", alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("ms: median, least to most")
    figure.suptitle(f"{report['device']}, {report['date']}, torch {report['torch']}, {report['dtype']}\n"
                    "orange: ours, blue: the same computed otherwise, grey: something else, for scale; 2x: twice as fast as naive")
    figure.savefig(file, format="png", dpi=80)
