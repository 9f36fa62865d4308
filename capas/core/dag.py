"""What dvc.yaml declares and dvc.lock recorded, read without importing DVC (it costs seconds)."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from capas.core.errors import CapasError
from capas.core.params import select

LEFT_BY_EDITORS = (".DS_Store", "*.swp", "*~", ".*.partial")  # as .dvcignore has it
COMPILED = "__pycache__"  # likewise


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads 1e-08 as a number, as YAML 1.2, OmegaConf and DVC do; PyYAML takes it for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; an empty file is an empty mapping.

    Raises:
        CapasError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise CapasError(
            f"{path} is missing; run `dvc repro` in the repository's top folder"
        ) from None
    except UnicodeDecodeError as error:
        raise CapasError(f"{path} is not valid YAML: {error}") from None


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """As `read_yaml`; `name` is what an error calls it."""
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise CapasError(f"{name} is not valid YAML: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise CapasError(f"{name} must hold a mapping, not {type(content).__name__}")
    return content or {}


@dataclass(frozen=True)
class StageSpec:
    """One stage of dvc.yaml. `params` maps a params file to the dotted keys that are declared."""

    name: str
    cmd: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: dict[str, list[str]]

    @property
    def keys(self) -> list[str]:
        """The dotted keys of params.yaml that it declares."""
        return self.params.get("params.yaml", [])

    @classmethod
    def read(cls, name: str, root: Path) -> "StageSpec":
        """Raises CapasError where dvc.yaml has no such stage."""
        stages = cls.read_all(root)
        if name not in stages:
            raise CapasError(f"dvc.yaml has no stage '{name}'; it has: {', '.join(stages)}")
        return stages[name]

    @classmethod
    def read_all(cls, root: Path) -> dict[str, "StageSpec"]:
        """By name, in the order of dvc.yaml."""
        return {
            name: cls(
                name=name,
                cmd=entry["cmd"],
                deps=tuple(entry.get("deps", [])),
                outs=tuple(_declared_outs(entry)),
                params=_declared_params(entry.get("params", [])),
            )
            for name, entry in read_yaml(root / "dvc.yaml")["stages"].items()
        }

    def values(self, root: Path) -> dict[str, dict[str, Any]]:
        """{params file: declared values, nested} as they stand now."""
        return {
            file: select(read_yaml(root / file), keys, file) if keys else read_yaml(root / file)
            for file, keys in self.params.items()
        }


def _declared_outs(entry: dict[str, Any]) -> list[str]:
    outs = [out for kind in ("outs", "metrics", "plots") for out in entry.get(kind, [])]
    return [out if isinstance(out, str) else next(iter(out)) for out in outs]


def _declared_params(entries: list[Any]) -> dict[str, list[str]]:
    declared: dict[str, list[str]] = {}
    for entry in entries:
        for file, keys in (entry if isinstance(entry, dict) else {"params.yaml": [entry]}).items():
            declared.setdefault(file, []).extend(keys or [])  # no keys: the whole file
    return declared


def recorded(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock; none where nothing ran yet."""
    lock = root / "dvc.lock"
    stages: dict[str, Any] = read_yaml(lock).get("stages", {}) if lock.exists() else {}
    return stages


def ancestors(stage: str, lock: Mapping[str, Any]) -> set[str]:
    """Return the stage itself and all whose outputs it rests on, by the entries of dvc.lock."""
    makers = {out["path"]: name for name, entry in lock.items() for out in entry.get("outs", [])}
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            deps = (dep["path"] for dep in lock[name].get("deps", []))
            waiting += [makers[dep] for dep in deps if dep in makers]
    return found


def input_key(spec: StageSpec, root: Path) -> str:
    """Identity of a stage's inputs, known before it runs: command, params, content hash of each dep.

    Equal to `recorded_key` of the stage's dvc.lock entry once DVC has recorded it. Outputs of other
    stages are not hashed again: DVC has just recorded their md5.

    Raises:
        CapasError: a dep that is a folder is not recorded, because the stage was run out of order.
    """
    known = {
        out["path"]: out["md5"]
        for entry in recorded(root).values()
        for out in entry.get("outs", [])
    }
    entries = read_yaml(root / "dvc.yaml")["stages"].values()
    made = {out for entry in entries for out in _declared_outs(entry)}
    deps = {dep: known[dep] if dep in known else md5(root / dep, made) for dep in spec.deps}
    params = {
        file: _leaves(values, spec.params[file]) for file, values in spec.values(root).items()
    }
    return digest(spec.cmd, params, deps)


def recorded_key(entry: dict[str, Any]) -> str:
    """The same identity, from a stage's entry in dvc.lock."""
    deps = {dep["path"]: dep["md5"] for dep in entry.get("deps", [])}
    return digest(entry["cmd"], entry.get("params", {}), deps)


def _leaves(values: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """{'trainer.seed': 0}: keyed as dvc.lock keys them."""
    leaves = {} if keys else dict(values)
    for dotted in keys:
        node: Any = values
        for part in dotted.split("."):
            node = node[part]
        leaves[dotted] = node
    return leaves


def md5(path: Path, made: Collection[str] = ()) -> str:
    """Of a file, or of a folder that no stage makes (data/own), as DVC has it.

    Raises:
        CapasError: there is no such file, or it is a folder that a stage makes.
    """
    if path.is_file():
        with path.open("rb") as content:
            return hashlib.file_digest(content, _plain_md5).hexdigest()
    if not path.is_dir() or any(path.match(out) for out in made):
        raise CapasError(
            f"{path} is not in dvc.lock: an earlier stage has not run yet. Run `dvc repro`"
        )
    entries = [{"md5": md5(path / name), "relpath": name} for name in sorted(_files_below(path))]
    listed = json.dumps(entries, sort_keys=True).encode()
    return f"{hashlib.md5(listed, usedforsecurity=False).hexdigest()}.dir"


def _plain_md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


def _files_below(folder: Path) -> list[str]:
    """Their paths in it, as DVC sees it: it does not follow links to folders."""
    return [
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        if Path(parent).name != COMPILED
        for name in names
        if not any(fnmatch(name, pattern) for pattern in LEFT_BY_EDITORS)
    ]


def digest(*parts: Any) -> str:
    """Of values that JSON can hold, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
