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


def launch(kernel, problem, configs, run, device):
    """run(**config) with the best of `configs`: the remembered one, a measured one on a GPU, else the first.

    kernel: its name.
    problem: what the timing depends on, a flat dict.
    run: launches the kernel; it may be called often, so it must overwrite its outputs and read nothing that it writes.
    """
    # A stream under capture can be neither synchronised nor timed.
    if device.type != "cuda" or len(configs) == 1 or torch.cuda.is_current_stream_capturing():
        return run(**configs[0])
    key = " | ".join([torch.cuda.get_device_name(device), kernel, _words(problem)])
    table = tuned()
    if table.get(key) not in configs:  # new, or remembered from a version with other candidates
        print(f"tuning {key} ... ", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        table[key] = _measure(kernel, configs, run)
        print(_words(table[key]), f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        try:
            _save(cache_file(), {key: table[key]})
        except OSError as error:  # a read-only home costs a measurement per process, nothing else
            print(f"not written: {cache_file()}: {error}", file=sys.stderr)
    return run(**table[key])


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


def set_tuned(table):
    """Replace what this process knows, with another rank's :func:`tuned` for example."""
    global _table
    _table = dict(table)


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
