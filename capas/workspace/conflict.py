"""Resolve git conflicts in generated files: the values of conf/ decide, and the rest is made again.

It works wherever git leaves unmerged files (merge, rebase, cherry-pick, `stash pop`, `apply --3way`), and
where conflict markers were committed by mistake. In this order:

1. Conflicts in files that people write are left to them: they are listed, and nothing else is done.
2. conf/overrides.yaml and conf/revisions.yaml are merged key by key. A key with two values is listed, too.
3. compose writes params.yaml, code.yaml and environment.yaml.
4. For each stage, dvc.lock takes the entry of the side whose inputs equal the present ones, if there is one;
   `dvc repro` runs the other stages. The reports that git tracks then follow the entries.
"""

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from capas.config.composition import edited_values
from capas.config.kept_overrides import difference, parse, render
from capas.config.pins import Pins
from capas.core import lockfile
from capas.core.code_digests import digests
from capas.core.dag import StageSpec, parse_yaml
from capas.core.errors import CapasError
from capas.core.files import write_whole
from capas.core.generated import (
    BY_KEY,
    COMPOSED,
    LOCK,
    OVERRIDES,
    PARAMS,
    READ_BY_COMMANDS,
    REVISIONS,
    SCHEMAS,
    is_generated,
    uncached,
)
from capas.core.worktree import git, git_bytes
from capas.workspace.due import Inputs, in_order

_OTHER_SIDES = ("MERGE_HEAD", "REBASE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "refs/stash")
_MARKER = b"<<<<<<< "
_CONFLICT = re.compile(
    r"^<<<<<<< [^\n]*\n(?P<ours>.*?)(?:^\|{7} [^\n]*\n(?P<base>.*?))?"
    r"^=======\n(?P<theirs>.*?)^>>>>>>> [^\n]*\n",
    re.MULTILINE | re.DOTALL,
)
_STATES = {  # by whether our side and their side have the file
    (False, True): "deleted on our side, changed on theirs",
    (True, False): "changed on our side, deleted on theirs",
    (True, True): "changed on both sides",
}


class Sides(NamedTuple):
    """The versions of a file: the common ancestor's, HEAD's and the incoming one; None if it has no file."""

    base: bytes | None
    ours: bytes | None
    theirs: bytes | None

    def text(self, which: str) -> str:
        return (getattr(self, which) or b"").decode(errors="replace")


def find(root: Path) -> dict[str, Sides]:
    """Return {path: its sides} of the files with a conflict below `root`."""
    listing = git_bytes(root, "ls-files", "--unmerged", "-z", check=False).decode(
        errors="surrogateescape"
    )
    objects: dict[str, dict[str, str]] = {}
    for facts, _, path in (entry.partition("\t") for entry in listing.split("\0") if entry):
        _, found, number = facts.split()
        objects.setdefault(path, {})[number] = found
    sides = {path: Sides(*(_blob(root, of.get(n)) for n in "123")) for path, of in objects.items()}
    for path in READ_BY_COMMANDS:
        if path not in sides and (marked := _marked_sides(root / path)):
            sides[path] = marked
    return sides


def _blob(root: Path, name: str | None) -> bytes | None:
    return git_bytes(root, "cat-file", "blob", name) if name else None


def _marked_sides(file: Path) -> Sides | None:
    """Return the sides of a file with conflict markers, or None if it has none."""
    content = file.read_bytes() if file.exists() else b""
    if _MARKER not in content:
        return None
    text = content.decode(errors="replace")
    found = (_CONFLICT.sub(lambda m, side=side: m[side] or "", text) for side in Sides._fields)  # type: ignore[misc]
    return Sides(*(side.encode() for side in found))


def in_own_files(root: Path, found: Mapping[str, Sides]) -> list[str]:
    """Return a line for each conflict in a file that people write."""
    return [
        f"{path}: {_state(root, path, found[path])}" for path in found if not is_generated(path)
    ]


def _state(root: Path, path: str, sides: Sides) -> str:
    file = root / path
    text = file.read_bytes() if file.is_file() else b""
    line = text[: text.index(_MARKER)].count(b"\n") + 1 if _MARKER in text else 0
    where = f", line {line}" if line else ""
    hint = "; `make lock` makes it from pyproject.toml" if path == "requirements.lock" else ""
    return _STATES.get((sides.ours is not None, sides.theirs is not None), "deleted") + where + hint


def resolve(root: Path, found: Mapping[str, Sides], prefer: str | None) -> list[str]:
    """Resolve the conflicts in generated files, and return sentences about it.

    Args:
        found: the result of `find`, without files that people write.
        prefer: 'ours' or 'theirs', for a key that has two values.

    Raises:
        CapasError: a key has two values and `prefer` is None, or conf/ does not compose; nothing is lost.
    """
    sentences, merged = [], {}
    for path in BY_KEY:
        if _needs_merge(root, path, found):
            merged[path], lines = _merge_keys(root, path, found, prefer)
            sentences += lines
    for path, text in merged.items():
        write_whole(root / path, text)
    _mark_resolved(root, [path for path in BY_KEY if path in found or path in merged])
    if PARAMS in found or not _is_yaml(root / PARAMS):
        (root / PARAMS).unlink(missing_ok=True)
    compose(root, "--force")
    if any(is_generated(path) and Path(path).match(SCHEMAS) for path in found):
        compose(root, "--schema")
    lock, chosen = _choose_entries(root, _locks(root, found))
    if lock:
        write_whole(root / LOCK, lock)
        sentences.append(chosen)
    reports = _reports(root, lock, found)
    for path, content in reports.items():
        _write(root / path, content)
    _mark_resolved(root, [*found, *reports, *COMPOSED, LOCK])
    return [f"resolved: {', '.join(sorted(found))}", *sentences]


def compose(root: Path, option: str) -> None:
    """Run compose with the code as it is now on disk.

    Raises:
        CapasError: compose failed.
    """
    command = [sys.executable, "stages/compose_params.py", option]
    done = subprocess.run(command, cwd=root, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CapasError(f"{done.stderr.strip()}\nFix conf/, then run `capas restore` again")
    sys.stderr.write(done.stderr)


def _is_yaml(file: Path) -> bool:
    try:
        parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError, CapasError):
        return False
    return True


# conf/overrides.yaml and conf/revisions.yaml


def _needs_merge(root: Path, path: str, found: Mapping[str, Sides]) -> bool:
    """Return whether the file has a conflict that was not resolved in an editor."""
    if path not in found:
        return path == OVERRIDES and bool(_edited_sides(found))
    here = (root / path).read_bytes() if (root / path).exists() else None
    return here in found[path] or _MARKER in (here or b"")


def _merge_keys(
    root: Path, path: str, found: Mapping[str, Sides], prefer: str | None
) -> tuple[str, list[str]]:
    """Return the merged text, and a sentence for each key that both sides set."""
    whole = (root / path).read_bytes() if (root / path).exists() else b""
    sides = found.get(path, Sides(whole, whole, whole))
    read_keys = _override_keys if path == OVERRIDES else _revision_keys
    base, ours, theirs = (read_keys(sides.text(which)) for which in Sides._fields)
    if path == OVERRIDES:
        edits = _edited_sides(found)
        ours, theirs = ours | edits.get("ours", {}), theirs | edits.get("theirs", {})
    merged, both = _three_way(base, ours, theirs)
    if both and prefer is None:
        lines = [
            f"  {k}: {_shown(ours, k)} (ours, HEAD) or {_shown(theirs, k)} (theirs)" for k in both
        ]
        raise CapasError(
            "\n".join([f"{path}: both sides of the merge set a value; choose one:", *lines])
            + "\nRun: capas restore --ours   or: capas restore --theirs   (for all of these keys)"
        )
    side = ours if prefer == "ours" else theirs
    for key in both:
        merged.pop(key, None)
        if key in side:
            merged[key] = side[key]
    text = _override_text(merged) if path == OVERRIDES else _revision_text(merged)
    return text, [f"{path}: {key} is {_shown(side, key)}" for key in both]


def _three_way(
    base: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the merged keys, and the keys that both sides changed to different values."""
    absent = object()
    merged, both = dict(ours), []
    for key in {**theirs, **base, **ours}:
        was, here, there = (side.get(key, absent) for side in (base, ours, theirs))
        if there in (was, here) and type(there) in (type(was), type(here)):
            continue
        if here != was:
            both.append(key)
        elif there is absent:
            del merged[key]
        else:
            merged[key] = there
    return merged, both


def _shown(side: Mapping[str, Any], key: str) -> str:
    return str(side[key]) if key in side else "not set"


def _override_keys(text: str) -> dict[str, Any]:
    """Return the overrides by key: {'model=': 'tiny', 'lora.r': 8}."""
    choices, leaves = parse(text)
    return {**{f"{group}=": option for group, option in choices.items()}, **leaves}


def _override_text(keys: Mapping[str, Any]) -> str:
    choices = {key[:-1]: value for key, value in keys.items() if key.endswith("=")}
    return render(choices, {key: value for key, value in keys.items() if not key.endswith("=")})


def _revision_keys(text: str) -> dict[str, Any]:
    r"""Return {'models\norg/x@main': commit}; an entry may hold any character other than the newline."""
    sections = parse_yaml(text, REVISIONS)
    return {
        f"{name}\n{entry}": pin for name, pins in sections.items() for entry, pin in pins.items()
    }


def _revision_text(keys: Mapping[str, Any]) -> str:
    sections: dict[str, dict[str, str]] = {}
    for key, pin in keys.items():
        name, _, entry = key.partition("\n")
        sections.setdefault(name, {})[entry] = pin
    return Pins(sections, Path()).dump()


def _edited_sides(found: Mapping[str, Sides]) -> dict[str, dict[str, Any]]:
    """Return {'ours': {key: value}} of the sides whose params.yaml was edited, so that no edit is lost."""
    if PARAMS not in found:
        return {}
    sides = found[PARAMS]
    edited = {which: edited_values(sides.text(which)) for which in ("ours", "theirs")}
    base = parse_yaml(sides.text("base"), PARAMS)
    return {
        which: difference(values, base) for which, values in edited.items() if values is not None
    }


# dvc.lock and reports


def _locks(root: Path, found: Mapping[str, Sides]) -> list[str]:
    """Return the versions of dvc.lock whose entries may be used, the preferred one first."""
    here = (root / LOCK).read_text(encoding="utf-8") if (root / LOCK).exists() else ""
    if LOCK in found:
        sides = found[LOCK]
        return [sides.text("ours"), sides.text("theirs"), sides.text("base")]
    others = (_committed(root, side, LOCK) for side in ("HEAD", *_other_sides(root)))
    return [here, *(other.decode(errors="replace") for other in others if other is not None)]


def _other_sides(root: Path) -> Iterator[str]:
    for name in _OTHER_SIDES:
        if git(root, "rev-parse", "-q", "--verify", f"{name}^{{commit}}", check=False):
            yield name


def _committed(root: Path, commit: str, path: str) -> bytes | None:
    listed = git(root, "ls-tree", commit, "--", path, check=False)
    return git_bytes(root, "show", f"{commit}:./{path}") if listed else None


def _choose_entries(root: Path, locks: list[str]) -> tuple[str, str]:
    """Return the dvc.lock whose entries match the workspace, and a sentence about it."""
    specs, code = StageSpec.read_all(root), digests(root)
    pieces = [lockfile.split(lock) for lock in locks]
    made: dict[str, str] = {}
    chosen: lockfile.Pieces = {}
    fitting = []
    for spec in in_order(specs):
        versions = [versions[spec.name] for versions in pieces if spec.name in versions]
        candidates = [piece for piece in versions if not lockfile.flaw(piece, spec)]
        if not candidates:
            continue
        now = Inputs.read(spec, root, made, code)
        fits = [p for p in candidates if not any(now.differences(lockfile.entry(p) or {}))]
        chosen[spec.name] = (fits or candidates)[0]
        fitting += [spec.name] if fits else []
        entry = lockfile.entry(chosen[spec.name]) or {}
        made |= {out["path"]: out["md5"] for out in entry.get("outs", [])}
    order = [name for name in dict.fromkeys(n for p in pieces for n in p) if name in chosen]
    count = f"{len(fitting)} of {len(specs)} stages"
    return (
        lockfile.join({name: chosen[name] for name in order}),
        f"{LOCK} keeps the results of {count}; `dvc repro` runs the others",
    )


def _reports(root: Path, lock: str, found: Mapping[str, Sides]) -> dict[str, bytes | None]:
    """Return {path: content} of the tracked outputs that differ from the lock; None removes the file."""
    entries = [lockfile.entry(piece) or {} for piece in lockfile.split(lock).values()]
    wanted = {out["path"]: out["md5"] for entry in entries for out in entry.get("outs") or []}
    declared = set(uncached(root)) - {*COMPOSED}
    written: dict[str, bytes | None] = {}
    for path in sorted({p for p in found if p.startswith("reports/")} | declared):
        here = (root / path).read_bytes() if (root / path).is_file() else None
        if path not in found and (here is None or _md5(here) == wanted.get(path)):
            continue
        versions = [here, *found.get(path, _versions(root, path))]
        there = [v for v in versions if v is not None and _md5(v) == wanted.get(path)]
        if there:
            written[path] = there[0]
        elif path in found:
            written[path] = next(
                (v for v in found[path][1:] if v is not None and path in declared), None
            )
    return written


def _versions(root: Path, path: str) -> Iterable[bytes | None]:
    return (_committed(root, side, path) for side in ("HEAD", *_other_sides(root)))


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _write(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _mark_resolved(root: Path, paths: Iterable[str]) -> None:
    """Stage the files as they are now, and the removal of those that are gone."""
    known = git_bytes(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    wanted = set(paths) & set(known.decode(errors="surrogateescape").split("\0"))
    if wanted:
        git(root, "add", "--all", "--", *sorted(wanted))
