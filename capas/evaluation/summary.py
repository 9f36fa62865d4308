"""Summarize the scores of many records: means, and means by kind, language, function and distance."""

import json
from collections.abc import Mapping
from typing import Any

from capas.evaluation.comparison import perplexity
from capas.evaluation.names import LABEL_SCORES, compares_labels
from capas.evaluation.predictions import RATES, Row

GROUPS = ("kind", "language", "function", "turns")  # keys of metadata by which scores are grouped
DISTANCES = ("twin", "near", "far")  # from a test prompt to the most similar training prompt


def summarize(
    rows: list[Row], names: list[str], distances: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Summarize rows: loss and token accuracy are means over tokens, all other scores over records.

    A score is None if nothing was generated.

    Args:
        distances: {id: twin, near or far}.
    """
    tokens = sum(row["num_supervised_tokens"] for row in rows)
    loss, accuracy = (
        sum(row[name] * row["num_supervised_tokens"] for row in rows) / tokens
        for name in ("loss", "token_accuracy")
    )
    return {
        "num_records": len(rows),
        "loss": loss,
        "perplexity": perplexity(loss),
        "token_accuracy": accuracy,
        **{name: mean(rows, name) for name in names},
        **{name: mean(rows, column) for column, name in RATES.items()},
        **copied(rows),
        "by": groups(rows, names, distances or {}),
    }


def summarize_copies(
    rows: list[Row], names: list[str], distances: Mapping[str, str]
) -> dict[str, Any] | None:
    """Summarize copied answers, and how similar their prompts are; None if nothing was copied."""
    if not rows:
        return None
    return {
        "num_records": len(rows),
        **{name: mean(rows, name) for name in names},
        **copied(rows),
        "similarity": mean(rows, "similarity"),
        "by": groups(rows, names, distances),
    }


def copied(rows: list[Row]) -> dict[str, Any]:
    """Return the share of answers with every prompt value that their reference repeats, and their number."""
    having = [row for row in rows if row.get("copied_values") is not None]
    rate = mean(having, "copied_values") if having else None
    return {"copied_value_rate": rate, "num_copied": len(having)}


def mean(rows: list[Row], column: str) -> float | None:
    return (
        sum(row[column] for row in rows) / len(rows) if all(column in row for row in rows) else None
    )


def groups(rows: list[Row], names: list[str], distances: Mapping[str, str]) -> dict[str, Any]:
    """Return scores by each metadata key that all records have, and by distance to the training split."""
    found: dict[str, dict[str, list[Row]]] = {}
    for group in GROUPS:
        if all(group in metadata(row) for row in rows):
            found[group] = {}
            for row in rows:  # in the order in which the values first occur
                found[group].setdefault(str(metadata(row)[group]), []).append(row)
    if distances:
        far = {d: [row for row in rows if distances[row["id"]] == d] for d in DISTANCES}
        found["distance"] = {distance: part for distance, part in far.items() if part}
    return {
        group: {
            value: {"num_records": len(part), **{name: mean(part, name) for name in names}}
            for value, part in parts.items()
        }
        for group, parts in found.items()
    }


def side_by_side(facts: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the facts that `dvc metrics show` shows side by side for base and tuned model.

    `exact_match` is included even if it was not chosen, because a sweep shows it beside its objective.
    """
    metrics = names if "exact_match" in names else ["exact_match", *names]
    metrics = [*metrics, *(LABEL_SCORES if compares_labels(names) else ())]
    wanted = ("loss", "perplexity", "token_accuracy", *metrics, "stop_rate")
    return {name: facts.get(name) for name in wanted}


def before_after(facts: dict[str, dict[str, Any]], metric: str) -> list[Row]:
    """Return a row per model for all records and for each kind with such a score, in the order of `facts`."""
    scores = {
        model: {"all": found, **found["by"].get("kind", {})} for model, found in facts.items()
    }
    return [
        {
            **{"kind": kind, "model": model, "bar": f"{kind}, {model}"},
            **{"metric": metric, "score": scores[model][kind][metric]},
        }
        for kind in scores["tuned"]
        for model in scores
        if metric in scores[model].get(kind, {})
    ]


def metadata(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row["metadata"])
    return found
