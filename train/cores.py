"""How many cores this process may use, and how torch's threads wait. Imports no torch: both are settled before it."""
import os
from pathlib import Path


def available(cgroups="/sys/fs/cgroup", membership="/proc/self/cgroup"):
    """Cores that this process may use: of the machine, its affinity and the quota of its control group the least."""
    return max(1, int(min(_allowed(), _quota(Path(cgroups), Path(membership)))))


def settle_threads():
    """Sets environment variables of OpenMP that the user has not set; to be called before torch is imported."""
    cores = available()
    if cores < _allowed():  # OpenMP knows the affinity, not the quota
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    # Threads that wait sleep after a few microseconds: where they spin for longer, they take the cores from those that
    # they wait for as soon as anything else runs; where they never do, an idle machine loses a third of its speed.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _allowed():
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota(cgroups, membership):
    """Cores that the control groups around this process, version 1 or 2, grant; infinite where they set no limit."""
    least = float("inf")
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folders = [cgroups, cgroups / "unified"] if not controllers else [cgroups / controllers, cgroups / "cpu"]
        for folder in folders:
            inside = folder / path.lstrip("/")  # in a container often not to be seen; its own group is the top then
            for group in (inside, *inside.parents):
                if group.is_relative_to(folder):
                    least = min(least, _limit(group))
    return least


def _limit(group):
    """Cores that one control group grants."""
    quota, period = (_read(group / "cpu.max").split() or [_read(group / "cpu.cfs_quota_us"),
                                                          _read(group / "cpu.cfs_period_us")])
    try:
        cores = float(quota) / float(period)
    except ValueError:  # "max", or no such file
        return float("inf")
    return cores if cores > 0 else float("inf")  # -1: none


def _read(path):
    try:
        return path.read_text()
    except OSError:
        return ""
