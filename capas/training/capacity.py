"""Measure the memory that this machine has for a training, and that this process uses."""

from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]

from capas.core import cgroups
from capas.core.params import Params

if TYPE_CHECKING:
    import torch


def free_bytes(device: "torch.device") -> int:
    """Return the bytes that this process can still get: on a GPU, or in the machine and its container or job.

    Swap does not count: a training that swaps never finishes.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return min([psutil.virtual_memory().available, *cgroup_free_bytes()])


def num_sharing(hardware: Params) -> int:
    """Return how many processes of a training share a machine's memory; on a GPU each process is alone."""
    if hardware.device != "cpu":
        return 1
    return int(hardware.num_processes // hardware.num_machines)


def used_bytes(device: "torch.device") -> int:
    """Return the bytes that this process uses now, on the GPU or in the machine."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def device_costs(device: "torch.device") -> dict[str, int]:
    """Return the peak of tensor memory on the GPU for reports/timings; {} for a CPU.

    The peak of the process, which is that of a CPU, is recorded anyway.
    """
    if device.type != "cuda":
        return {}
    import torch

    return {"peak_device_memory_bytes": int(torch.cuda.max_memory_allocated(device))}


def cgroup_free_bytes(root: Path = cgroups.ROOT, own: Path = cgroups.OWN) -> list[int]:
    """Return limit less usage of every control group around the process that has a limit.

    File pages that were not used for long do not count as usage: the kernel reclaims them first.
    """
    found = (_free(group) for group in cgroups.around("memory", root, own))
    return [free for free in found if free is not None]


_NAMES = (  # files of limit and usage, and a key of memory.stat: for cgroup v2, for cgroup v1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _free(group: Path) -> int | None:
    for limit, use, inactive in _NAMES:
        if not (group / limit).exists():
            continue
        text = (group / limit).read_text().strip()
        if text == "max":
            return None
        lines = (group / "memory.stat").read_text().splitlines()
        stat = dict(line.split(maxsplit=1) for line in lines)
        used = int((group / use).read_text()) - int(stat.get(inactive, 0))
        return max(0, int(text) - used)
    return None
