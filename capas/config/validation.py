"""Check values against the schema and the rules, and report all problems at once, each with a remedy."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from capas.config.foreign_names import answer_to_key, answer_to_value
from capas.config.json_schema import leaves_schema
from capas.config.problems import Problem, refused
from capas.config.rules import RULES
from capas.config.schedules import schedule_problems, show
from capas.config.schema import GROUPS, Config, Group
from capas.core.errors import without_secrets
from capas.core.params import ABSENT, flatten, lookup
from capas.evaluation.names import OWN_FUNCTION

Word = Callable[[str, Any], str | None]


def validate(values: dict[str, Any], word: Word = lambda key, value: None) -> None:
    """Check all values to which conf/ composes.

    Args:
        word: returns the text that was written for a key's value in conf/ or on the command line, if it is
            known: YAML and Hydra read 12e4567 as a number.

    Raises:
        CapasError: all problems at once, one a line: dotted key, value, what is expected, nearest key.
    """
    if problems := find_problems(values, word):
        raise refused(problems)


def find_problems(
    values: dict[str, Any], word: Word, is_doubtful: Callable[[str], bool] = lambda key: False
) -> list[Problem]:
    """Return every problem of the values.

    Args:
        word: see `validate`.
        is_doubtful: returns whether a key may lack its intended value; rules that read such a key are
            skipped.
    """
    problems: dict[str, Problem] = {}
    meant: dict[str, str] = {}
    for problem, part, near in _field_problems(values, word):
        if before := problems.get(problem.key):
            problem = Problem(before.key, before.value, f"{before.message} or {part}")
        problems[problem.key] = problem
        meant |= {problem.key: near} if near else {}
    for key, near in meant.items():
        problem = problems[key]
        message = f"{problem.message}; did you mean {near}?"
        problems[key] = Problem(problem.key, problem.value, message)

    def valid(keys: tuple[str, ...]) -> list[Any] | None:
        """Return the values of `keys`, None if one of them is missing, wrong by itself or doubtful."""
        wrong = any(p == key or p.startswith(f"{key}.") for p in of_fields for key in keys)
        wrong = wrong or any(map(is_doubtful, keys))
        found = [lookup(values, key) for key in keys]
        return None if wrong or any(f is ABSENT for f in found) else found

    of_fields = list(problems)
    for rule in RULES:
        found = valid(rule.keys)
        if found is not None and not rule.holds(*found):
            given = ", ".join(f"{k}={show(f)}" for k, f in zip(rule.keys, found, strict=True))
            problems[f"{given} {rule.expected}"] = Problem(
                rule.keys[0], show(found[0]), f"{given}: expected {rule.expected}"
            )
    if (found := valid(_OF_SCHEDULE)) is not None:
        kwargs = _OF_SCHEDULE[1]
        for text in schedule_problems(*found):
            problems[text] = Problem(kwargs, show(found[1]), text)
    for key, text in _secrets(values):
        problems[f"{key} holds a secret"] = Problem(key, "***", text)
    return list(problems.values())


_OF_SCHEDULE = (
    "trainer.lr_scheduler_type",
    "trainer.lr_scheduler_kwargs",
    "trainer.learning_rate",
)
_FREE_TEXT = ("system", "prompts")  # texts for a model may look like anything


def _secrets(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, sentence) for every text that contains a password or a token."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            if key not in _FREE_TEXT:
                yield from _secrets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, str) and (shown := without_secrets(values)) != values:
        yield (
            path,
            f"{path}={shown!r}: holds a password or a token (***), which params.yaml, MLflow and the card "
            "of the model would show. The Hub reads HF_TOKEN instead, MLflow MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD; download what else is protected into data/own",
        )


def _field_problems(values: dict[str, Any], word: Word) -> Iterator[tuple[Problem, str, str]]:
    """Yield each problem with pydantic's part of its sentence, and an allowed value that may have been meant.

    A union yields a problem for each of its members. Those that say "no list" of a list are left out if an
    element of the list has a problem of its own.
    """
    try:
        Config.model_validate(values)
    except ValidationError as error:
        items = [(_dotted(item["loc"], values), item) for item in error.errors()]
        keys = [key for key, _ in items]
        answered: set[str] = set()
        for key, item in items:
            message = _in_words(item).removeprefix("Value error, ")
            if any(other.startswith(f"{key}.") for other in keys):
                continue
            is_scalar = isinstance(item["input"], int | float)
            if item["type"] == "string_type" and is_scalar and keys.count(key) == 1:
                given = word(key, item["input"]) or show(item["input"])
                yield Problem(key, given, _quoting(key, given, item["input"])), message, ""
                continue
            sentence = explain(key, item["type"], message, item["input"])
            if is_answered := answer_to_value(key, item["input"]) is not None:
                if key in answered:
                    continue
                answered.add(key)
            shown = "" if item["type"] in ("missing", "extra_forbidden") else show(item["input"])
            part = message[0].lower() + message[1:]
            yield Problem(key, shown, sentence), part, "" if is_answered else _nearest_value(item)


def _nearest_value(item: Any) -> str:
    """Return the allowed value that is spelled nearly like a wrong one, quoted, or ""."""
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"])
    known, given = {value.lower(): value for value in allowed}, item["input"].lower()
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.75)
    differs_in_digits = bool(close) and re.sub(r"\d", "", given) == re.sub(r"\d", "", close[0])
    if not close or (differs_in_digits and close[0] != given):  # float64 is no misspelled float16
        return ""
    return f"'{known[close[0]]}'"


def _quoting(key: str, given: str, value: Any) -> str:
    """Return a sentence on how to write a text that YAML and Hydra read as a number or as true or false."""
    kind = "true or false" if isinstance(value, bool) else "a number"
    leaf = key.rpartition(".")[2]
    return (
        f"{key}={given}: expected a text, and {given} is read as {kind}. Quote it: {leaf}: '{given}' in "
        f"conf/, \"{key}='{given}'\" on the command line"
    )


def _in_words(item: Any) -> str:
    if item.get("ctx", {}).get("pattern") == OWN_FUNCTION:
        return "a function of your own, FILE.py:FUNCTION"
    if item["type"] == "list_type" and isinstance(item["input"], str):
        return f"expected a list: [{item['input']}]"
    return str(item["msg"])


def _dotted(location: tuple[int | str, ...], values: dict[str, Any]) -> str:
    """Return the key in params.yaml; pydantic adds the names of union members to a location."""
    parts: list[str] = []
    node: Any = values
    for part in location:
        inside = isinstance(node, dict) and part in node
        inside = inside or (isinstance(node, list) and isinstance(part, int))
        if inside or not parts or isinstance(node, dict):
            parts.append(str(part))
            node = node[part] if inside else None
    return ".".join(parts)


def explain(
    key: str, kind: str, message: str, value: Any, groups: Mapping[str, type[Group]] = GROUPS
) -> str:
    """Return a problem that pydantic found as a sentence."""
    if kind == "missing":
        return f"{key}: is missing; every option of a group must set it"
    if kind == "extra_forbidden":
        return f"{key}={show(value)}: no such key{nearest(key, groups)}"
    if (answer := answer_to_value(key, value)) is not None:
        return f"{key}={show(value)}: no such value; {answer}"
    return f"{key}={show(value)}: {message[0].lower()}{message[1:]}"


def nearest(key: str, groups: Mapping[str, type[Group]] = GROUPS) -> str:
    """Return the key that was probably meant, or the existing keys, as the end of `no such key`."""
    if (left := leaves_schema(key, groups)) is None:
        return ""
    path, name, known = left
    if path and not known:
        return f"; {path} is a value and has no keys"
    if (not path or path.partition(".")[0] in GROUPS) and (answer := answer_to_key(name)):
        return answer
    if not path:
        if meant := _nearest_group(key, groups):
            return f"; did you mean {' or '.join(meant)}?"
        return answer_to_key(key.rpartition(".")[2]) or ""
    if path in GROUPS and name not in _GENERAL and (others := _keys_called(name)):
        return f"; did you mean {' or '.join(others)}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    there = f"; {path} has {', '.join(n for n in known if n != 'preset')}"
    return f"; did you mean {path}.{close[0]}?" if close else there


_GENERAL = ("name", "path")  # names of keys that mean nothing without their group


def _nearest_group(key: str, groups: Mapping[str, type[Group]]) -> list[str]:
    """Return the groups or keys that were probably meant by a key whose first part is no group."""
    if "." in key:
        close = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.6)
        return close or _keys_called(key.rpartition(".")[2])
    leaves = {known.rpartition(".")[2] for known in known_keys()}
    if found := _keys_called(key):
        return found
    close = difflib.get_close_matches(key, [*groups, *leaves], n=1, cutoff=0.6)
    return close if close and close[0] in groups else _keys_called(close[0]) if close else []


def _keys_called(leaf: str) -> list[str]:
    """Return the keys with this last part, three at most."""
    return [key for key in known_keys() if key.rpartition(".")[2] == leaf][:3]


def known_keys() -> list[str]:
    """Return the dotted keys of all groups, and `seed`."""
    leaves = {name: dict.fromkeys(group.model_fields) for name, group in GROUPS.items()}
    return [*flatten(leaves), "seed"]
