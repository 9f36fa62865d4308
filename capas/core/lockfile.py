"""Repair a truncated dvc.lock as text, one piece per stage; pieces are kept or left out, never mixed.

DVC writes the file in place, so SIGKILL can leave it empty or truncated. Leaving out a stage loses nothing:
`dvc repro` restores its outputs from the run cache, or runs it.
"""

import re
from collections.abc import Mapping
from typing import Any

from capas.core.dag import StageSpec, command, parse_yaml
from capas.core.errors import CapasError
from capas.core.generated import LOCK

_HEADER = "schema: '2.0'\nstages:\n"
_STAGE = re.compile(r"^  (?=[^\s#])(?P<name>[^\n]+?):\n", re.MULTILINE)
_TOP_LEVEL = re.compile(r"^(?=\S)", re.MULTILINE)
_MD5 = re.compile(r"[0-9a-f]{32}(?P<folder>\.dir)?")
Pieces = dict[str, str]  # {stage: its lines, including the line of its name}


def split(text: str) -> Pieces:
    """Return the pieces of a dvc.lock, complete or not."""
    _, header, body = text.partition("stages:\n")
    body = _TOP_LEVEL.split(body, 1)[0]
    starts = list(_STAGE.finditer(body)) if header else []
    ends = (*(start.start() for start in starts[1:]), len(body))
    return {s["name"]: body[s.start() : end] for s, end in zip(starts, ends, strict=False)}


def join(pieces: Pieces) -> str:
    """Return the text of a dvc.lock, as DVC writes it."""
    return _HEADER + "".join(pieces.values()) if pieces else ""


def entry(piece: str) -> dict[str, Any] | None:
    """Return the stage's entry in a piece, or None if the piece is not YAML or not a mapping."""
    try:
        (found,) = parse_yaml(piece, LOCK).values()
    except (CapasError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def flaw(piece: str, spec: StageSpec | None, is_last: bool = True) -> str:
    """Return the reason why a piece is incomplete, or an empty text if it is complete.

    Args:
        spec: the stage as dvc.yaml declares it now, or None if it declares no such stage.
        is_last: whether the file ends with this piece. In the middle of a file a stage without one of its
            outputs was not truncated: it ran before dvc.yaml declared that output, so DVC runs it again.
    """
    found = entry(piece)
    if found is None or not piece.endswith("\n"):
        return "truncated"
    if not isinstance(found.get("cmd"), str | list):
        return "no command"
    for kind in ("deps", "outs"):
        for item in found.get(kind) or []:
            if not _is_whole(item):
                return f"{_path(item)} has no md5 or size"
    if spec is None or spec.cmd != command(found) or not is_last:
        return ""
    recorded = {item["path"] for item in found.get("outs") or []}
    missing = [path for path in spec.outs if path not in recorded]
    return f"{', '.join(missing)} missing" if missing else ""


def _is_whole(item: Any) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("path"), str):
        return False
    md5 = _MD5.fullmatch(str(item.get("md5")))
    counts = ("size", "nfiles") if md5 and md5["folder"] else ("size",)
    return md5 is not None and all(isinstance(item.get(count), int) for count in counts)


def _path(item: Any) -> str:
    return str(item.get("path", "an entry")) if isinstance(item, dict) else "an entry"


def heal(text: str, committed: str, specs: Mapping[str, StageSpec]) -> tuple[str, list[str]]:
    """Return a valid dvc.lock, and the list of problems of `text`, empty if there were none.

    The returned text is empty if no stage is left.

    Args:
        committed: the last commit's dvc.lock, which replaces incomplete stages; empty if there is none.
    """
    here, there = split(text), split(committed)
    last = next(reversed(here), None)
    flaws = {n: flaw(piece, specs.get(n), n == last) for n, piece in here.items()}
    whole = {name: piece for name, piece in here.items() if not flaws[name]}
    lost = [name for name in there if name in specs and name not in here]
    problems = [
        f"{LOCK}: the entry of {n} is incomplete: {reason}" for n, reason in flaws.items() if reason
    ]
    if lost:
        problems.append(f"{LOCK}: the entries of {', '.join(lost)} are missing")
    if not here or join(here) != text:
        if not problems and _is_lock(text):
            return text, []  # a valid file in another layout than DVC's
        problems = [f"{LOCK} was truncated or overwritten"]
    if not problems:
        return text, []
    for name, piece in there.items():
        if name in specs and name not in whole and not flaw(piece, specs[name]):
            whole[name] = piece
    return join(whole), problems


def _is_lock(text: str) -> bool:
    try:
        found = parse_yaml(text, LOCK)
    except CapasError:
        return False
    stages = found.get("stages")
    return isinstance(stages, dict) and all(isinstance(entry, dict) for entry in stages.values())
