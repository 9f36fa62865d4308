"""Decide how many tokens an answer may have."""

from collections.abc import Iterable

from capas.core.records import Record


def answer_limit(records: Iterable[Record], max_new_tokens: int | None) -> int:
    """Return how many tokens an answer may have: `max_new_tokens`, or a limit from the references.

    The limit is the longest reference, its end token included, and a quarter more.

    Args:
        records: formatted records.
    """
    if max_new_tokens is not None:
        return max_new_tokens
    return with_room(max(len(r["input_ids"]) - len(r["prompt_ids"]) for r in records))


def with_room(longest: int) -> int:
    """Return how many tokens an answer may have if the longest reference has `longest`."""
    return longest + max(8, longest // 4)
