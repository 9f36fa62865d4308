"""Check Hydra overrides before anything is composed for a run: `check(["lora.rank=8", "lora=all_liner"])`.

Hydra stops at the first override that it cannot use, and suggests prefixes instead of the key that was meant.
Here each override is checked by itself, then all of them together, and all problems are reported at once:

    lora.rank: no such key; did you mean lora.r?
    lora=all_liner: no such option; did you mean all_linear?

All entry points use this one check: compose, the command line of a stage, sweeps, `capas memory`,
`capas check` and the plugin of `dvc exp run`.
"""

import itertools
import math
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from capas.config.composition import (
    CONF,
    Values,
    failures,
    is_group,
    meant,
    reasons,
    to_values,
    with_new_keys,
    word_given,
)  # fmt: skip
from capas.config.json_schema import leaves_schema
from capas.config.options import options_of
from capas.config.problems import Problem
from capas.config.requirements import lacking
from capas.config.schema import GROUPS, Group
from capas.config.validation import find_problems, nearest
from capas.core.params import flatten

SWEEP = "sweep"  # the group of conf/ that only a sweep uses
MAX_COMBINATIONS = 500  # beyond this, each value is checked alone, which takes seconds
_OPENING = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Point:
    """A combination of values: its overrides, and the whole configuration."""

    overrides: tuple[str, ...]
    values: Values


@dataclass
class Checked:
    """The problems found, and the valid combinations in the order in which Hydra runs them."""

    problems: list[Problem] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)


def check(
    overrides: Sequence[str],
    conf: Path = CONF,
    *,
    several: bool = False,
    reads: Collection[str] = (),
) -> list[Problem]:
    """Return every problem of the overrides, and of conf/ itself; nothing is written.

    Args:
        several: allow several values, as in `lora.r=8,16`, and check each combination.
        reads: dotted keys read by the stages that will run on this machine, which must have the resources
            that these keys request. Empty if the stages run elsewhere, or later.
    """
    return check_points(overrides, conf, several=several, reads=reads).problems


def check_points(
    overrides: Sequence[str],
    conf: Path = CONF,
    *,
    several: bool = False,
    reads: Collection[str] = (),
    groups: Mapping[str, type[Group]] = GROUPS,
    combine: bool = True,
    limit: float = MAX_COMBINATIONS,
    composer: "Composer | None" = None,
) -> Checked:
    """Return the problems, like `check`, and the combinations.

    Args:
        groups: groups of the schema. A sweep has one more; its overrides, and Hydra's own, belong to no
            combination.
        combine: False if a search chooses the values. Each value is then checked by itself, without rules
            between keys, and the only combination is that of the first values.
        limit: with more combinations, each value is checked by itself instead.
        composer: a composer of conf/ to reuse.
    """
    good, wrong, problems = _sort_out(overrides, conf, groups, several, combine)
    of_points = [o for o in good if not o.is_hydra_override() and _first(o.key_or_group) != SWEEP]
    is_doubtful = _doubts(wrong, of_points) if combine else lambda key: True
    combinations, composer = (
        list(_combinations(of_points, conf, combine, limit)),
        composer or Composer(conf),
    )
    fixed = set(combinations[0]).intersection(*combinations)
    found = {problem.message: problem for problem in problems}
    points = []
    for texts in combinations:
        values, wrong_here = _check_point(texts, conf, composer, is_doubtful)
        varied = [text for text in texts if text not in fixed]
        for problem in wrong_here:
            found.setdefault(problem.message, _located(problem, varied))
        if not wrong_here:
            points.append(Point(texts, values))
    problems = list(found.values())
    if reads and not problems:
        problems = _lacking_here(points, composer, reads)
    return Checked(problems, [] if problems else points if combine else points[:1])


def _sort_out(
    overrides: Sequence[str],
    conf: Path,
    groups: Mapping[str, type[Group]],
    several: bool,
    combine: bool,
) -> tuple[list[Any], list[str], list[Problem]]:
    """Check each override by itself; return those that compose, those that do not, and the problems."""
    parsed, wrong, problems = list[Any](), list[str](), list[Problem]()
    for text in overrides:
        override, found = _parse(text)
        if override is not None:
            found = [*_name_problems(override, conf, groups)]
            found += _value_problems(override, several, combine)
        problems += found
        if found:
            wrong.append(text)
        else:
            parsed.append(override)
    for group, twice in _chosen_twice(parsed, conf).items():
        given = [str(override.input_line) for override in twice]
        problems.append(Problem(group, "", f"{', '.join(given)}: choose one option of {group}"))
        wrong += given
    return [o for o in parsed if o.input_line not in wrong], wrong, problems


def _located(problem: Problem, varied: Sequence[str]) -> Problem:
    """Add the combination to a problem's message, if the problem's keys do not show it."""
    head = problem.message.partition(": ")[0]
    if not varied or any(f"{key_of(text)}=" in head for text in varied):
        return problem
    return replace(problem, message=f"{problem.message} (with {' '.join(varied)})")


def choices_of(text: str, conf: Path) -> list[str]:
    """Return one override for each value of an override with several; none if it cannot be parsed."""
    override, _ = _parse(text)
    return [] if override is None else _alternatives(override, conf)


def _parse(text: str) -> tuple[Any, list[Problem]]:
    """Return Hydra's parsed override, or None and a problem if Hydra's grammar refuses it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = text.partition("=")
    if not key.strip("+~ "):
        return None, [Problem("", value, f"{text}: write KEY=VALUE; the key is missing")]
    try:
        [override] = OverridesParser.create().parse_overrides([text])
    except HydraException:
        return None, [Problem(key, value, _syntax(text))]
    return override, []


def _syntax(text: str) -> str:
    """Return, as a sentence, why an override cannot be parsed."""
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text}: no value is given; write {text}=VALUE"
    if key != "".join(key.split()):
        return f"{text}: a key contains no spaces; write KEY=VALUE"
    if (left_open := _left_open(value)) is not None:
        return f"{text}: {left_open} is not closed"
    return (
        f"{text}: the value cannot be read. Quote a text with special characters, once for the shell and "
        f"once for Hydra: \"{key}='...'\""
    )


def _left_open(value: str) -> str | None:
    """Return the first quote or bracket that is not closed, or None."""
    stack: list[str] = []
    for character in value:
        if stack and stack[-1] in "'\"":
            if character == stack[-1]:
                stack.pop()
        elif character in "'\"" or character in _OPENING:
            stack.append(character)
        elif stack and character == _OPENING[stack[-1]]:
            stack.pop()
    return stack[-1] if stack else None


def _name_problems(
    override: Any, conf: Path, groups: Mapping[str, type[Group]]
) -> Iterator[Problem]:
    """Yield what is wrong with the key of an override, or with the option that it chooses."""
    key, text = override.key_or_group, str(override.input_line)
    written = text.partition("=")[2]
    if override.is_hydra_override() or _first(key) == SWEEP:
        if SWEEP not in groups:
            way = f"it goes with python stages/sweep.py -m {text}"
            yield Problem(
                key, written, f"{text}: sets how a sweep runs, and this is a single run; {way}"
            )
            return
        if override.is_hydra_override():
            return  # capas.sweep.task checks it against Hydra's own configuration
    if override.package is not None:
        way = f"write {key}={written}"
        yield Problem(
            key, written, f"{text}: @ would move the group to where no stage reads it; {way}"
        )
    elif is_group(key, conf):
        yield from _group_problems(override, conf, groups)
    elif (sentence := _key_problem(override, conf, groups)) is not None:
        yield Problem(key, "", sentence)


def _group_problems(
    override: Any, conf: Path, groups: Mapping[str, type[Group]]
) -> Iterator[Problem]:
    group, text = override.key_or_group, str(override.input_line)
    there = options_of(conf, group)
    shown = ", ".join(there)
    written = text.partition("=")[2]
    if override.is_delete():
        yield Problem(group, written, f"{text}: a group always needs an option: {shown}")
        return
    if override.is_force_add() or (override.is_add() and group in groups):
        yield Problem(group, written, f"{text}: choose the option as {group}={written}")
        return
    for option in _elements(override, there):
        if not isinstance(option, str):
            key = next((name for name in groups[group].model_fields if name != "preset"), None) if (
                group in groups
            ) else None  # fmt: skip
            way = f", or set one of its keys, as in {group}.{key}=VALUE" if key else ""
            sentence = f"{text}: {group} is a group; choose one of its options ({shown}){way}"
            yield Problem(group, written, sentence)
        elif option not in there:
            sentence = f"{group}={option}: no such option{meant(option, there, group)}"
            yield Problem(group, option, sentence)


def _elements(override: Any, there: list[str]) -> Iterator[Any]:
    """Yield the options that an override names; values other than words are yielded as they are."""
    if _is_glob(override):
        yield from override.value().filter(there) or [override.value().include[0]]
    elif override.is_interval_sweep():
        yield None
    elif override.is_sweep_override():
        yield from (text.strip("'\"") for text in override.sweep_string_iterator())
    else:
        value = override.value()
        yield value if isinstance(value, str | dict | list) or value is None else str(value)


def _key_problem(override: Any, conf: Path, groups: Mapping[str, type[Group]]) -> str | None:
    """Return a sentence on a key that does not exist or cannot be set this way, or None."""
    key, text = override.key_or_group, str(override.input_line)
    written = text.partition("=")[2]
    if "/" in key:
        dotted = key.replace("/", ".")
        if leaves_schema(dotted, groups) is None:
            return f"{text}: keys are written with dots; write {dotted}={written}"
        return f"{key}: no such group{nearest(dotted, groups)}"
    if (left := leaves_schema(key, groups)) is not None:
        path, name, _ = left
        if path and is_group(path, conf) and name in options_of(conf, path):
            return f"{text}: {name} is an option of the group {path}; write {path}={name}"
        noun = "key" if path or "." in key else "group or key"
        return f"{key}: no such {noun}{nearest(key, groups)}"
    group, _, leaf = key.partition(".")
    if leaf == "preset":
        return f"{text}: {key} says which option is chosen; choose it with {group}={written}"
    if override.is_delete() and (leaf in groups[group].model_fields if group in groups else True):
        return f"{text}: every key has a value; to change it, write {key}=VALUE"
    return None


def _value_problems(override: Any, several: bool, combine: bool) -> Iterator[Problem]:
    """Yield what is wrong with the number of values."""
    key, text = override.key_or_group, str(override.input_line)
    written = text.partition("=")[2]
    of_sweep = override.is_hydra_override() or _first(key) == SWEEP
    if override.is_sweep_override() and of_sweep:
        yield Problem(key, written, f"{text}: takes one value; it says how the whole sweep runs")
    elif override.is_sweep_override() and not several:
        yield Problem(
            key,
            written,
            f"{text}: several values where one is expected; a list is written {key}=[{written}]. To run each "
            f"of them: python stages/sweep.py -m {text}",
        )
    elif override.is_interval_sweep() and combine:
        sentence = (
            f"{text}: an interval needs a search (sweep=optuna); a grid has values, {key}=A,B"
        )
        yield Problem(key, written, sentence)


def _chosen_twice(overrides: Sequence[Any], conf: Path) -> dict[str, list[Any]]:
    """Return {group: overrides} of every group chosen more than once; of a key, the last value counts."""
    chosen: dict[str, list[Any]] = {}
    for override in overrides:
        if is_group(override.key_or_group, conf):
            chosen.setdefault(override.key_or_group, []).append(override)
    return {group: given for group, given in chosen.items() if len(given) > 1}


def _doubts(wrong: Sequence[str], good: Sequence[Any]) -> Callable[[str], bool]:
    """Return a function that tells whether a key may lack its intended value.

    This is the case if a wrong override was left out that could have set it.
    """
    keys = [key_of(text) for text in wrong]
    by_key = all("." in key and _first(key) in GROUPS for key in keys)
    # a wrong option may have selected options of any other group
    unsure = {_first(key) for key in keys} if by_key else {*GROUPS, "seed"}
    sure = {override.key_or_group for override in good}
    return lambda key: bool(keys) and _first(key) in unsure and key not in sure


def _combinations(
    overrides: Sequence[Any], conf: Path, combine: bool, limit: float
) -> Iterator[tuple[str, ...]]:
    """Yield the overrides of each combination, in the order of Hydra's grid."""
    ways = [_alternatives(override, conf) for override in overrides]
    if combine and math.prod(map(len, ways)) <= limit:
        yield from itertools.product(*ways)
        return
    first = tuple(way[0] for way in ways)
    yield first
    for place, way in enumerate(ways):
        yield from ((*first[:place], text, *first[place + 1 :]) for text in way[1:])


def _alternatives(override: Any, conf: Path) -> list[str]:
    key = override.get_key_element()
    if override.is_interval_sweep():
        return [f"{key}={end}" for end in (override.value().start, override.value().end)]
    if _is_glob(override):
        there = options_of(conf, override.key_or_group)
        return [f"{key}={option}" for option in override.value().filter(there)]
    if override.is_sweep_override():
        return [f"{key}={text}" for text in override.sweep_string_iterator()]
    return [str(override.input_line)]


def _is_glob(override: Any) -> bool:
    from hydra.core.override_parser.types import ValueType

    return bool(override.value_type is ValueType.GLOB_CHOICE_SWEEP)


class Composer:
    """A composer of conf/ that composes each combination of options once, without Hydra's global instance.

    Args:
        name: the name of the file in conf/. For `config`, Hydra's own node is left out: no combination
            needs it.
    """

    def __init__(self, conf: Path, name: str = "config") -> None:
        from hydra import version
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra._internal.utils import create_config_search_path

        from capas.config.searchpath import register

        register()
        version.setbase("1.3")
        self._loader = ConfigLoaderImpl(create_config_search_path(str(conf.resolve())))
        self._conf, self._name, self._known = conf, name, dict[tuple[str, ...], bytes]()

    def options(self, texts: tuple[str, ...] = ()) -> Any:
        """Return a copy of the configuration for these options; raises what Hydra raises."""
        from hydra.types import RunMode
        from omegaconf import open_dict

        if texts not in self._known:
            known = with_new_keys(list(texts), self._conf)
            config = self._loader.load_configuration(
                self._name, known, RunMode.RUN, from_shell=False
            )
            if self._name == "config":
                with open_dict(config):
                    del config["hydra"]
            self._known[texts] = pickle.dumps(config)  # three times as fast as a deep copy
        return pickle.loads(self._known[texts])

    def set(self, config: Any, text: str) -> None:
        """Apply the override of a key to a configuration; raises what Hydra raises."""
        from hydra._internal.config_loader_impl import ConfigLoaderImpl

        ConfigLoaderImpl._apply_overrides_to_config(_parsed(text, self._conf), config)


@cache
def _parsed(text: str, conf: Path) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return list(OverridesParser.create().parse_overrides(with_new_keys([text], conf)))


def _check_point(
    texts: tuple[str, ...], conf: Path, composer: Composer, is_doubtful: Callable[[str], bool]
) -> tuple[Values, list[Problem]]:
    """Return the values of a combination, and what is wrong with it."""
    options = tuple(text for text in texts if is_group(key_of(text), conf))
    try:
        config = composer.options(options)
    except failures() as error:
        return {}, _blamed(options, composer, error)
    problems = []
    for text in texts:
        try:
            if text not in options:
                composer.set(config, text)
        except failures() as error:
            problems.append(_problem(text, _refusal(text, error)))
    try:
        values = to_values(config)
    except failures() as error:
        given = [text for text in texts if "${" in text]
        if not given:
            return {}, [*problems, _of_conf(error)]
        sentence = reasons(error).partition("\n")[0]
        problems += [_problem(text, f"{text}: {sentence}") for text in given]
        rest = tuple(text for text in texts if text not in given)
        return {}, [*problems, *_check_point(rest, conf, composer, lambda key: True)[1]]
    missing = [key for key, value in flatten(values).items() if value == "???"]
    problems += [Problem(key, "", f"{key}: conf/ leaves it unset (???)") for key in missing]
    problems += find_problems(values, word_given(texts, conf), is_doubtful) if not missing else []
    return values, problems


def _problem(text: str, message: str) -> Problem:
    return Problem(key_of(text), text.partition("=")[2], message)


def _refusal(text: str, error: Exception) -> str:
    """Return why an override cannot be applied to the composed configuration."""
    key = key_of(text)
    if text.startswith("+") and not text.startswith("++"):
        return f"{text}: conf/ has {key} already; write {text[1:]}"
    if text.startswith("~"):
        return f"{text}: there is no {key} to remove"
    return f"{text}: {reasons(error)}"


def _blamed(options: tuple[str, ...], composer: Composer, error: Exception) -> list[Problem]:
    """Return which options do not compose; if none fails alone, all of them together, or conf/ itself."""
    problems = []
    for texts in ((), *((option,) for option in options)):
        try:
            composer.options(texts)
        except failures() as alone:
            if not texts:
                return [_of_conf(alone)]
            problems.append(_problem(texts[0], reasons(alone)))
    given = ", ".join(options)
    return problems or [Problem(given, "", f"{given}: do not compose together: {reasons(error)}")]


def _of_conf(error: Exception) -> Problem:
    return Problem("conf/", "", f"conf/ does not compose: {reasons(error)}")


def _lacking_here(
    points: Sequence[Point], composer: Composer, reads: Collection[str]
) -> list[Problem]:
    """Return what the combinations need and this machine lacks, without what conf/ itself needs.

    The results of the present conf/ may have come from another machine.
    """
    found = dict.fromkeys(p for point in points for p in lacking(point.values, reads))
    always = lacking(to_values(composer.options()), reads) if found else []
    return [problem for problem in found if problem not in always]


def key_of(text: str) -> str:
    """Return the key of an override, without Hydra's signs + and ~."""
    return text.partition("=")[0].lstrip("+~")


def _first(key: str) -> str:
    return key.partition(".")[0]
