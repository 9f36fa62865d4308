"""Choose the prompts of the sample stage: the user's own requests, or records of the test split."""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path

from capas.chat.messages import Message, Tools, conversation, spoken
from capas.core.errors import CapasError
from capas.core.records import RAW, TEXT, Record, before_last_answer, evenly_spaced, read_records

DEFAULT_NEW_TOKENS = 512  # length limit of an answer if neither a setting nor a reference gives one


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user, or the beginning of a text; `reference` is what follows."""

    prompt_id: str
    messages: list[Message]
    reference: str | None
    tools: Tools = None
    input_ids: list[int] | None = None  # of a text: encoded again, its last token could be another


def own_prompts(requests: list[str], system: str | None, role: str = "user") -> list[Prompt]:
    """Return a prompt for each request, after the system message if there is one.

    With the role text a request is the beginning of a text, which has no system message.
    """
    before = [] if system is None or role == TEXT else [{"role": "system", "content": system}]
    return [
        Prompt(f"own-{i}", [*before, {"role": role, "content": request}], None)
        for i, request in enumerate(requests)
    ]


def held_out_prompts(
    raw: Iterable[Record], formatted: Iterable[Record], count: int
) -> list[Prompt]:
    """Return prompts from `count` of the formatted test records, evenly spaced.

    Args:
        raw: records of data/raw/test.parquet.
        formatted: records of data/formatted/test.parquet.

    Raises:
        CapasError: a record has no user message before its only answer.
    """
    chosen = {record["id"]: record for record in evenly_spaced(list(formatted), count)}
    found = {
        record["id"]: _prompt(record, chosen[record["id"]])
        for record in raw
        if record["id"] in chosen
    }
    return [found[name] for name in chosen]


def read_questions(file: Path, ids: Set[str]) -> dict[str, str]:
    """Return {id: text before the last answer, without the system message} of raw records."""
    records = (record for record in read_records(file, RAW) if record["id"] in ids)
    asked = {record["id"]: before_last_answer(record["messages"]) for record in records}
    return {
        name: "\n".join(m["content"] for m in messages if m["role"] != "system")
        for name, messages in asked.items()
    }


def first_system_message(record: Record) -> str | None:
    """Return the system message of a record, None if it has none."""
    first = record["messages"][0]
    return first["content"] if first["role"] == "system" else None


def _prompt(record: Record, formatted: Record) -> Prompt:
    """Return the messages before the last answer as a prompt, and that answer as its reference."""
    stored, tools = conversation(record)
    messages = [spoken(message) for message in stored]
    if messages[0]["role"] == TEXT:
        return _beginning(messages[0]["content"], formatted)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if last == 0:
        raise CapasError(
            f"test record {record['id']} has no user message before its only answer: there is "
            "no prompt"
        )
    return Prompt(record["id"], messages[:last], messages[last]["content"], tools)


def _beginning(text: str, formatted: Record) -> Prompt:
    """Return the beginning of a text, where the evaluation cuts it, too."""
    reference = formatted["reference"]
    place = text.find(reference)  # a text may have been truncated after it
    if place < 0:  # the tokenizer normalizes: nearly there
        place = max(0, len(text) - len(reference))
    shown = {"role": TEXT, "content": text[:place] if reference else text}
    return Prompt(formatted["id"], [shown], reference, None, formatted["prompt_ids"])
