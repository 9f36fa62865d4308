"""Count the threads or processes that may compute on this machine."""

import math
import os
from pathlib import Path

from capas.core import cgroups
from capas.core.errors import CapasError

MAX_THREADS = "CAPAS_MAX_THREADS"  # a sweep divides the cores among the trials that run at once
TOPOLOGY = Path("/sys/devices/system/cpu")
_UNLIMITED = 2.0**16  # CPUs


def usable_cores() -> int:
    """Return how many CPUs the process may use; in a container or a job these can be fewer than exist."""
    return at_most(max(1, min(len(_allowed()), quota())))


def physical_cores(topology: Path = TOPOLOGY) -> int:
    """Return how many physical cores the process may use.

    Two threads of one core share its floating-point units, so a second one makes matrix products no faster.
    """
    siblings = (topology / f"cpu{cpu}/topology/thread_siblings_list" for cpu in _allowed())
    cores = {file.read_text() if file.exists() else str(file) for file in siblings}
    return min(len(cores), usable_cores())


def quota(root: Path = cgroups.ROOT, own: Path = cgroups.OWN) -> int:
    """Return how many CPUs the control groups grant (`docker run --cpus 2`), rounded up."""
    granted = [_granted(group) for group in cgroups.around("cpu", root, own)]
    return math.ceil(min(granted, default=_UNLIMITED))


def at_most(num_threads: int) -> int:
    """Return `num_threads`, or CAPAS_MAX_THREADS if that is lower. No result depends on it.

    Raises:
        CapasError: CAPAS_MAX_THREADS is not a whole number from 1 on.
    """
    text = os.environ.get(MAX_THREADS, str(num_threads))
    if not text.isdecimal() or int(text) < 1:
        raise CapasError(f"{MAX_THREADS}={text}: expected a whole number, at least 1")
    return min(num_threads, int(text))


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # macOS


def _granted(group: Path) -> float:
    """Return the CPUs of a group, its quota divided by its period, or a very large number if unlimited."""
    if (group / "cpu.max").exists():  # version 2
        limit, period = (group / "cpu.max").read_text().split()
    elif (group / "cpu.cfs_quota_us").exists():
        limit, period = (
            (group / f"cpu.cfs_{n}_us").read_text().strip() for n in ("quota", "period")
        )
    else:
        return _UNLIMITED
    return _UNLIMITED if limit in ("max", "-1") else int(limit) / int(period)
