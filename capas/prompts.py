"""What the sample stage asks: the user's own requests, or records of the test split."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from capas.errors import CapasError
from capas.records import evenly_spaced


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user; `reference` is the answer of a test record."""

    prompt_id: str
    messages: list[dict[str, str]]
    reference: str | None


def own_prompts(requests: list[str], system: str | None) -> list[Prompt]:
    """Each request after the system message, if there is one."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [
        Prompt(f"own-{i}", [*before, {"role": "user", "content": request}], None)
        for i, request in enumerate(requests)
    ]


def held_out_prompts(raw: Iterable[dict[str, Any]], ids: list[str], count: int) -> list[Prompt]:
    """`count` of the test records named in `ids`, evenly spaced.

    Args:
        raw: records of data/raw/test.parquet.
        ids: those that the format stage kept.
    """
    chosen = evenly_spaced(ids, count)
    messages = {record["id"]: record["messages"] for record in raw if record["id"] in set(chosen)}
    return [Prompt(name, *_split(messages[name], name)) for name in chosen]


def first_system_message(raw: Iterable[dict[str, Any]]) -> str | None:
    """The system message of the first record; None where it has none."""
    messages = next(iter(raw))["messages"]
    return messages[0]["content"] if messages[0]["role"] == "system" else None


def _split(messages: list[dict[str, str]], name: str) -> tuple[list[dict[str, str]], str]:
    """Everything before the last answer, and that answer."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if last == 0:
        raise CapasError(f"test record {name} begins with its only answer: there is nothing to ask")
    return messages[:last], messages[last]["content"]
