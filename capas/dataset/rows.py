"""A row of a source, and where it stands."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """`value` is a Flaw where the row cannot be read; `unit` is line, or record where lines do not count."""

    file: str
    unit: str
    number: int
    value: Any

    @property
    def place(self) -> dict[str, str]:
        return {"file": self.file, "at": f"{self.unit} {self.number}"}


def without_nulls_of_others(row: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives each struct the keys of all rows: within a column, those that are null are of others."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
