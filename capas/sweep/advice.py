"""Say what to try next after a sweep, with the command where there is one."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from capas.config.hydra_overrides import key_of
from capas.sweep.ranking import Row, comparison, num_looked_at, whole
from capas.sweep.remarks import Swept, remarks
from capas.sweep.wording import rounded, say

COMMAND = ("python", "stages/sweep.py", "-m")
_MAX_ROWS = 5  # that lack trials, each with its command


class Step(NamedTuple):
    """A sentence, and the command that follows from it, or ""."""

    text: str
    command: str = ""


def next_steps(
    rows: Sequence[Row],
    settings: dict[str, Any],
    swept: Swept,
    words: Sequence[str],
    searches: bool,
    code: str,
) -> list[Step]:
    """Return what to try next: missing seeds first, then seeds for all, then other values."""
    steps = [*_missing(rows, code), *_seeds(rows, settings, words, searches, code)]
    steps += _power(rows, settings, code)
    return steps + [Step(text) for text in remarks(rows, settings, swept, code)]


def command(words: Sequence[str]) -> str:
    return shlex.join([*COMMAND, *words])


def _missing(rows: Sequence[Row], code: str) -> Iterator[Step]:
    lacking = [row for row in rows if row.missing and any(row.missing)]
    for row in lacking[:_MAX_ROWS]:
        absent = [" ".join(replicate) for replicate in row.missing if replicate]
        text = say(code, "next.missing", experiment=row.name, absent=absent)
        yield Step(text, command([*row.overrides, *_merged(row.missing)]))


def _merged(replicates: Sequence[Sequence[str]]) -> list[str]:
    """Return overrides that run all replicates: [["seed=1"], ["seed=2"]] -> ["seed=1,2"]."""
    values: dict[str, list[str]] = {}
    for word in (word for replicate in replicates for word in replicate):
        key, _, value = word.partition("=")
        values.setdefault(key, []).append(value)
    return [f"{key}={','.join(dict.fromkeys(found))}" for key, found in values.items()]


def _seeds(
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    words: Sequence[str],
    searches: bool,
    code: str,
) -> Iterator[Step]:
    """Yield the command that repeats single trials; of a search, that of the best one and of conf/."""
    if not settings["replicates"] or any(len(row.values) > 1 for row in rows):
        return
    key = settings["replicates"][0]
    if searches or num_looked_at(rows) == 1:
        words = rows[0].overrides
    others = [word for word in words if key_of(word) != key]
    text = say(code, "next.repeat_best" if searches else "next.repeat", name=key)
    yield Step(text, command([*others, f"{key}=1,2,3"]))


def _power(rows: Sequence[Row], settings: dict[str, Any], code: str) -> Iterator[Step]:
    """Yield the gain that would have been shown, and the seeds that would show a smaller one."""
    found = comparison(rows, settings)
    if found is None or found.detectable is None or (found.least_gain or 0) > 0:
        return
    from capas.sweep.comparison import seeds_to_show

    confidence, seeds = settings["confidence_fraction"], len(whole(rows)[0].values)
    facts: dict[str, Any] = {"objective": settings["objective"], "name": settings["replicates"][0]}
    half, seen = found.detectable / 2, found.gain
    yield Step(
        say(
            *(code, "next.power"),
            **facts,
            seeds=seeds,
            detectable=rounded(found.detectable),
            half=rounded(half),
            for_half=seeds_to_show(half, found, confidence),
        )
    )
    if seen is not None and 0 < seen < found.detectable:
        needed = seeds_to_show(seen, found, confidence)
        yield Step(say(code, "next.seen", **facts, gain=rounded(seen), needed=needed))
