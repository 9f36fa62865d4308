"""Records as fetch checks them, without files: recognised, converted, flaws treated as a policy says."""

from typing import Any

from capas.dataset.conversation import check_record
from capas.dataset.flaws import WAYS_OUT, Flaw, Flaws
from capas.dataset.rows import Row
from capas.dataset.shapes import convert


def flaws(budget_fraction: float = 1.0, **policies: str) -> Flaws:
    """Every kind of flaw is an error, but for `policies`."""
    return Flaws({**dict.fromkeys(WAYS_OUT, "error"), **policies}, budget_fraction)


def check(
    *values: Any,
    shape: str = "auto",
    columns: Any = None,
    counts: Flaws | None = None,
    roles: Any = None,
) -> list[dict[str, Any]]:
    """The records of `RAW` that these rows of mine.jsonl become; dropped ones are left out."""
    counts = counts or flaws()
    rows = [Row("mine.jsonl", "line", n, value) for n, value in enumerate(values, 1)]
    found = [_checked(row, shape, columns or {}, counts, roles) for row in rows]
    if counts.refused:
        counts.check()
    return [record for record in found if record is not None]


def _checked(
    row: Row, shape: str, columns: Any, counts: Flaws, roles: Any
) -> dict[str, Any] | None:
    counts.num_read += 1
    found: Any = row.value if isinstance(row.value, dict) else {}
    try:
        found = convert(row.value, shape, columns, roles)
        return check_record(found, counts, roles)
    except Flaw as flaw:
        counts.refuse(flaw, row.place, str(found.get("id") or ""))
        return None
