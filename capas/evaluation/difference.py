"""Compare the scores of a tuned model with those of its base on the same records, with intervals."""

from typing import Any

from capas.core.params import Params
from capas.evaluation import comparison
from capas.evaluation.names import LOWER_IS_BETTER, generates
from capas.evaluation.power import POWER_FRACTION
from capas.evaluation.predictions import Row


def compare(
    before: list[Row], after: list[Row], tuned: dict[str, Any], names: list[str], params: Params
) -> dict[str, Any]:
    """Return the tuned model's scores and gains; a gain has an interval, a verdict and the records needed.

    `shares` lists the metrics whose scores all lie between 0 and 1.
    """
    columns = [*names, "loss"]
    return {
        "tuned": tuned,
        "difference": {name: difference(before, after, name, params) for name in columns},
        "length_ratio": length_ratio(after, params) if generates(names) else None,
        "metrics": names,
        "shares": [n for n in names if all(0 <= row[n] <= 1 for row in (*before, *after))],
        "confidence_fraction": params.evaluation.confidence_fraction,
        "power_fraction": POWER_FRACTION,
        "bootstrap_resamples": params.evaluation.bootstrap_resamples,
    }


def difference(before: list[Row], after: list[Row], column: str, params: Params) -> dict[str, Any]:
    """Return a column's paired difference, per token for the loss (lower is better), otherwise per record."""
    is_loss = column == "loss"
    weights = [row["num_supervised_tokens"] if is_loss else 1 for row in after]
    scores = [[float(row[column]) for row in rows] for rows in (before, after)]
    confidence = params.evaluation.confidence_fraction
    interval = comparison.paired_difference(
        scores[0],
        scores[1],
        weights,
        resamples=params.evaluation.bootstrap_resamples,
        confidence_fraction=confidence,
        seed=params.evaluation.seed,
    )
    needed = comparison.records_needed(
        scores[0], scores[1], weights, confidence_fraction=confidence
    )
    verdict = comparison.verdict(interval, higher_is_better=column not in LOWER_IS_BETTER)
    return {**interval, "verdict": verdict, "num_records_needed": needed}


def length_ratio(rows: list[Row], params: Params) -> dict[str, float]:
    """Return the answers' mean length over that of the references, in characters, with its interval.

    An empty reference counts as one character.

    Args:
        rows: [records], each with completion and reference.

    Returns:
        mean, low, high.
    """
    lengths = [max(1, len(row["reference"])) for row in rows]
    ratios = [len(row["completion"]) / n for row, n in zip(rows, lengths, strict=True)]
    return comparison.paired_difference(
        [0.0] * len(rows),
        ratios,
        lengths,  # a mean of ratios, weighted by the references' lengths, is the ratio of the means
        resamples=params.evaluation.bootstrap_resamples,
        confidence_fraction=params.evaluation.confidence_fraction,
        seed=params.evaluation.seed,
    )


def in_words(name: str, found: dict[str, Any]) -> str:
    """Return a difference as text.

    Example: exact_match +0.25 (0.1 to 0.4): better; 12 records would show a difference of that size
    """
    needed = found["num_records_needed"]
    seen = f"{name} {found['mean']:+.4g} ({found['low']:+.4g} to {found['high']:+.4g})"
    shown = "" if needed is None else f"; {needed} records would show a difference of that size"
    return f"{seen}: {found['verdict']}{shown}"


def gains(report: dict[str, Any]) -> dict[str, float]:
    """Return the difference of the first metric with its interval, as a flat mapping."""
    return {
        f"{name}_gain{suffix}": report["difference"][name][end]
        for name in report["metrics"][:1]
        for end, suffix in (("mean", ""), ("low", "_low"), ("high", "_high"))
    }
