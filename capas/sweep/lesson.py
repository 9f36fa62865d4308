"""What a sweep over the learning rate shows, in the report's words: too low, right, too high."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.csv as pa_csv

from capas.dag import parse_yaml
from capas.page.language import Language
from capas.sweep.plan import Plan
from capas.sweep.ranking import Row
from capas.worktree import git

LANGUAGES = ("en", "es")
RATE, HISTORY = "trainer.learning_rate", "reports/history.csv"


def lesson(rows: Sequence[Row], settings: Mapping[str, Any], plan: Plan, code: str) -> list[str]:
    """A sentence for each learning rate, lowest first; none where something else was swept, too."""
    rates = {rate: row for row in rows if (rate := _rate(row)) is not None}
    if not 1 < len(rates) == len(rows):
        return []
    language = Language(Path(__file__).parent, code, {"objective": settings["objective"]})
    best = next(iter(rates))
    tied = {rate for rate, row in rates.items() if row.tied}
    said = []
    for rate, row in sorted(rates.items()):
        kind = (
            "tied"
            if rate in tied
            else "right"
            if rate == best
            else "low"
            if rate < best
            else "high"
        )
        said.append(
            str(language.say(f"learning_rate.{kind}", rate=rate, row=row, **curve(row, plan)))
        )
    return said


def _rate(row: Row) -> float | None:
    """None where the point has other values, too."""
    words = [override.partition("=") for override in row.overrides]
    return float(words[0][2]) if [word[0] for word in words] == [RATE] else None


def curve(row: Row, plan: Plan) -> dict[str, Any]:
    """The training loss at the first and the last logged step, and at its highest; out of DVC's cache."""
    losses = [point["loss"] for point in history(row.name, plan)]
    if not losses:
        return {"first": None, "last": None, "highest": None}
    return {"first": losses[0], "last": losses[-1], "highest": max(losses)}


def history(experiment: str, plan: Plan) -> list[dict[str, Any]]:
    """The logged steps of an experiment; none where the cache does not hold them any more."""
    commit = plan.commit
    reference = f"refs/exps/{commit[:2]}/{commit[2:]}/{experiment}"
    lock = parse_yaml(git(plan.home, "show", f"{reference}:dvc.lock"), "dvc.lock")
    outs = {o["path"]: o["md5"] for s in lock["stages"].values() for o in s.get("outs", [])}
    md5 = outs.get(HISTORY, "")
    file = plan.cache / "files/md5" / md5[:2] / md5[2:]
    rows: list[dict[str, Any]] = pa_csv.read_csv(file).to_pylist() if md5 and file.exists() else []
    return rows
