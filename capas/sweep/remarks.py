"""Say what to do after a sweep: look beyond the edge of the grid, or distrust a score of the test split."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from capas.config.schema import GROUPS
from capas.sweep.effects import number_of
from capas.sweep.objective import is_on_test_split
from capas.sweep.ranking import Row
from capas.sweep.wording import say

Swept = Mapping[str, Sequence[str]]  # the values of each key that has several, as given


def remarks(
    rows: Sequence[Row], settings: Mapping[str, Any], swept: Swept, code: str = "en"
) -> list[str]:
    """Return sentences on the result; none for a single row, because nothing was chosen."""
    if len(rows) < 2:
        return []
    found = [
        say(code, f"remarks.{edge}", name=key, value=rows[0].value(key))
        for key, edge in _edges(rows, settings, swept)
    ]
    if is_on_test_split(settings["objective"]):
        found.append(say(code, "remarks.test_split", objective=settings["objective"]))
    return found


def halved(rows: Sequence[Row], dropped: Sequence[Row], code: str = "en") -> list[str]:
    """Return what successive halving did, if it dropped a setting."""
    if not dropped:
        return []
    rungs = Counter(row.rung for row in reversed(dropped))
    places = [
        say(code, "remarks.dropped_at", count=count, step=rung[0], num_steps=rung[1])
        for rung, count in rungs.items()
        if rung
    ]
    total = len(rows) + len(dropped)
    return [say(code, "remarks.halved", ended=len(rows), total=total, places=", ".join(places))]


def _edges(
    rows: Sequence[Row], settings: Mapping[str, Any], swept: Swept
) -> Iterator[tuple[str, str]]:
    """Yield (key, largest or smallest) for each number whose best value is at an end of those tried."""
    for key, texts in swept.items():
        if key in settings["replicates"] or key.endswith("seed"):
            continue
        grid = {number for text in texts if (number := number_of(text)) is not None}
        best = {number_of(row.value(key)) for row in rows if row.mean == rows[0].mean}
        if len(grid) < len(set(texts)) or len(grid) < 2 or len(best) > 1:
            continue
        number = best.pop()
        if number == max(grid) and _is_valid(key, 1.1 * number):
            yield key, "largest"
        elif number == min(grid) and number > 0 and _is_valid(key, 0.9 * number):
            yield key, "smallest"


def _is_valid(key: str, number: float) -> bool:
    """Return whether the configuration accepts a number for this key, or its whole part."""
    group, _, leaf = key.partition(".")
    if group not in GROUPS or leaf not in GROUPS[group].model_fields:
        return True
    field = GROUPS[group].model_fields[leaf]
    kind: Any = Annotated[field.annotation, field]
    adapter = TypeAdapter[Any](kind)
    for candidate in (number, int(number)):
        with suppress(ValidationError):
            adapter.validate_python(candidate)
            return True
    return False
