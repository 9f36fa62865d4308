"""Score completions with the metrics that an evaluation chooses."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.evaluation.match_metrics import exact_match, json_fields, same_label, valid_json
from capas.evaluation.names import LABEL, name_of
from capas.evaluation.number_metric import final_number, last_number
from capas.evaluation.overlap_metrics import chrf, rouge
from capas.evaluation.user_metrics import load_functions

Score = float | bool
Row = Mapping[str, Any]  # id, metadata (JSON as text), prompt, reference
RULES: dict[str, Callable[[str, str], Score]] = {
    "exact_match": exact_match,
    "valid_json": lambda completion, _: valid_json(completion),
    "final_number": final_number,
    "json_fields": json_fields,
    **{kind: partial(rouge, kind) for kind in ("rouge1", "rouge2", "rougeL")},
    "chrf": chrf,
    LABEL: same_label,
}


class Scorer:
    """The chosen metrics; `names` are their names in columns and reports, in order."""

    def __init__(
        self,
        metrics: Sequence[str],
        composed: Path,
        key: str = "evaluation.metrics",
        split: str = "test",
    ) -> None:
        """Load the metrics.

        Args:
            metrics: names of capas' metrics, or FILE.py:FUNCTION for the user's own.
            composed: data/composed/metrics.json, with the sources of the user's own functions.
            key, split: where the metrics were chosen and which records they score, for messages.

        Raises:
            CapasError: a function cannot be loaded.
        """
        own = load_functions(metrics, read_json(composed)["sources"], key, split)
        self._key, self._split = key, split
        self.names = [name_of(metric) for metric in metrics]
        self._own = {name_of(metric): function for metric, function in own.items()}

    def check(self, rows: Sequence[Row]) -> None:
        """Check the records before anything is generated; own functions are tried on the first reference.

        Raises:
            CapasError: final_number is chosen and a reference has no number, or an own function fails.
        """
        if "final_number" in self.names:
            self._check_numbers(rows)
        for row in rows[:1]:
            for function in self._own.values():
                function(row["reference"], row["reference"], _record(row))

    def score(self, completion: str, row: Row) -> dict[str, Score]:
        """Return {name: score} of one completion.

        Raises:
            CapasError: an own function fails, or does not return a number from 0 to 1.
        """
        found: dict[str, Score] = {}
        for name in self.names:
            if name in self._own:
                found[name] = self._own[name](completion, row["reference"], _record(row))
            else:
                found[name] = RULES[name](completion, row["reference"])
        return found

    def _check_numbers(self, rows: Iterable[Row]) -> None:
        lost = [row for row in rows if last_number(row["reference"]) is None]
        if lost:
            raise CapasError(
                f"{self._key}: final_number: the reference of {self._split} record {lost[0]['id']} "
                f"has no number ({lost[0]['reference'][:80]!r}; {len(lost)} such records). Choose "
                "another metric, or remove these records."
            )


def _record(row: Row) -> dict[str, Any]:
    """Return the record that a function of the user's own gets, a new object each time."""
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "metadata": json.loads(row["metadata"]) if row["metadata"] else {},
    }
