"""Find what differs between two results besides their parameters: code, packages, data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capas.compare.sides import ADAPTER_FOLDER, Side
from capas.core.code_digests import CODE, PACKAGE, STAGES, differing
from capas.core.codediff import between_digests
from capas.core.dag import ancestors
from capas.core.generated import ENVIRONMENT

RAW = "data/raw"
_CODE_FOLDERS = (f"{PACKAGE}/", f"{STAGES}/")


@dataclass(frozen=True)
class Inputs:
    """Inputs besides the parameters in which two results differ.

    Attributes:
        code: scripts and modules, or only scripts if git does not have both states.
        files: other input files.
        packages: {name: (version of A, version of B)}.
        same_data: whether both have the same training data; None if unknown.
        same_adapter: whether both have the same adapter.
    """

    code: tuple[str, ...]
    files: tuple[str, ...]
    packages: dict[str, tuple[str, str]]
    same_data: bool | None
    same_adapter: bool

    @property
    def differ(self) -> bool:
        return bool(self.code or self.files or self.packages or self.same_data is False)


def differing_inputs(a: Side, b: Side, root: Path) -> Inputs:
    """Compare the inputs of two results of the repository `root`, as their dvc.lock files record them."""
    files = differing(_files(a.lock), _files(b.lock))
    one, other = _packages(a.lock), _packages(b.lock)
    packages = {name: (one.get(name, "–"), other.get(name, "–")) for name in differing(one, other)}
    data = [side.outputs.digest(f"{RAW}/train.parquet") for side in (a, b)]
    if None in data:
        data = [side.outputs.md5.get(RAW) for side in (a, b)]
    return Inputs(
        code=tuple(_differing_code(a, b, root)),
        files=tuple(files),
        packages=packages,
        same_data=None if None in data else data[0] == data[1],
        same_adapter=_same_adapter(a, b),
    )


def _same_adapter(a: Side, b: Side) -> bool:
    made = [side.outputs.md5.get(ADAPTER_FOLDER) for side in (a, b)]
    if None not in made:
        return made[0] == made[1]
    return a.sha256 is not None and a.sha256 == b.sha256


def _differing_code(a: Side, b: Side, root: Path) -> list[str]:
    """Return the code files that differ, or only the scripts if git does not have both states."""
    one, other = _code(a.lock), _code(b.lock)
    scripts = differing(one, other)
    if not scripts:
        return []
    if not one or not other:
        return [f"all, as the dvc.lock of {'A' if not one else 'B'} is older than {CODE}"]
    pairs = {script: (one.get(script, ""), other.get(script, "")) for script in scripts}
    files = between_digests(root, pairs, [side.commit for side in (a, b)])
    return files or [f"stages/{script}.py, or what it imports" for script in scripts]


def _code(lock: Mapping[str, Any]) -> dict[str, str]:
    """Return {script: digest of its code} of the stages up to evaluate."""
    above = ancestors("evaluate", lock) if "evaluate" in lock else set()
    found: dict[str, str] = {}
    for name in lock:
        if name in above:
            found |= lock[name].get("params", {}).get(CODE, {})
    return found


def _files(lock: Mapping[str, Any]) -> dict[str, str]:
    """Return {file: md5} of the files that the stages up to evaluate read and that no stage writes.

    compose is left out: what it reads from conf/ shows in the parameters. Code is left out too: before
    code.yaml, stages declared it as files.
    """
    if "evaluate" not in lock:
        return {}
    made = {out["path"] for entry in lock.values() for out in entry.get("outs", [])}
    above = ancestors("evaluate", lock) - {"compose"}
    deps = (dep for name in lock if name in above for dep in lock[name].get("deps", []))
    return {
        dep["path"]: dep["md5"]
        for dep in deps
        if dep["path"] not in made and "md5" in dep and not dep["path"].startswith(_CODE_FOLDERS)
    }


def _packages(lock: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ancestors("evaluate", lock) if "evaluate" in lock else ():
        found |= lock[name].get("params", {}).get(ENVIRONMENT, {})
    return {name: str(version) for name, version in sorted(found.items())}
