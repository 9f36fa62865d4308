"""Say in words what a ranking shows, and what it does not."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from capas.core.errors import listed
from capas.sweep.ranking import Row, comparison, lack_of_records, whole
from capas.sweep.records import place_of

if TYPE_CHECKING:
    from capas.sweep.comparison import Comparison


def verdict(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """Return what the ranking shows as sentences; an empty text for a single setting."""
    return " ".join(_sentences(rows, settings)) if len(rows) > 1 else ""


def _sentences(rows: Sequence[Row], settings: dict[str, Any]) -> Iterator[str]:
    compared = whole(rows)
    if lacking := [row for row in rows if row.missing]:
        yield _lacking(lacking, compared)
    if len(compared) < 2:
        return
    found = comparison(rows, settings)
    if found is None or (found.num_seeds == 1 and _all_equal(compared)):
        yield from _single_trials(compared, settings)
        return
    if found.num_seeds == 1:
        yield _coverage(compared, found, settings)
    yield _winner(compared, found, settings["confidence_fraction"])
    yield from _against_default(compared, found, settings["objective"])
    if found.optimism > 0:
        yield (
            f"The mean of the first is too good by about {found.optimism:.2g}, because it was picked as "
            f"the best of {len(compared)}."
        )
    if found.num_seeds > 1:
        yield _coverage(compared, found, settings)


def _coverage(rows: Sequence[Row], found: "Comparison", settings: dict[str, Any]) -> str:
    """Return what the intervals cover: other seeds, other records, or both."""
    seed, records = (
        (*settings["replicates"], "seed")[0],
        f"other records than these {found.num_records}",
    )
    if found.num_seeds == 1:
        return (
            f"One trial each: what follows is about these trained models on {records}. Another {seed} "
            f"may give another order: add {seed}=1,2,3."
        )
    if found.num_records:
        return f"All of this is about other {seed}s than these {found.num_seeds} and {records}, together."
    lack = lack_of_records(rows) if place_of(settings["objective"]) else ""
    why = f" Nothing is known of other records: {lack}." if lack else ""
    return f"All of this is about other {seed}s than these {found.num_seeds}, on the same records.{why}"


def _all_equal(rows: Sequence[Row]) -> bool:
    return all(row.mean == rows[0].mean for row in rows)


def _lacking(rows: Sequence[Row], compared: Sequence[Row]) -> str:
    absent = sorted(
        {" ".join(replicate) or "a replicate" for row in rows for replicate in row.missing}
    )
    names = listed([row.name for row in rows], 3)
    if not compared:
        return f"No setting has all of {', '.join(absent)}, so none can be compared with another."
    return f"Not compared: {names}, for lack of {', '.join(absent)}. Run the missing trials."


def _single_trials(rows: Sequence[Row], settings: dict[str, Any]) -> Iterator[str]:
    if _all_equal(rows):
        yield (
            f"No setting is better: all {len(rows)} have the same {settings['objective']}, so what was "
            "swept does not change it."
        )
        return
    tied = sum(row.tied for row in rows)
    repeats = settings["replicates"][0] if settings["replicates"] else "seed"
    equal = f"{tied + 1} rows are equal (=1). " if tied else ""
    yield (
        f"{equal}One trial each: add {repeats}=1,2,3 to see whether the difference is more than "
        f"chance. The best of {len(rows)} looks better than it is."
    )


def _winner(rows: Sequence[Row], found: "Comparison", confidence: float) -> str:
    share = f"{confidence:.0%}"
    if found.is_best:
        name = "The first, the default," if rows[0].is_default else "The first"
        return f"{name} is better than every other setting ({share} confidence for all together)."
    tied = 1 + sum(row.tied for row in rows)
    return f"{tied} settings may be the best (=1): at {share} confidence these trials do not separate them."


def _against_default(rows: Sequence[Row], found: "Comparison", objective: str) -> Iterator[str]:
    if found.detectable is None:
        yield "The values of conf/ were not among them: add them to see whether anything is better."
    elif found.least_gain is not None and found.least_gain > 0:
        yield (
            f"The first is better than the default by {found.gain:.3g} in {objective}, at least "
            f"{found.least_gain:.3g}."
        )
    else:
        shown = "is better" if found.gain is None else "is shown to be better"
        yield (
            f"No setting {shown} than the default. A gain of "
            f"{found.detectable:.3g} in {objective} would have been shown in 80% of such sweeps."
        )
