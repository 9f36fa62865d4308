"""Give a stage a read-only view of the params that dvc.yaml declares for it."""

from collections.abc import Iterator, Mapping
from typing import Any

from capas.core.errors import CapasError

ABSENT = object()  # stands for a missing value, unlike None


class Params(Mapping[str, Any]):
    """Nested values, read as attributes or as a mapping: `params.lora.r`, `LoraConfig(**params.lora)`.

    Reading an undeclared key as an attribute raises CapasError: a stage that used it could give another
    result under the same DVC key.
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values, self._path = values, path

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        return Params(value, f"{self._path}{key}.") if isinstance(value, dict) else value

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):  # pickle looks for __setstate__
            raise AttributeError(key)
        if key not in self._values:
            raise CapasError(
                f"the param '{self._path}{key}' is not declared for this stage in dvc.yaml; "
                f"declared here: {', '.join(self._values) or 'none'}"
            )
        return self[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def without(self, *keys: str) -> dict[str, Any]:
        """Return the values as a plain dict without `keys`, to build a third-party object from."""
        return {key: value for key, value in self._values.items() if key not in keys}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {'lora.r': 16} for {'lora': {'r': 16}}; an empty mapping counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and len(value) > 0
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def select(values: Mapping[str, Any], keys: list[str], file: str = "params.yaml") -> dict[str, Any]:
    """Return the part of `values` under dotted `keys`, nested as in the file.

    Raises:
        CapasError: dvc.yaml declares a key that the file does not have.
    """
    chosen: dict[str, Any] = {}
    for dotted in keys:
        source, target = values, chosen
        *groups, leaf = dotted.split(".")
        for group in groups:
            source = source.get(group, {}) if isinstance(source, Mapping) else {}
            target = target.setdefault(group, {})
        if not isinstance(source, Mapping) or leaf not in source:
            raise CapasError(
                f"{file}: the param '{dotted}' that dvc.yaml declares is missing. Run `dvc repro "
                "compose`"
            )
        target[leaf] = source[leaf]
    return chosen


def lookup(values: Any, dotted: str) -> Any:
    """Return the value under a dotted key, or `ABSENT` if there is none."""
    for part in dotted.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return ABSENT
        values = values[part]
    return values
