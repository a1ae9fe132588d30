"""Operator timings of this machine against the naive reference: `python run.py bench`."""
import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import elsa_attention, elsa_attention_reference

# (height = width, heads, kernel size, lam): the layers of Swin-T at 224 pixels, and VOLO-D1's, all with heads of 32 channels
LAYERS = {"swin_t stage 1": (56, 3, 7, 0), "swin_t stage 2": (28, 6, 7, 0), "swin_t stage 3": (14, 12, 7, 0),
          "volo_d1 stage 1": (28, 6, 5, 1)}
WIDTH = 32


def unfold(v, logits, ghost_mul, ghost_add, *, kernel_size, lam):
    """What the published code computes on a CPU, step by step: filters for every channel, tap and pixel, and K copies of v."""
    B, H, W, C = v.shape
    K, G = kernel_size ** 2, logits.shape[1] // kernel_size ** 2
    ghost_mul = ghost_mul if lam else torch.ones_like(ghost_add)
    a = logits.view(B, G, 1, K, H * W).softmax(3)
    filters = ghost_mul.view(1, G, C // G, K, 1) * a + ghost_add.view(1, G, C // G, K, 1)
    copies = F.unfold(v.permute(0, 3, 1, 2), kernel_size, padding=kernel_size // 2).view(B, G, C // G, K, H * W)
    return (copies * filters).sum(3).view(B, C, H, W).permute(0, 2, 3, 1)


OPERATORS = {"ours": elsa_attention, "unfold": unfold, "reference": elsa_attention_reference}


def main(argv):
    """Times every layer, prints a table, writes JSON. A result that is wrong gets no time."""
    parser = argparse.ArgumentParser(prog="run.py bench", description=__doc__)
    parser.add_argument("--batch-size", type=int, help="images (4 on a CPU, 128 on a GPU)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS), metavar="LAYER", help=", ".join(LAYERS))
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each operator; the median is shown")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="where the JSON goes")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    batch_size = args.batch_size or (128 if device.type == "cuda" else 4)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    report = dict(machine(device), batch_size=batch_size, dtype=str(dtype)[6:], repeats=args.repeats, rows=[])
    print(", ".join(f"{name} {value}" for name, value in report.items() if name != "rows"))
    print(f"{'layer':16} {'v':>18} {'k':>2} {'pass':>16} " + " ".join(f"{name + ' ms':>12}" for name in OPERATORS)
          + f" {'/ unfold':>9} {'/ reference':>11}")
    for layer in args.layers:
        for backward in (False, True):
            row = measure(layer, batch_size, dtype, device, backward, args.repeats)
            report["rows"].append(row)
            times = [row[f"{name} ms"] for name in OPERATORS]
            gains = [row[f"speed-up over {name}"] for name in ("unfold", "reference")]
            show = lambda value, width, unit: f"{'wrong' if value is None else f'{value:.2f}{unit}':>{width}}"
            print(f"{layer:16} {'x'.join(map(str, row['v'])):>18} {row['kernel_size']:2} {row['pass']:>16} "
                  + " ".join(show(value, 12, "") for value in times) + f" {show(gains[0], 9, 'x')} {show(gains[1], 11, 'x')}", flush=True)
    write(args.out, report)
    print(f"written: {args.out}")


def machine(device):
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return dict(date=datetime.date.today().isoformat(),
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
                threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version(),
                triton=importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none")


def measure(layer, batch_size, dtype, device, backward, repeats):
    """One row of the table: the median of `repeats` runs of every operator, in milliseconds, after one that does not count."""
    size, heads, k, lam = LAYERS[layer]
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=dtype).requires_grad_(backward)
    torch.manual_seed(0)
    C = heads * WIDTH
    tensors = [draw(batch_size, size, size, C), draw(batch_size, heads * k * k, size, size), draw(C, k, k), draw(C, k, k)]
    wanted = [x for x, used in zip(tensors, (True, True, lam, True)) if used]
    grad_out = torch.randn(batch_size, size, size, C, device=device, dtype=dtype)

    def run(operator):
        out = operator(*tensors, kernel_size=k, lam=lam)
        return (out, *torch.autograd.grad(out, wanted, grad_out)) if backward else (out,)

    limit = 2 ** 3 * torch.finfo(dtype).eps  # of each result's largest entry: the 16-bit references round every intermediate
    results = {name: [x.float().cpu() for x in run(operator)] for name, operator in OPERATORS.items()}
    right = all((x - y).abs().max() <= max(limit, 1e-4) * y.abs().max()
                for name in ("ours", "unfold") for x, y in zip(results[name], results["reference"]))
    times = {}
    for name, operator in OPERATORS.items():
        run(operator)
        times[name] = [_milliseconds(lambda: run(operator), device) for _ in range(repeats)]
    medians = {f"{name} ms": statistics.median(values) if right else None for name, values in times.items()}
    gains = {f"speed-up over {name}": medians[f"{name} ms"] / medians["ours ms"] if right else None for name in ("unfold", "reference")}
    return dict(layer=layer, v=[batch_size, size, size, C], heads=heads, kernel_size=k, lam=lam,
                **{"pass": "forward+backward" if backward else "forward"}, **medians, **gains)


def write(path, report):
    """The whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(report, file, indent=1)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _milliseconds(call, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
