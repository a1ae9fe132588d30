"""Choosing a launch configuration: measured once per GPU model and problem, then remembered in memory and on disk.

What `python run.py bench --tune` measured is kept beside this file, in tuned/, one file a GPU model, and never measured
again. The rest goes to tuned.json under $ELSA_CACHE_DIR (default ~/.cache/elsa); deleting it is harmless. All are JSON.

triton.autotune is not used because it needs a driver even to pick nothing, and because ranks of one job must be able to
share a result.
"""
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

SHIPPED = Path(__file__).parent / "tuned"
WARP_SIZE = 64 if torch.version.hip else 32

_table = None  # "GPU model | kernel | problem" -> configuration
_measures = True


def launch(kernel, problem, configs, run, device):
    """run(**config) with the best of `configs`: the remembered one, else a measured one.

    Without a GPU the first. Where nothing may be measured, under capture of a CUDA graph or by order of set_tuned, the
    one remembered for the most similar number of pixels, else the first.

    kernel: its name.
    problem: what the timing depends on, a flat dict.
    run: launches the kernel; it may be called often, so it must overwrite its outputs and read nothing that it writes.
    """
    if device.type != "cuda" or len(configs) == 1:
        return run(**configs[0])
    name, table = torch.cuda.get_device_name(device), tuned()
    key = _key(name, kernel, problem)
    if table.get(key) in configs:  # neither new, nor remembered from a version with other candidates
        return run(**table[key])
    # A stream under capture can be neither synchronised nor timed.
    if not _measures or torch.cuda.is_current_stream_capturing():
        return run(**_most_similar(name, kernel, problem, configs))
    print(f"tuning {key} ... ", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    table[key] = _measure(kernel, configs, run)
    print(_words(table[key]), f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    try:
        _save(cache_file(), {key: table[key]})
    except OSError as error:  # a read-only home costs a measurement per process, nothing else
        print(f"not written: {cache_file()}: {error}", file=sys.stderr)
    return run(**table[key])


def _key(name, kernel, problem):
    return " | ".join([name, kernel, _words(problem)])


def _most_similar(name, kernel, problem, configs):
    """Images twice or half as large, and so on, until one is known. All ranks of a job choose the same."""
    pixels, table = problem.get("pixels", 1), tuned()
    for factor in (2 ** n for n in range(1, 32)):
        for other in (pixels // factor, pixels * factor):
            config = table.get(_key(name, kernel, {**problem, "pixels": other}))
            if config in configs:
                return config
    return configs[0]


def for_sums_over_pixels(configs):
    """The first alone under torch.use_deterministic_algorithms: the order of such a sum depends on the tile."""
    return configs[:1] if torch.are_deterministic_algorithms_enabled() else configs


def registers(limit):
    """A limit of registers a thread, as an option of a launch.

    Left to itself, None, the compiler spills a few bytes in some kernels for the sake of occupancy. AMD's has no such
    option.
    """
    return dict(maxnreg=limit) if limit and WARP_SIZE == 32 else {}


def tuned():
    """Every configuration known to this process, {"GPU model | kernel | problem": configuration}.

    It can be written as JSON, to share with other ranks.
    """
    global _table
    if _table is None:
        _table = _read()
    return _table


def set_tuned(table, measure=True):
    """Replace what this process knows, with another rank's :func:`tuned` for example.

    measure: False: measure nothing from now on. A rank that measured in the middle of a step, for images of a size that
    the others do not have, would let them wait.
    """
    global _table, _measures
    _table, _measures = dict(table), measure


def cache_file():
    return Path(os.environ.get("ELSA_CACHE_DIR") or Path.home() / ".cache" / "elsa") / "tuned.json"


def ship(device):
    """Writes what this process knows of the device to tuned/, into what is there -> the file."""
    name = torch.cuda.get_device_name(device)
    path = SHIPPED / f"{name.replace(' ', '-')}.json"
    _save(path, {key: config for key, config in tuned().items() if key.startswith(f"{name} | ")})
    return path


def _words(entries):
    return " ".join(f"{name}={value}" for name, value in entries.items())


def _measure(kernel, configs, run):
    # Not at the top: the CPU path works where Triton does not exist.
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    times = []
    for config in configs:
        try:
            times.append(do_bench(lambda: run(**config), warmup=5, rep=20, return_mode="median"))
        except (OutOfResources, PTXASError):
            times.append(float("inf"))
    best = min(range(len(configs)), key=times.__getitem__)
    if times[best] == float("inf"):
        raise RuntimeError(f"{kernel}: none of {configs} fits this device; please report the device and the shapes")
    return configs[best]


def _read():
    """What is shipped, then what this user's processes have measured."""
    table = {}
    for path in (*sorted(SHIPPED.glob("*.json")), cache_file()):
        table |= _load(path)
    return table


def _load(path):
    try:
        table = json.loads(path.read_text())
        return table if isinstance(table, dict) else {}
    except (OSError, ValueError):  # absent, unreadable or damaged: measure again
        return {}


def _save(path, entries):
    """Add to what other processes have written meanwhile; the file is replaced whole, never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {**_load(path), **entries}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write("{\n" + lines + "\n}\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
