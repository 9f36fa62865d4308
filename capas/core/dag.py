"""Read the stages in dvc.yaml and dvc.lock without importing DVC, which takes seconds."""

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
from capas.core.params import lookup, select

# What editors, file managers, merges and NFS leave; also in .dvcignore.
LEFT_BY_EDITORS = (
    *(".DS_Store", "._*", "Thumbs.db", "*.swp", ".*.sw?", "*~", ".#*", "#*#", "4913"),
    *("*.orig", "*.rej", "*.bak", ".nfs*", ".*.partial"),
)
COMPILED = "__pycache__"  # also in .dvcignore


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A YAML loader that reads 1e-08 as a number, like YAML 1.2, OmegaConf and DVC; PyYAML reads a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file gives an empty mapping.

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
    """Return the mapping in a YAML text; an empty text gives an empty mapping.

    Args:
        name: the text's name in error messages.

    Raises:
        CapasError: the text is not YAML, or not a mapping.
    """
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise CapasError(f"{name} is not valid YAML: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise CapasError(f"{name} must hold a mapping, not {type(content).__name__}")
    return content or {}


_FAMILY = {"foreach", "matrix"}


def command(entry: Mapping[str, Any]) -> str:
    """Return the command of a stage in dvc.yaml or dvc.lock; of several, one a line."""
    cmd = entry["cmd"]
    return cmd if isinstance(cmd, str) else "\n".join(cmd)


@dataclass(frozen=True)
class StageSpec:
    """One stage of dvc.yaml; `params` maps each params file to the declared dotted keys."""

    name: str
    cmd: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: dict[str, list[str]]

    @property
    def keys(self) -> list[str]:
        """The declared dotted keys of params.yaml."""
        return self.params.get("params.yaml", [])

    @classmethod
    def read(cls, name: str, root: Path) -> "StageSpec":
        """Return the stage of that name in dvc.yaml.

        Raises:
            CapasError: dvc.yaml has no such stage.
        """
        stages = cls.read_all(root)
        if name not in stages:
            raise CapasError(f"dvc.yaml has no stage '{name}'; it has: {', '.join(stages)}")
        return stages[name]

    @classmethod
    def read_all(cls, root: Path) -> dict[str, "StageSpec"]:
        """Return {name: stage}, in the order of dvc.yaml, without its families (foreach, matrix)."""
        return {
            name: cls(
                name=name,
                cmd=command(entry),
                deps=tuple(entry.get("deps", [])),
                outs=tuple(_declared_outs(entry)),
                params=_declared_params(entry.get("params", [])),
            )
            for name, entry in read_yaml(root / "dvc.yaml")["stages"].items()
            if not _FAMILY & entry.keys()
        }

    def values(self, root: Path) -> dict[str, dict[str, Any]]:
        """Return {params file: declared values, nested} with the current values.

        Raises:
            CapasError: a params file or a declared key is missing.
        """
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
            declared.setdefault(file, []).extend(keys or [])  # no keys mean the whole file
    return declared


def recorded(root: Path) -> dict[str, Any]:
    """Return the stages of dvc.lock, or none if nothing has run yet."""
    lock = root / "dvc.lock"
    stages: dict[str, Any] = read_yaml(lock).get("stages", {}) if lock.exists() else {}
    return stages


def ancestors(stage: str, lock: Mapping[str, Any]) -> set[str]:
    """Return the stage and all stages whose outputs it depends on, according to dvc.lock."""
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
    """Return a key of a stage's inputs, known before it runs: of command, params, and deps by content hash.

    It equals `recorded_key` of the stage's entry in dvc.lock once DVC has recorded the stage. Outputs of
    other stages are not hashed again, because DVC has just recorded their md5.

    Raises:
        CapasError: a dep is missing, or a folder that an earlier stage makes is not recorded yet.
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
    """Return the key of a stage's inputs from its entry in dvc.lock: see `input_key`."""
    deps = {dep["path"]: dep["md5"] for dep in entry.get("deps", [])}
    return digest(command(entry), entry.get("params", {}), deps)


def _leaves(values: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """Return the values by dotted key, {'trainer.seed': 0}, as in dvc.lock."""
    return {key: lookup(values, key) for key in keys} if keys else values


def md5(path: Path, made: Collection[str] = ()) -> str:
    """Return DVC's md5 of a file, or of a folder that no stage makes (data/own).

    Raises:
        CapasError: there is no such file, it is a broken link, or a folder that a stage makes.
    """
    if path.is_file():
        with path.open("rb") as content:
            return hashlib.file_digest(content, _plain_md5).hexdigest()
    if path.is_symlink() and not path.exists():
        raise CapasError(f"{path} is a link to {path.readlink()}, which does not exist. Remove it")
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
    """Return the relative paths of the files below a folder that DVC sees; it follows no links to folders."""
    return [
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        if Path(parent).name != COMPILED
        for name in names
        if not is_left_over(name)
    ]


def is_left_over(name: str) -> bool:
    """Return whether an editor left a file of this name, which DVC ignores."""
    return any(fnmatch(name, pattern) for pattern in LEFT_BY_EDITORS)


def digest(*parts: Any) -> str:
    """Return a digest of JSON values, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
