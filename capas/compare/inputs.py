"""What differs between two results beside their parameters: code, packages, data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capas.compare.sides import ADAPTER_FOLDER, Side
from capas.dag import ancestors

ENVIRONMENT = "environment.yaml"
RAW = "data/raw"


@dataclass(frozen=True)
class Inputs:
    """`code` are scripts and modules, `files` other inputs, `packages` {name: (version of A, of B)}."""

    code: tuple[str, ...]
    files: tuple[str, ...]
    packages: dict[str, tuple[str, str]]
    same_data: bool | None
    same_adapter: bool

    @property
    def differ(self) -> bool:
        return bool(self.code or self.files or self.packages or self.same_data is False)


def differing_inputs(a: Side, b: Side) -> Inputs:
    """Compare what led to two results, as their dvc.lock recorded it."""
    files = _differing(_files(a.lock), _files(b.lock))
    one, other = _packages(a.lock), _packages(b.lock)
    packages = {name: (one.get(name, "–"), other.get(name, "–")) for name in _differing(one, other)}
    data = [side.outputs.digest(f"{RAW}/train.parquet") for side in (a, b)]
    if None in data:
        data = [side.outputs.md5.get(RAW) for side in (a, b)]
    return Inputs(
        code=tuple(name for name in files if name.endswith(".py")),
        files=tuple(name for name in files if not name.endswith(".py")),
        packages=packages,
        same_data=None if None in data else data[0] == data[1],
        same_adapter=_same_adapter(a, b),
    )


def _same_adapter(a: Side, b: Side) -> bool:
    made = [side.outputs.md5.get(ADAPTER_FOLDER) for side in (a, b)]
    if None not in made:
        return made[0] == made[1]
    return a.sha256 is not None and a.sha256 == b.sha256


def _files(lock: Mapping[str, Any]) -> dict[str, str]:
    """{file: md5} of what the stages up to evaluate read and no stage makes.

    compose is left out: what it read of conf/ is seen in the parameters.
    """
    if "evaluate" not in lock:
        return {}
    made = {out["path"] for entry in lock.values() for out in entry.get("outs", [])}
    above = ancestors("evaluate", lock) - {"compose"}
    deps = (dep for name in lock if name in above for dep in lock[name].get("deps", []))
    return {dep["path"]: dep["md5"] for dep in deps if dep["path"] not in made and "md5" in dep}


def _packages(lock: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ancestors("evaluate", lock) if "evaluate" in lock else ():
        found |= lock[name].get("params", {}).get(ENVIRONMENT, {})
    return {name: str(version) for name, version in sorted(found.items())}


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
