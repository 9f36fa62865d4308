"""Give advice on valid values that are rarely meant."""

from collections.abc import Iterator
from typing import Any

from capas.config.schedules import show
from capas.core.params import lookup
from capas.training import steps
from capas.training.optimizers import OPTIMIZERS

PORTABLE_OPTIMIZERS = tuple(name for name, found in OPTIMIZERS.items() if found.is_portable)


def advice(values: dict[str, Any]) -> list[str]:
    """Return a line for each choice that is allowed but rarely meant; the values must be valid."""
    lines = [*_untrained_system(values), *steps.advice(values)]
    if values["hardware"]["device"] != "cpu":
        return lines
    if half := [
        f"{key}={show(value)}"
        for key in ("model.dtype", "trainer.bf16")
        if (value := lookup(values, key)) not in ("float32", False)
    ]:
        lines.append(
            f"{' and '.join(half)} on a CPU, whose kernels for it are many times "
            "slower than those for float32"
        )
    optim = values["trainer"]["optim"]
    if values["hardware"]["instruction_set"] == "portable" and optim not in PORTABLE_OPTIMIZERS:
        lines.append(
            f"trainer.optim={optim} takes square roots from oneMKL, which rounds them differently on "
            "Intel's and on other CPUs: the bytes repeat on this kind of machine alone, whatever "
            f"hardware.instruction_set=portable says. {' and '.join(PORTABLE_OPTIMIZERS)} do not"
        )
    return lines


# Shapes of records without a place for a system prompt of their own.
_WITHOUT_SYSTEM = ("question_answer", "text")


def _untrained_system(values: dict[str, Any]) -> Iterator[str]:
    """Yield a line if questions are asked under a system prompt under which no record is trained."""
    system, dataset = values["generation"]["system"], values["dataset"]
    if system is None:  # the system prompt of a test record is used
        return
    trained = {source["system"] for source in (dataset, *dataset["mix"])}
    if system in trained or any(map(_brings_system, (dataset, *dataset["mix"]))):
        return
    shown = " and ".join("none" if t is None else repr(t) for t in sorted(trained, key=str))
    yield (
        f"generation.system={system!r} is asked with, and no record is trained under it: dataset.system is "
        f"{shown}. Set both to the same text, or generation.system=null, which takes the trained one"
    )


def _brings_system(source: dict[str, Any]) -> bool:
    """Return whether records may contain system prompts of their own, which compose cannot see."""
    if source["path"] == "embedded" or source["shape"] in _WITHOUT_SYSTEM:
        return False
    columns = source["columns"] or {}
    return source["shape"] != "columns" or "system" in columns or "messages" in columns
