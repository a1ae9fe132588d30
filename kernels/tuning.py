"""Choosing a launch configuration: measured once per device and problem, then remembered in memory and on disk.

triton.autotune is not used because it needs a driver even to pick nothing, and because ranks of one job must be able to
share a result. The file is plain JSON under $ELSA_CACHE_DIR (default ~/.cache/elsa); deleting it is harmless.
"""
import json
import os
import tempfile
from pathlib import Path

import torch

_table = None  # "device | kernel | problem" -> configuration


def launch(kernel, problem, configs, run, device):
    """run(**config) with the best of `configs`: the remembered one, a measured one on a GPU, else the first.

    kernel: its name. problem: what the timing depends on, a flat dict. run: launches the kernel; it may be called often,
    so it must overwrite its outputs and read nothing that it writes.
    """
    # A stream under capture can be neither synchronised nor timed.
    if device.type != "cuda" or len(configs) == 1 or torch.cuda.is_current_stream_capturing():
        return run(**configs[0])
    import triton  # here and below, not above: the CPU path works where Triton does not exist

    key = " | ".join([torch.cuda.get_device_name(device), f"triton {triton.__version__}", kernel,
                      " ".join(f"{name}={value}" for name, value in problem.items())])
    table = tuned()
    if table.get(key) not in configs:  # new, or remembered from a version with other candidates
        table[key] = _measure(kernel, configs, run)
        _save(key)
    return run(**table[key])


def tuned():
    """Every configuration known to this process, {"device | kernel | problem": configuration}; JSON-able, to share with other ranks."""
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


def _measure(kernel, configs, run):
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
    try:
        table = json.loads(cache_file().read_text())
        return table if isinstance(table, dict) else {}
    except (OSError, ValueError):  # absent, unreadable or damaged: measure again
        return {}


def _save(key):
    """Add one entry to what other processes have written meanwhile; the file is replaced whole, never half-written."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_read(), key: _table[key]}, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        pass  # a read-only home costs a measurement per process, nothing else
