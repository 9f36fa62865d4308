"""Say in words what a ranking shows, and what it does not."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from capas.sweep.ranking import (
    Row,
    comparison,
    first_names,
    lack_of_records,
    num_looked_at,
    replicate_key,
    whole,
)
from capas.sweep.records import place_of
from capas.sweep.wording import rounded, say

if TYPE_CHECKING:
    from capas.sweep.comparison import Comparison

Said = tuple[str, dict[str, Any]]  # the key of a text below `verdict`, and its facts


def verdict(rows: Sequence[Row], settings: dict[str, Any], code: str = "en") -> str:
    """Return what the ranking shows as sentences; an empty text for a single setting."""
    if len(rows) < 2:
        return ""
    common = {"objective": settings["objective"], "confidence": settings["confidence_fraction"]}
    found = _statements(rows, settings)
    return " ".join(say(code, f"verdict.{key}", **common, **facts) for key, facts in found)


def _statements(rows: Sequence[Row], settings: dict[str, Any]) -> Iterator[Said]:
    compared = whole(rows)
    if lacking := [row for row in rows if row.missing]:
        yield _lacking(lacking, compared)
    if len(compared) < 2:
        return
    found = comparison(rows, settings)
    if found is None or (found.num_seeds == 1 and _all_equal(compared)):
        yield _single_trials(compared, settings)
        return
    seed = replicate_key(settings)
    if found.num_seeds == 1:
        yield "one_seed", {"name": seed, "records": found.num_records}
    yield _winner(compared, found)
    yield _against_default(found)
    if found.optimism > 0 and not compared[0].num_dropped:
        yield "optimism", {"optimism": rounded(found.optimism, 2), "count": len(compared)}
    if found.num_seeds > 1:
        yield "scope", {"name": seed, "count": found.num_seeds, "records": found.num_records}
        lack = lack_of_records(compared) if place_of(settings["objective"]) else None
        yield from [lack] if lack else []


def _all_equal(rows: Sequence[Row]) -> bool:
    return all(row.mean == rows[0].mean for row in rows)


def _lacking(rows: Sequence[Row], compared: Sequence[Row]) -> Said:
    absent = sorted({" ".join(replicate) for row in rows for replicate in row.missing})
    facts = {**first_names([row.name for row in rows]), "absent": absent}
    return ("lacking" if compared else "none_whole"), facts


def _single_trials(rows: Sequence[Row], settings: dict[str, Any]) -> Said:
    if _all_equal(rows):
        return "all_equal", {"count": len(rows)}
    facts = {"name": replicate_key(settings), "count": num_looked_at(rows)}
    return "single_trials", {"tied": sum(row.tied for row in rows), **facts}


def _winner(rows: Sequence[Row], found: "Comparison") -> Said:
    if found.is_best:
        return "winner", {"is_default": rows[0].is_default, "dropped": rows[0].num_dropped}
    return "tied", {"count": 1 + sum(row.tied for row in rows)}


def _against_default(found: "Comparison") -> Said:
    if found.detectable is None:
        return "no_default", {}
    if found.gain is not None and found.least_gain is not None and found.least_gain > 0:
        return "gain", {"gain": rounded(found.gain), "least": rounded(found.least_gain)}
    return "no_gain", {"detectable": rounded(found.detectable), "is_default": found.gain is None}
