"""Arrange the scores of a classification for the report: the confusion table, each label, calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
MAX_TABLE = 12  # labels of a confusion table on the page
MAX_CONFUSED = 12  # pairs of labels that are listed


def arrange(base: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Row | None:
    """Return what the page shows of a classification, None if no labels were compared.

    Args:
        base: reports/evaluation_base.json.
        evaluation: reports/evaluation.json.
    """
    tuned = evaluation["tuned"].get("labels")
    if tuned is None:
        return None
    names, models = tuned["names"], {"base": base["labels"], "tuned": tuned}
    tables = {model: of["confusion"] for model, of in models.items()}
    return {
        "names": names,
        "majority": base["majority"],
        "over_majority": evaluation["difference_to_majority"]["label_balanced_accuracy"],
        "tables": tables if len(names) <= MAX_TABLE else None,
        "confused": _confused(names, tuned["confusion"]),
        "by_label": _by_label(names, tuned["num_train"], tuned["confusion"]),
        "curves": {model: of["calibration"] for model, of in models.items()},
    }


def _confused(names: Sequence[str], table: Sequence[Sequence[int]]) -> list[Row]:
    """Return the pairs of labels that are confused most often."""
    found: list[Row] = [
        {"right": names[i], "chosen": names[j], "count": count}
        for i, row in enumerate(table)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(found, key=lambda pair: -pair["count"])[:MAX_CONFUSED]


def _by_label(
    names: Sequence[str], num_train: Sequence[int], table: Sequence[Sequence[int]]
) -> list[Row]:
    """Return precision, recall and F1 of each label; None where nothing can be divided."""
    rows = []
    for i, name in enumerate(names):
        hits, num_test, num_chosen = table[i][i], sum(table[i]), sum(row[i] for row in table)
        rows.append(
            {
                "label": name,
                "num_train": num_train[i],
                "num_test": num_test,
                "precision": _share(hits, num_chosen),
                "recall": _share(hits, num_test),
                "f1": _share(2 * hits, num_test + num_chosen),
            }
        )
    return rows


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
