"""Show how models trained with one chat template answer in another: the table, and its result in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from capas.core.files import write_csv, write_whole
from capas.sweep.wording import LANGUAGES, language, say

CSV, TEXT = "reports/templates.csv", "reports/templates.md"
COLUMNS = ("trained_with", "asked_in", "num_records", "score", "stop_rate")

Cell = dict[str, Any]  # COLUMNS, and `ids`: formats with equal `ids` have the same prompt ids


@dataclass(frozen=True)
class CrossTable:
    """Scores by training template (rows) and prompt template (columns); `metric` names the score."""

    cells: Sequence[Cell]
    metric: str

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts of the table, above all how much a model loses in a format that is not its own.

        Formats that write the same ids are one format to the model, and count as its own.
        """
        score = {(c["trained_with"], c["asked_in"]): c["score"] for c in self.cells}
        ids = {c["asked_in"]: c["ids"] for c in self.cells}
        names = sorted(ids)
        wrong = {pair: value for pair, value in score.items() if ids[pair[0]] != ids[pair[1]]}
        loses = {
            name: score[name, name]
            - mean([v for (trained, _), v in wrong.items() if trained == name])
            for name in names
            if any(trained == name for trained, _ in wrong)
        }
        alike = [[n for n in names if ids[n] == found] for found in sorted(set(ids.values()))]
        return {
            "metric": self.metric,
            "count": self.cells[0]["num_records"],
            "own": mean([score[name, name] for name in names]),
            "other": mean(list(wrong.values())) if wrong else None,
            "worst": min(wrong, key=lambda pair: (wrong[pair], pair), default=None),
            "worst_score": min(wrong.values(), default=None),
            "most": max(sorted(loses), key=lambda name: loses[name], default=None),
            "least": min(sorted(loses), key=lambda name: loses[name], default=None),
            "loses": loses,
            "same": sorted(group for group in alike if len(group) > 1),
        }

    def sentences(self, code: str) -> list[str]:
        """Return the result in sentences, in a language; the first one describes the table."""
        keys = ["head", "one_format"]
        if self.facts["other"] is not None:
            erratic = self.facts["other"] < self.facts["own"]
            keys = ["head", "erratic" if erratic else "not_erratic", "sensitive"]
        keys += ["same"] if self.facts["same"] else []
        return [say(code, f"crossing.{key}", **self.facts) for key in (*keys, "limits")]

    def rows(self, code: str) -> list[list[str]]:
        """Return the scores as texts, with the templates' names in the first row and column."""
        numbers = language(code).numbers
        names = sorted({cell["asked_in"] for cell in self.cells})
        score = {(c["trained_with"], c["asked_in"]): numbers.pct(c["score"]) for c in self.cells}
        return [["", *names], *([name, *(score[name, other] for other in names)] for name in names)]

    def text(self, code: str) -> str:
        """Return table and sentences for a terminal."""
        rows, (head, *rest) = self.rows(code), self.sentences(code)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([head, *lines, *rest])

    def markdown(self, code: str) -> str:
        (first, *rows), (head, *rest) = self.rows(code), self.sentences(code)
        rule = ["---", *("---:" for _ in first[1:])]
        lines = [f"| {' | '.join(row)} |" for row in (first, rule, *rows)]
        return "\n\n".join([head, "\n".join(lines), *rest])

    def write(self, home: Path) -> None:
        """Write both files, which git ignores; the same cells give the same bytes."""
        (home / CSV).parent.mkdir(exist_ok=True)
        write_csv(home / CSV, COLUMNS, self.cells)
        parts = [self.markdown(code) for code in LANGUAGES]
        write_whole(home / TEXT, "\n\n---\n\n".join(parts) + "\n")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
