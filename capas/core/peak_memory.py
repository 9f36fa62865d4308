"""Measure the peak memory of this process, as counted by the operating system."""

import resource
import sys


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    unit = 1024 if sys.platform != "darwin" else 1  # ru_maxrss is KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
