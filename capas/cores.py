"""How many threads or processes may compute here."""

import os

MAX_THREADS = "CAPAS_MAX_THREADS"  # a sweep divides the cores among the points that run at once


def usable_cores() -> int:
    """Those that the process may use: fewer than the machine has in a container or in a job of a cluster."""
    if hasattr(os, "sched_getaffinity"):
        return at_most(len(os.sched_getaffinity(0)))
    return at_most(os.cpu_count() or 1)  # macOS


def physical_cores() -> int:
    """Return how many cores compute apart from each other, of those that the process may use.

    Two threads of one core share its units for floats: a second one makes products no faster.
    """
    import psutil  # type: ignore[import-untyped]

    return min(psutil.cpu_count(logical=False) or usable_cores(), usable_cores())


def at_most(num_threads: int) -> int:
    """`num_threads`, or fewer where the variable CAPAS_MAX_THREADS says so. No result depends on it."""
    return min(num_threads, int(os.environ.get(MAX_THREADS, num_threads)))
