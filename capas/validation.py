"""Records as they come from a source, checked before anything is done with them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from capas.errors import CapasError
from capas.records import Record

ROLES = ("system", "user", "assistant")
Message = dict[str, Any]


def to_raw(source: str, split: str, records: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """Check each record and give it the form of `RAW`.

    Args:
        source: where the records come from, for the messages: a file or a data set.

    Raises:
        CapasError: naming source, split, index, id, field, the value seen and the way out.
    """
    known: dict[str, int] = {}
    for index, record in enumerate(records):
        where = f"{source}, {split} record {index}"
        checked = _check_record(record, where)
        if checked["id"] in known:
            raise CapasError(
                f"{where}: id {checked['id']!r} is that of record {known[checked['id']]} as well; "
                "give every record of a split an id of its own"
            )
        known[checked["id"]] = index
        yield checked


def _check_record(record: Any, where: str) -> Record:
    if not isinstance(record, Mapping):
        raise CapasError(f"{where} is {_show(record)}, not an object with id and messages")
    identity = record.get("id")
    if not isinstance(identity, str) or not identity:
        raise CapasError(f"{where}: id is {_show(identity)}; give it a text that is not empty")
    where = f"{where} (id {identity!r})"
    if "messages" not in record:
        found = ", ".join(sorted(str(key) for key in record))
        raise CapasError(
            f"{where}: messages is missing (there is {found}); give a list of {{role, content}}"
        )
    _reject_keys(record, {"id", "messages", "metadata"}, where)
    return {
        "id": _check_text(identity, f"{where}: id"),
        "messages": check_messages(record.get("messages"), where),
        "tools": "",
        "metadata": _check_metadata(record.get("metadata", {}), where),
    }


def check_messages(messages: Any, where: str) -> list[Message]:
    """A conversation with something to train on.

    Raises:
        CapasError: it is no list of {role, content}, a role is unknown, a content is no text, no turn of
            the assistant is in it, or one is empty.
    """
    if isinstance(messages, str):
        raise CapasError(
            f"{where}: messages is a text, {_show(messages)}; give the list itself, "
            "not its JSON inside a string (json.loads it once more)"
        )
    if not isinstance(messages, list) or not messages:
        raise CapasError(
            f"{where}: messages is {_show(messages)}; give a list of {{role, content}}"
        )
    checked = [_check_message(m, f"{where}: messages[{i}]") for i, m in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in checked):
        raise CapasError(f"{where}: no message of the assistant: there is nothing to train on")
    return checked


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise CapasError(f"{where} is {_show(message)}, not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise CapasError(f"{where}: role is {_show(role)}; known roles: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise CapasError(f"{where}: content is {_show(content)}; give it as text")
    _reject_keys(message, {"role", "content"}, where)
    if role == "assistant" and not content.strip():
        raise CapasError(
            f"{where}: the assistant's content is {_show(content)}: an empty answer would teach the "
            "model to say nothing; leave the turn or the record out"
        )
    content = _check_text(content, f"{where}: content")
    return {"role": role, "content": content, "extra": "", "train": True}


def _reject_keys(found: Mapping[str, Any], known: set[str], where: str) -> None:
    extra = sorted(str(key) for key in found.keys() - known)
    if extra:
        raise CapasError(
            f"{where}: unknown key {', '.join(extra)}; known: {', '.join(sorted(known))}. "
            "What describes the record goes into metadata; tool calls are not supported yet"
        )


def _check_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CapasError(
            f"{where}: character {error.start} is {text[error.start]!r}, half of a surrogate pair, which no "
            "UTF-8 text can hold; repair the text where it was cut"
        ) from None
    return text


def _check_metadata(metadata: Any, where: str) -> str:
    if not isinstance(metadata, Mapping):
        raise CapasError(f"{where}: metadata is {_show(metadata)}; give an object, or leave it out")
    try:
        text = json.dumps(metadata, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CapasError(f"{where}: metadata is not JSON: {error}") from None
    return _check_text(text, f"{where}: metadata")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
