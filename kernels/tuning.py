"""Choosing a launch configuration: measured once per GPU model and problem, then remembered in memory and on disk.

What `python run.py bench --tune` measured is kept beside this file, in tuned/, one file a GPU model, and never measured
again. The rest goes to tuned.json under $ELSA_CACHE_DIR (default ~/.cache/elsa); deleting it is harmless. All are JSON:
"GPU model | versions | kernel and hash of its source | problem | its size" -> configuration. A choice for other
versions of torch or Triton, or for a kernel that has changed since, is not found, so nothing stale is used.

triton.autotune(cache_results=True), as it is in 3.6 to 3.8, keeps its timings under the same versions and source. But
its keys are a kernel's arguments as they are, so that every size of image would be a new one; it measures whenever it
meets a new one, in a step, where the other ranks wait, as in the capture of a CUDA graph, which that breaks; it takes
no choice from another rank or a release, nor the most similar problem's; and it needs a driver even to interpret.
"""
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

SHIPPED = Path(__file__).parent / "tuned"
WARP_SIZE = 64 if torch.version.hip else 32
SIZES = ("batch", "pixels")  # of a problem: those in which one may stand in for another

_table = None  # key -> configuration
_stand_ins = {}  # likewise, of problems that could not be measured
_measures = True


def launch(kernel, problem, configs, run, device):
    """run(**config) with the best of `configs`: the remembered one, else a measured one.

    Without a GPU the first. Where nothing may be measured, under capture of a CUDA graph or by order of set_tuned, the
    one remembered for the most similar size, else the first.

    kernel: what `run` launches, a function decorated by triton.jit.
    problem: what the timing depends on, a flat dict; those of SIZES rounded to powers of two.
    run: launches the kernel; it may be called often, so it must overwrite its outputs and read nothing that it writes.
    """
    if device.type != "cuda" or len(configs) == 1:
        return run(**configs[0])
    table, key = tuned(), _key(torch.cuda.get_device_name(device), kernel, tuple(problem.items()))
    if table.get(key) in configs:  # neither new, nor remembered from a version with other candidates
        return run(**table[key])
    # A stream under capture can be neither synchronised nor timed.
    if not _measures or torch.cuda.is_current_stream_capturing():
        if key not in _stand_ins:
            _stand_ins[key] = _most_similar(key, configs)
        return run(**_stand_ins[key])
    print(f"tuning {key} ... ", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    table[key] = _measure(kernel.__name__, configs, run)
    _stand_ins.clear()
    print(_words(table[key]), f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    try:
        _save(cache_file(), _load(cache_file()) | {key: table[key]})  # other processes have written meanwhile
    except OSError as error:  # a read-only home costs a measurement per process, nothing else
        print(f"not written: {cache_file()}: {error}", file=sys.stderr)
    return run(**table[key])


@functools.cache  # it is asked for at every launch
def _key(name, kernel, problem):
    sizes, rest = {}, {}
    for entry, value in problem:
        (sizes if entry in SIZES else rest)[entry] = value
    source = f"{kernel.__name__} {_source_hash(kernel)}"
    return " | ".join([name, _versions(), source, _words(rest), _words(sizes)])


def _versions():
    import triton  # not at the top: the CPU path works where Triton does not exist
    return f"torch {torch.__version__} triton {triton.__version__}"


def _source_hash(kernel):
    """Of the text of a kernel and of all that it calls or reads of its modules, wherever in a file they stand."""
    texts, waiting = {}, [kernel]
    while waiting:
        function = waiting.pop()
        texts[function.__name__] = inspect.getsource(function.fn)
        for name in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(name)
            value = getattr(value, "value", value)  # of a tl.constexpr
            if hasattr(value, "fn") and name not in texts:
                waiting.append(value)
            elif isinstance(value, (int, float, str)):
                texts[name] = repr(value)
    return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:8]


def _most_similar(key, configs):
    """What is remembered for the size that is nearest, counted in doublings, of the same problem.

    All ranks of a job choose the same.
    """
    family, size = _apart(key)
    near = []
    for other, config in tuned().items():
        if config in configs and _apart(other)[0] == family:
            other_size = _apart(other)[1]
            near.append((sum(abs(math.log2(a / b)) for a, b in zip(size, other_size)), other_size, config))
    return min(near, key=lambda entry: entry[:2])[2] if near else configs[0]


def _apart(key):
    """All but the size, and the numbers of that."""
    family, _, size = key.rpartition(" | ")
    return family, [int(number) for number in re.findall(r"=(\d+)", size)]


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
    """Every configuration known to this process, {"GPU model | ... | size of the problem": configuration}.

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
    _stand_ins.clear()


def cache_file():
    return Path(os.environ.get("ELSA_CACHE_DIR") or Path.home() / ".cache" / "elsa") / "tuned.json"


def ship(device):
    """Writes what this process knows of the device to tuned/, into what is there.

    Returns:
        (the file, how many choices for kernels that have changed since were taken out of it)
    """
    name = torch.cuda.get_device_name(device)
    path = SHIPPED / f"{name.replace(' ', '-')}.json"
    ours = {key: config for key, config in tuned().items() if key.startswith(f"{name} | ")}
    current = dict(_kernel(key) for key in ours)
    before = _load(path)
    kept = {key: config for key, config in before.items() if current.get(_kernel(key)[0]) in (None, _kernel(key)[1])}
    _save(path, kept | ours)
    return path, len(before) - len(kept)


def _kernel(key):
    """(name, hash of the source)"""
    return tuple(key.split(" | ")[2].split())


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


def _save(path, table):
    """The file is replaced whole, never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write("{\n" + lines + "\n}\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
