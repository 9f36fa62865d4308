"""Explain in words what a sweep over the learning rate shows: too low, right, too high."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from capas.report.findings import read_csv
from capas.sweep.plan import Plan
from capas.sweep.ranking import Row
from capas.sweep.wording import LANGUAGES, say

_CLOSE = 0.1  # as a fraction of the best value
RATE, HISTORY = "trainer.learning_rate", "reports/history.csv"


def lesson(rows: Sequence[Row], settings: Mapping[str, Any], plan: Plan) -> dict[str, list[str]]:
    """Return, by language, a sentence for each learning rate, lowest first; none if other values vary too."""
    rates = rates_of(rows)
    if not rates:
        return {code: [] for code in LANGUAGES}
    curves = {rate: curve(row, plan) for rate, row in rates.items()}
    facts = [
        {
            "kind": _kind(rate, rates, curves),
            "rate": rate,
            "row": row,
            "close": _CLOSE,
            **curves[rate],
        }
        for rate, row in sorted(rates.items())
    ]
    return {code: _sentences(code, facts, settings["objective"]) for code in LANGUAGES}


def rates_of(rows: Sequence[Row]) -> dict[float, Row]:
    """Return the rows by their learning rates, the best first; none if other values vary too."""
    common = set.intersection(*(set(row.overrides) for row in rows)) if rows else set[str]()
    rates = {rate: row for row in rows if (rate := _rate(row, common)) is not None}
    return rates if 1 < len(rates) == len(rows) else {}


def histories(rows: Sequence[Row], plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Return the logged steps of each learning rate as given, lowest first, where DVC's cache has them."""
    found = {row.value(RATE): history(row.name, plan) for _, row in sorted(rates_of(rows).items())}
    return {rate: steps for rate, steps in found.items() if steps}


def _kind(
    rate: float, rates: Mapping[float, Row], curves: Mapping[float, Mapping[str, Any]]
) -> str:
    """Return what the numbers show about a rate; `rates` has the best one first."""
    (best, first), *others = rates.items()
    row, losses, best_losses = rates[rate], curves[rate], curves[best]
    if row.tied:
        return "tied"
    if rate == best:
        return "first" if any(_is_close(other, first) for _, other in others) else "right"
    if _is_close(row, first):
        return "close"
    if None in (losses["last"], best_losses["last"]):
        return "worse"
    if rate > best and _was_destroyed(losses):
        return "high"
    return "low" if rate < best and losses["last"] > best_losses["last"] else "worse"


def _is_close(row: Row, first: Row) -> bool:
    """Return whether two rates are too close to tell apart with one trial each."""
    return len(row.states) == 1 and abs(row.mean - first.mean) <= _CLOSE * abs(first.mean)


def _was_destroyed(losses: Mapping[str, Any]) -> bool:
    """Return whether the loss rose: it ended no lower than it began, or peaked well above its beginning."""
    return bool(
        losses["last"] >= losses["first"] or losses["highest"] > (1 + _CLOSE) * losses["first"]
    )


def _sentences(code: str, facts: Sequence[Mapping[str, Any]], objective: str) -> list[str]:
    return [
        say(code, f"learning_rate.{fact['kind']}", objective=objective, **fact) for fact in facts
    ]


def _rate(row: Row, common: Collection[str]) -> float | None:
    """Return the learning rate of a row, or None if other values vary too.

    Args:
        common: the overrides of all rows.
    """
    words = [override.partition("=") for override in row.overrides if override not in common]
    return float(words[0][2]) if [word[0] for word in words] == [RATE] else None


def curve(row: Row, plan: Plan) -> dict[str, Any]:
    """Return the training loss at the first and the last logged step, and the highest, from DVC's cache."""
    losses = [point["loss"] for point in history(row.name, plan)]
    if not losses:
        return {"first": None, "last": None, "highest": None}
    return {"first": losses[0], "last": losses[-1], "highest": max(losses)}


def history(experiment: str, plan: Plan) -> list[dict[str, Any]]:
    """Return the logged steps of an experiment; none if DVC's cache no longer has them."""
    file = plan.outputs(experiment).find(HISTORY)
    return [] if file is None else read_csv(file)
