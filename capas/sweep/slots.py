"""Assign GPUs to the processes of a trial, or divide the cores if there is no GPU."""

import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from capas.core.cores import MAX_THREADS, usable_cores
from capas.core.errors import CapasError
from capas.core.locks import BusyError, exclusive

_SECONDS_FOR_ALL = 0.5


@contextmanager
def place(
    lock: Callable[[str], Path], device: str, num_workers: int, num_processes: int = 1
) -> Iterator[dict[str, str]]:
    """Yield environment variables for a trial, and reserve its GPUs or cores for this block.

    Args:
        lock: returns the lock file for a name.
        device: "cuda", or another value to compute on the CPU.
        num_workers: trials at once on this machine.
        num_processes: processes that train together in a trial.

    Raises:
        CapasError: `device` is cuda and fewer GPUs are visible.
    """
    if device == "cuda":
        with some_of(lock, "gpu", visible_gpus(), num_processes) as gpus:
            yield {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    else:
        cores = usable_cores()
        with some_of(lock, "cpu", [str(i) for i in range(max(cores, num_workers))], 1):
            yield {MAX_THREADS: str(max(1, cores // (num_workers * num_processes)))}


@contextmanager
def some_of(
    lock: Callable[[str], Path], kind: str, names: Sequence[str], number: int
) -> Iterator[list[str]]:
    """Reserve `number` places that no other trial on this machine has, and wait until they are free.

    Raises:
        CapasError: there are fewer places.
    """
    if number > len(names):
        raise CapasError(
            f"hardware.num_processes={number}, so each trial needs as many GPUs; visible here: "
            f"{', '.join(names)}"
        )
    place_of = f"{kind}-{socket.gethostname()}"
    taken: list[str] = []
    with ExitStack() as held:
        with exclusive(lock(place_of)):  # one trial at a time collects its places
            for name in itertools.cycle(names):
                if len(taken) == number:
                    break
                with suppress(BusyError):
                    if name not in taken:
                        held.enter_context(
                            exclusive(lock(f"{place_of}-{name}"), _SECONDS_FOR_ALL / len(names))
                        )
                        taken.append(name)
        yield taken


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES lists, or all that the driver reports.

    Raises:
        CapasError: no GPU is visible.
    """
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
