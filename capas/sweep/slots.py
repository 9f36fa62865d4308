"""Who computes where: one point on one GPU; where there is none, the cores are divided."""

import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from capas.cores import MAX_THREADS, usable_cores
from capas.errors import CapasError
from capas.locks import BusyError, exclusive

_SECONDS_FOR_ALL = 0.5


@contextmanager
def place(lock: Callable[[str], Path], device: str, num_workers: int) -> Iterator[dict[str, str]]:
    """Environment variables of a point, which has its place for itself in this block.

    `lock` gives the file that stands for a name.

    Raises:
        CapasError: `device` is cuda and no GPU is visible.
    """
    if device == "cuda":
        with one_of(lock, "gpu", visible_gpus()) as gpu:
            yield {"CUDA_VISIBLE_DEVICES": gpu}
    else:
        cores = usable_cores()
        with one_of(lock, "cpu", [str(i) for i in range(max(cores, num_workers))]):
            yield {MAX_THREADS: str(max(1, cores // num_workers))}


@contextmanager
def one_of(lock: Callable[[str], Path], kind: str, names: Sequence[str]) -> Iterator[str]:
    """A place that no other point on this machine has; waits until one is free."""
    host = socket.gethostname()
    with ExitStack() as held:
        for name in itertools.cycle(names):
            try:
                held.enter_context(
                    exclusive(lock(f"{kind}-{host}-{name}"), _SECONDS_FOR_ALL / len(names))
                )
                break
            except BusyError:
                continue
        yield name


def visible_gpus() -> list[str]:
    """Those that CUDA_VISIBLE_DEVICES leaves, or all that the driver reports."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        found = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    elif shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    else:
        found = []
    if not (gpus := [name.strip() for name in found if name.strip()]):
        raise CapasError(
            "hardware.device=cuda, but no GPU is visible here (CUDA_VISIBLE_DEVICES, nvidia-smi)"
        )
    return gpus
