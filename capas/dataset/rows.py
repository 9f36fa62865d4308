"""Represent a row of a source with its place."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row of a source.

    `value` is a Flaw if the row cannot be read. `unit` is what `number` counts: line, or record.
    """

    file: str
    unit: str
    number: int
    value: Any

    @property
    def place(self) -> dict[str, str]:
        return {"file": self.file, "at": f"{self.unit} {self.number}"}


def without_nulls_of_others(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of Arrow's without null keys inside its columns.

    Arrow gives each struct the keys of all rows, so a null key comes from another row.
    """
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
