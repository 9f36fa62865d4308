"""Check what values need of the machine: a GPU, CPU instructions, packages of an extra.

The stages also refuse a machine that lacks them, but only once they have started.
"""

import ctypes
from collections.abc import Callable, Collection, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from capas.config.problems import Problem
from capas.core import extras
from capas.core.dag import StageSpec
from capas.core.errors import CapasError
from capas.core.params import lookup
from capas.evaluation.harness import read_tasks
from capas.models import kernels

Values = dict[str, Any]


def lacking(values: Values, reads: Collection[str]) -> list[Problem]:
    """Return a problem for everything that the values need and this machine lacks.

    Args:
        values: valid values of params.yaml.
        reads: dotted keys read by the stages that will run here.
    """
    problems = []
    for key, check in _CHECKS.items():
        if not any(key == read or key.startswith(f"{read}.") for read in reads):
            continue
        value = lookup(values, key)
        try:
            check(value, values)
        except CapasError as error:
            problems.append(Problem(key, str(value), str(error)))
    return problems


def read_by(root: Path, targets: Iterable[str] = (), before: bool = True) -> tuple[str, ...]:
    """Return the dotted keys that the stages `targets` read, all stages by default.

    Args:
        before: include the stages that come before them.
    """
    specs = StageSpec.read_all(root)
    makers = {out: name for name, spec in specs.items() for out in spec.outs}
    waiting, found = [name for name in targets if name in specs] or list(specs), set[str]()
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += [makers[dep] for dep in specs[name].deps if dep in makers and before]
    return tuple(sorted({key for name in found for key in specs[name].keys}))


def num_gpus() -> int:
    """Return how many NVIDIA GPUs CUDA finds here, given CUDA_VISIBLE_DEVICES, without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _check_device(device: str, values: Values) -> None:
    if device != "cuda":
        return
    if not (found := num_gpus()):
        raise CapasError(
            "hardware.device=cuda: this machine has no NVIDIA GPU that CUDA can use. Choose hardware=cpu, "
            "or check `nvidia-smi`"
        )
    if (torch := _installed("torch") or "").endswith("+cpu"):
        raise CapasError(
            f"hardware.device=cuda: torch {torch} is a build without CUDA. Install a CUDA build of "
            "the same version, or choose hardware=cpu"
        )
    hardware = values["hardware"]
    needed = hardware["num_processes"] // hardware["num_machines"]
    if needed > found:
        raise CapasError(
            f"hardware.num_processes={hardware['num_processes']}: each process needs a GPU of its own, "
            f"{needed} on each machine, and this machine has {found}"
        )


def _check_attention(attention: str, values: Values) -> None:
    packages = ("flash_attn", "kernels")  # transformers uses either package
    if attention == "flash_attention_2" and not any(map(_installed, packages)):
        raise CapasError(
            "model.attn_implementation=flash_attention_2 needs the package flash-attn, which is not "
            "installed: pip install flash-attn --no-build-isolation, or model.attn_implementation=sdpa"
        )


def _check_backend(backend: str, values: Values) -> None:
    if backend == "unsloth":
        extras.require("unsloth", "trainer.backend=unsloth")


def _check_liger(uses_liger: bool, values: Values) -> None:
    if uses_liger:
        extras.require("gpu", "trainer.use_liger_kernel=true")


def _check_instructions(instruction_set: str, values: Values) -> None:
    kernels.check_supported(instruction_set)


def _check_harness(tasks: list[str], values: Values) -> None:
    read_tasks(tasks, None, Path())


_CHECKS: dict[str, Callable[[Any, Values], None]] = {
    "hardware.device": _check_device,
    "hardware.instruction_set": _check_instructions,
    "model.attn_implementation": _check_attention,
    "trainer.backend": _check_backend,
    "trainer.use_liger_kernel": _check_liger,
    "evaluation.harness.tasks": _check_harness,
}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
