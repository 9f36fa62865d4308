"""List the stages that will run again, and why: `python -m capas.workspace.due`, compared with dvc.lock.

It compares commands, values, code and files as `dvc status` does, in a tenth of the time, and names the code
files that were edited. A stage whose outputs are in the run cache is restored instead of run; the run cache
is not checked here.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capas.core.code_digests import CODE, PACKAGE, STAGES, digests, name_of
from capas.core.codediff import edited_since
from capas.core.dag import StageSpec, command, md5, read_yaml, recorded
from capas.core.errors import CapasError, listed
from capas.core.params import ABSENT, flatten, lookup

_MOST = 4  # reasons shown for a stage
COMPOSE, ITS_CODE = "compose", "its code"
_CODE_DEPS = {PACKAGE, STAGES}  # dependencies of compose


@dataclass(frozen=True)
class Inputs:
    """The inputs with which a stage would run now: its command, {file: {key: value}} and {path: md5}."""

    cmd: str
    params: dict[str, dict[str, Any]]
    deps: dict[str, Any]

    @classmethod
    def read(
        cls, spec: StageSpec, root: Path, made: Mapping[str, str], code: Mapping[str, str]
    ) -> "Inputs":
        """Read the present inputs of a stage.

        Args:
            made: the recorded md5 of each output.
            code: the digest of each script's code as it is now, even if compose has not written it yet.
        """
        params = {file: _values(root / file, keys) for file, keys in spec.params.items()}
        if CODE in params:
            params[CODE] = {name_of(spec): code.get(name_of(spec), ABSENT)}
        deps = {dep: made[dep] if dep in made else _md5(root / dep) for dep in spec.deps}
        return cls(spec.cmd, params, deps)

    def differences(self, entry: Mapping[str, Any]) -> Iterator[str]:
        """Yield a phrase for each input that differs from the stage's entry in dvc.lock."""
        if command(entry) != self.cmd:
            yield "another command"
        for file, values in self.params.items():
            before = (entry.get("params") or {}).get(file, {})
            old, new = flatten(before), flatten(values)
            for key in dict.fromkeys([*new, *old]):
                was, becomes = old.get(key, ABSENT), new.get(key, ABSENT)
                if was != becomes and file == CODE:
                    yield ITS_CODE
                elif was != becomes:
                    yield f"{key} {_short(was)} -> {_short(becomes)}"
        before = {dep["path"]: dep["md5"] for dep in entry.get("deps", [])}
        yield from (dep for dep, found in self.deps.items() if before.get(dep) != found)
        yield from (f"{dep} is no longer read" for dep in before if dep not in self.deps)


def _values(file: Path, keys: list[str]) -> dict[str, Any]:
    """Return {dotted key: value}, or the whole file if no key is named."""
    values = read_yaml(file) if file.exists() else {}
    return {key: lookup(values, key) for key in keys} if keys else values


def _md5(path: Path) -> Any:
    try:
        return md5(path)
    except CapasError:
        return ABSENT


def _short(value: Any) -> str:
    text = "absent" if value is ABSENT else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def in_order(specs: Mapping[str, StageSpec]) -> list[StageSpec]:
    """Return the stages in an order in which each follows the stages whose outputs it reads."""
    makers = {out: spec.name for spec in specs.values() for out in spec.outs}
    ordered: dict[str, StageSpec] = {}

    def add(spec: StageSpec) -> None:
        for name in {makers[dep] for dep in _read(spec) if dep in makers} - {spec.name}:
            if name not in ordered:
                add(specs[name])
        ordered[spec.name] = spec

    for spec in specs.values():
        if spec.name not in ordered:
            add(spec)
    return list(ordered.values())


def _read(spec: StageSpec) -> list[str]:
    """Return the files that a stage reads, params files included."""
    return [*spec.deps, *spec.params]


def due(root: Path) -> dict[str, list[str]]:
    """Return {stage: reasons} of the stages that are due, in the order in which they run."""
    lock, specs, code = recorded(root), StageSpec.read_all(root), digests(root)
    edited = _edited_files(specs, lock, code, root)
    made = {out["path"]: out["md5"] for e in lock.values() for out in e.get("outs") or []}
    makers = {out: spec.name for spec in specs.values() for out in spec.outs}
    reasons: dict[str, list[str]] = {}
    for spec in in_order(specs):
        found = ["no record in dvc.lock"]
        if spec.name in lock:
            now = Inputs.read(spec, root, made, code)
            found = list(now.differences(lock[spec.name]))
            if ITS_CODE in found:
                found.remove(ITS_CODE)
                found += edited.get(spec.name) or [ITS_CODE]
        if gone := [out for out in spec.outs if not (root / out).exists()]:
            found.append(f"{gone[0]} is missing")
        before = {makers[dep] for dep in spec.deps if dep in makers} & reasons.keys()
        if _is_only_code(reasons.get(COMPOSE, [])):
            before -= {COMPOSE}  # it writes the same values again
        found += [f"after {name}" for name in reasons if name in before]
        if found:
            reasons[spec.name] = found
    return reasons


def _is_only_code(reasons: list[str]) -> bool:
    """Return whether compose is due only because code was edited, or not at all."""
    return {*reasons} <= _CODE_DEPS


def _edited_files(
    specs: Mapping[str, StageSpec], lock: Mapping[str, Any], code: Mapping[str, str], root: Path
) -> dict[str, list[str]]:
    """Return {stage: edited files of its code}, without stages whose recorded code git lacks."""
    states = {}
    for name, entry in lock.items():
        script = name_of(specs[name]) if name in specs else ""
        digest = (entry.get("params") or {}).get(CODE, {}).get(script)
        if digest and digest != code.get(script):
            states[name] = (script, digest)
    files = edited_since(root, {*states.values()})
    return {name: files[state] for name, state in states.items() if state in files}


def describe(root: Path) -> str:
    """Return a line for each stage that is due, or a sentence if none is."""
    found = due(root)
    if not found:
        return "No stage is due: all results are recorded in dvc.lock."
    lines = [f"  {name:16} {listed(reasons, _MOST)}" for name, reasons in found.items()]
    return "\n".join(["These stages will run again or be restored from the run cache:", *lines])


if __name__ == "__main__":
    try:
        sys.stdout.write(describe(Path.cwd()) + "\n")
    except CapasError as error:
        sys.exit(f"capas: {error}")
