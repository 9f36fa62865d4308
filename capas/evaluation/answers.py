"""Answers against the reference: the same text, the same data, or how many of its fields."""

import json
from typing import Any

_Way = tuple[str | int, ...]  # keys and positions, from the outside in


def exact_match(completion: str, reference: str) -> bool:
    """Equal as JSON where the reference is JSON (spaces and the order of keys do not count), else as text.

    Text is compared without surrounding white space. 1 and 1.0 and true are three values.
    """
    try:
        expected = _parse(reference)
    except ValueError:
        return completion.strip() == reference.strip()
    try:
        return _canonical(_parse(completion)) == _canonical(expected)
    except (ValueError, RecursionError):
        return False


def valid_json(completion: str) -> bool:
    """A JSON object or array, whole: a bare number or word is no structured answer."""
    try:
        return isinstance(_parse(completion), dict | list)
    except (ValueError, RecursionError):
        return False


def json_fields(completion: str, reference: str) -> float:
    """F1 of the completion's leaf fields: 1 where they are those of the reference, 0 where none is.

    A leaf is a value with the way to it: `{"a": {"b": [5]}}` has one, a -> b -> item 0 = 5. Recall is the
    share of the reference's leaves that the completion has with the same value, precision the share of the
    completion's that are right, F1 their harmonic mean, 2 x right / (leaves of one + leaves of the other),
    so that inventing a field costs as much as leaving one out. Elements of a list are told by their position.
    A completion that is no JSON scores 0. A reference that is none is one field, compared by `exact_match`.
    """
    try:
        expected = _parse(reference)
    except ValueError:
        return float(exact_match(completion, reference))
    try:
        given = _parse(completion)
    except (ValueError, RecursionError):
        return 0.0
    wanted, found = _leaves(expected), _leaves(given)
    return 2 * len(wanted & found) / (len(wanted) + len(found))


def _leaves(value: Any) -> set[tuple[_Way, str]]:
    """(way, value as JSON) of everything that holds nothing; an empty object or list is a leaf."""
    leaves: set[tuple[_Way, str]] = set()
    todo: list[tuple[_Way, Any]] = [((), value)]
    while todo:
        way, node = todo.pop()
        if isinstance(node, dict | list) and node:
            items = node.items() if isinstance(node, dict) else enumerate(node)
            todo += [((*way, key), item) for key, item in items]
        else:
            leaves.add((way, _canonical(node)))
    return leaves


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
