"""Turn Open Assistant's trees of messages into conversations."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from capas.dataset.flaws import MALFORMED, Flaw
from capas.dataset.rows import Row


def threads(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield one conversation for each tree: from its root along the best ranked replies to the last answer.

    Rows that are not messages, and replies to unknown messages, are yielded as flaws. The trees are assembled
    in memory, because their rows are in no order.
    """
    children: dict[Any, list[tuple[Row, Mapping[str, Any]]]] = {}
    broken: list[Row] = []
    known: set[str] = set()
    for row in rows:
        value = row.value
        if not isinstance(value, Mapping) or not isinstance(value.get("message_id"), str):
            broken.append(replace(row, value=_no_message(value)))
            continue
        known.add(value["message_id"])
        if not value.get("deleted"):  # replies below a deleted message are dropped with it
            children.setdefault(value.get("parent_id"), []).append((row, value))
    yield from broken
    for parent in [p for p in children if p is not None and p not in known]:
        for row, value in children[parent]:
            advice = "no row has this message_id"
            yield replace(row, value=Flaw(MALFORMED, "parent_id", value["parent_id"], advice))
    for row, root in children.get(None, []):
        yield replace(
            row, value={"id": root["message_id"], "messages": _best_thread(root, children)}
        )


def _no_message(value: Any) -> Flaw:
    if isinstance(value, Flaw):
        return value
    return Flaw(MALFORMED, "record", value, "a row of a tree has a message_id, which is a text")


def _best_thread(root: Mapping[str, Any], children: Mapping[Any, Any]) -> list[dict[str, Any]]:
    thread, current = [], root
    while True:
        role = "user" if current.get("role") == "prompter" else current.get("role")
        thread.append({"role": role, "content": current.get("text")})
        replies = [value for _, value in children.get(str(current["message_id"]), [])]
        if not replies:
            break
        current = min(replies, key=_rank)
    answers = [i for i, message in enumerate(thread) if message["role"] == "assistant"]
    return thread[: answers[-1] + 1] if answers else thread


def _rank(reply: Mapping[str, Any]) -> tuple[bool, float]:
    """Return a sort key by rank, of which 0 is the best; replies without a rank come last, in file order."""
    rank = reply.get("rank")
    return (rank is None, rank or 0)
