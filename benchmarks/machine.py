"""Where a benchmark ran: it stands beside every result."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe(*packages: str) -> dict[str, Any]:
    """Processor, Python and the versions of `packages`."""
    return {
        "machine": {"cpu": cpu(), "num_cpus": os.cpu_count()},
        "versions": {p: version(p) for p in packages},
        "python": platform.python_version(),
    }


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()
