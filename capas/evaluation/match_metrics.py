"""Metrics of matching answers: exact match, valid JSON, JSON fields shared with the reference."""

import json
from typing import Any

_Way = tuple[str | int, ...]  # the path to a value: keys and positions, the outermost first


def exact_match(completion: str, reference: str) -> bool:
    """Return whether the completion equals the reference: as JSON if the reference is JSON, else as text.

    In JSON, spaces and the order of keys do not count; 1, 1.0 and true are three values. Text is compared
    without surrounding white space.
    """
    try:
        expected = _parse(reference)
    except ValueError:
        return completion.strip() == reference.strip()
    try:
        return _canonical(_parse(completion)) == _canonical(expected)
    except (ValueError, RecursionError):
        return False


def same_label(completion: str, reference: str) -> bool:
    """Return whether the completion is the reference's label, without surrounding white space."""
    return completion.strip() == reference.strip()


def valid_json(completion: str) -> bool:
    """Return whether the completion is a JSON object or array; a bare number or word does not count."""
    try:
        return isinstance(_parse(completion), dict | list)
    except (ValueError, RecursionError):
        return False


def json_fields(completion: str, reference: str) -> float:
    """Return the F1 of the completion's leaf fields: 1 if they are those of the reference, 0 if none is.

    A leaf is a value with the path to it: `{"a": {"b": [5]}}` has one, a -> b -> item 0 = 5. Recall is the
    share of the reference's leaves that the completion has with the same value. Precision is the share of the
    completion's leaves that are right. F1 is their harmonic mean, 2 x right / (leaves of one + leaves of the
    other), so that inventing a field costs as much as omitting one. Elements of a list are identified by
    their position. A completion that is not JSON scores 0. A reference that is not JSON counts as one field,
    compared by `exact_match`.
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
    """Return (path, value as JSON) of every value that contains no other; empty objects and lists count."""
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
