"""Show several results as lines of text, one row each."""

from collections.abc import Iterator, Sequence

from capas.compare import layout, words
from capas.compare.changes import PRESET, Changes
from capas.compare.layout import one_line, shortened
from capas.compare.scores import LOSS, Compared, headline, is_share
from capas.compare.sides import Side
from capas.compare.view import ABSENT, MAX_NAME, MIN_CELL, as_yaml, value_of, widest

_MIN_NAME = 12


def table_lines(
    sides: Sequence[Side], changes: Changes, found: Sequence[Compared | None], width: int
) -> Iterator[str]:
    """Yield a row for each result: differing parameters, score, difference to the first, loss, seconds.

    Parameters that do not fit as columns stand on a line of their own below the row.

    Args:
        found: each result compared with the first; None for the first.
    """
    keys = changes.shown
    names = ["", *(f"{one_line(side.name)}{' *' if side.same_as else ''}" for side in sides)]
    fixed = _numbers(sides, found)
    columns = [
        [head, *(as_yaml(side.texts.get(key)) for side in sides)]
        for key, head in zip(keys, _short_keys(keys), strict=True)
    ]
    least = min(_MIN_NAME, widest(names))
    while len(fixed) > 1 and _room(fixed, width) < least:
        fixed.pop(1)  # on a narrow terminal the score alone stays
    taken = sum(min(MIN_CELL, widest(column)) + layout.GAP for column in columns)
    is_wide = taken + least <= _room(fixed, width)
    kept = columns if is_wide else []
    name_width = min(MAX_NAME, widest(names), _room(fixed, width) - (taken if is_wide else 0))
    widths = [name_width, *(min(MIN_CELL, widest(c)) for c in kept), *map(widest, fixed)]
    right = [False, *([False] * len(kept)), *([True] * len(fixed))]
    lines = layout.table(list(zip(names, *kept, *fixed, strict=True)), widths, right)
    yield lines[0]
    for side, line in zip(sides, lines[1:], strict=True):
        yield line
        if not is_wide:
            yield from _details(side, sides[0], keys, width)
    yield from _footnotes(sides, found, width)


def _numbers(sides: Sequence[Side], found: Sequence[Compared | None]) -> list[list[str]]:
    """Return the columns of numbers with their heads: score, difference to the first, loss, seconds."""
    metric = headline(sides[0])
    share = all(is_share(side, metric) for side in sides if metric in side.metrics)
    columns = [[words.metric_name(metric), *(value_of(side, metric, share) for side in sides)]]
    columns.append(["to the first", *(_change(one, metric, share) for one in found)])
    if metric != LOSS:
        columns.append([LOSS, *(value_of(side, LOSS, False) for side in sides)])
    return [*columns, ["seconds", *(words.seconds(side.seconds.get("train")) for side in sides)]]


def _details(side: Side, first: Side, keys: Sequence[str], width: int) -> Iterator[str]:
    """Yield the parameters in which a row differs from the first row; for the first row, all of them."""
    named = [
        shortened(
            f"{key.removesuffix(PRESET)}={shortened(as_yaml(side.texts.get(key)), MAX_NAME)}",
            width - 4,
        )
        for key in keys
        if side is first or side.texts.get(key) != first.texts.get(key)
    ]
    yield from (f"    {line}" for line in layout.wrapped("  ".join(named), width - 4) if named)


def _footnotes(
    sides: Sequence[Side], found: Sequence[Compared | None], width: int
) -> Iterator[str]:
    if same := next((side for side in sides if side.same_as), None):
        yield f"* = {same.same_as}"
    if confidence := next((one.confidence for one in found if one), None):
        footnote = (
            f"To the first: the difference on the test records that both answered, {100 * confidence:g} % "
            "interval. Seconds are those of the training."
        )
        yield from layout.wrapped(footnote, width)


def _room(fixed: Sequence[Sequence[str]], width: int) -> int:
    return width - sum(widest(column) + layout.GAP for column in fixed)


def _change(found: Compared | None, metric: str, share: bool) -> str:
    if found is None:
        return ""
    if found.test == "other":
        return "other test records"
    change = found.difference
    if change is None or found.metric != metric:
        return ABSENT
    shown = f"{100 * change.mean:+.1f}" if share else f"{change.mean:+.3g}"
    return f"{shown} ({words.bounds(change.low, change.high, share)})"


def _short_keys(keys: Sequence[str]) -> list[str]:
    """Return the last part of each key, or the whole key if two end alike; a choice is named by its group."""
    last = [key.removesuffix(PRESET).rpartition(".")[2] for key in keys]
    return [
        short if last.count(short) == 1 else key.removesuffix(PRESET)
        for key, short in zip(keys, last, strict=True)
    ]
