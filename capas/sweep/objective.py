"""Determine whether a lower or a higher objective is better, and warn of a choice that misleads."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from capas.evaluation.names import BALANCED, BUILT_IN, CALIBRATION, LOG_LOSS, MACRO_F1

Direction = Literal["minimize", "maximize"]
AUTO = "auto"
BETTER = {"minimize": "lower", "maximize": "higher"}
TEST_FILE = "tuned"  # reports/metrics/tuned.json holds the scores on the test split
_LOWER = (
    *("loss", "perplexity", "empty_rate", "control_token_rate", "copied_value_rate"),
    *(LOG_LOSS, CALIBRATION),
)
_HIGHER = (*BUILT_IN, BALANCED, MACRO_F1, "accuracy", "stop_rate", "gain", "gain_low", "gain_high")


def natural_direction(objective: str, metrics: Collection[str] = ()) -> Direction | None:
    """Return the direction in which a metric FILE.KEY improves, or None if that is not known.

    Args:
        metrics: names of the evaluation's metrics, with functions of the user's own; higher is better.
    """
    file, _, key = objective.partition(".")
    if file == TEST_FILE and key in metrics:
        return "maximize"
    if _is_or_ends_with(key, _LOWER):
        return "minimize"
    return "maximize" if _is_or_ends_with(key, _HIGHER) else None


def stated_columns(settings: Mapping[str, Any]) -> list[str]:
    """Return the columns that are named; `auto` stands for the headline metric of each trial."""
    return [name for name in settings["columns"] if name != AUTO]


def unknown_direction(objective: str) -> str:
    """Return the sentence that asks for a direction."""
    return (
        f"sweep.objective={objective}: whether lower or higher is better is not known for this metric. Add "
        "sweep.direction=minimize or sweep.direction=maximize"
    )


def contradiction(settings: dict[str, Any], natural: Direction | None) -> str | None:
    """Return a warning if the stated direction puts the worst trial first, or None."""
    stated, objective = settings["direction"], settings["objective"]
    if natural is None or stated in (AUTO, natural):
        return None
    return (
        f"sweep.direction={stated} ranks the worst trial first: {objective} is better when it is "
        f"{BETTER[natural]}. Leave sweep.direction out to rank by the best"
    )


def is_on_test_split(objective: str) -> bool:
    """Return whether the objective is a score on the test split."""
    return objective.partition(".")[0] == TEST_FILE


def test_split_warning(objective: str) -> str:
    """Return what to know before trials are chosen by the test split."""
    return (
        f"sweep.objective={objective} chooses by the test split, so the winner's score will be optimistic. "
        "sweep.objective=train.validation_loss chooses without looking at the test split"
    )


def _is_or_ends_with(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.endswith(f"_{name}") for name in names)
