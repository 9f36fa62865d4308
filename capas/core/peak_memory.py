"""The peak memory of this process, as the operating system counted it."""

import resource
import sys


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    unit = 1024 if sys.platform != "darwin" else 1  # ru_maxrss: KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
