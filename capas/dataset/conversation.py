"""Check a source's conversation, and convert it to the form of `capas.core.records.RAW`."""

from collections.abc import Mapping
from typing import Any

from capas.core.records import TEXT, Record
from capas.dataset.calls import check_tools
from capas.dataset.flaws import (
    ASSISTANT_FIRST,
    BAD_CALL,
    BAD_JSON,
    CONSECUTIVE,
    KEEP,
    MALFORMED,
    MERGE,
    NO_ANSWER,
    SKIP,
    SYSTEM,
    UNCLEAR_TRAINING,
    UNKNOWN_ROLE,
    Flaw,
    Flaws,
)
from capas.dataset.message import Message, OfColumn, check_message, clean, json_text, only_key
from capas.dataset.names import (
    CALLS,
    PARTLY_TRAINED,
    PROMPT_TRAINED,
    ROLES,
    SYSTEM_PROMPTS,
    THOUGHTS,
    TOOLS,
    TRAINED,
    UNCLEAR,
    UNTRAINED,
    role_of,
)

_DENIED = (*UNTRAINED, *UNCLEAR, *PROMPT_TRAINED, *PARTLY_TRAINED)
_TRAINING = (*TRAINED, *_DENIED)
_YES, _NO = (True, 1, "1", "1.0", "true", "True"), (False, 0, "0", "0.0", "false", "False")
READ = ("id", "messages", "metadata", *TOOLS, *SYSTEM_PROMPTS, *THOUGHTS, *CALLS, *_TRAINING)


class Unused:
    """The value of a column that `dataset.columns` does not name, even if its name is a known one."""

    def __init__(self, value: Any) -> None:
        self.value = value


def check_record(
    found: Mapping[str, Any], flaws: Flaws, roles: Mapping[str, str] | None = None
) -> Record:
    """Return a record of `RAW`; its id is "" if the source gives none.

    Args:
        found: the messages, and next to them, under the names in use, optionally: id, tools, metadata, a
            system prompt, the thought or the calls of a single answer. Other keys are counted and left out.
        roles: `dataset.roles`, further names of roles.

    Raises:
        Flaw: the record is flawed, and the policy for that flaw is not a repair.
    """
    for key, value in found.items():
        if isinstance(value, Unused):
            if value.value not in (None, ""):
                flaws.leave_out(str(key))
        elif key not in READ and value is not None:
            flaws.leave_out(str(key))
    found = {key: value for key, value in found.items() if not isinstance(value, Unused)}
    _check_training(found)
    roles = roles or {}
    tools = only_key(found, TOOLS, "")
    return {
        "id": _identity(found.get("id"), flaws),
        "messages": check_messages(_completed(found, roles), flaws, roles),
        "tools": _tools(found[tools], tools, flaws) if tools else "",
        "metadata": _metadata(found.get("metadata"), flaws),
    }


def _check_training(found: Mapping[str, Any]) -> None:
    """Check that no key of the record itself, outside of its messages, restricts or extends training.

    Raises:
        Flaw: a key does.
    """
    for key in [key for key in _TRAINING if found.get(key) not in (None, "")]:
        value = found[key]
        if value not in (_NO if key in _DENIED else _YES):
            advice = (
                "this key selects what is trained, but capas trains whole answers only. Mark "
                "messages with train: false instead. If the key means something else, name the "
                "columns to use (dataset.shape=columns)"
            )
            raise Flaw(UNCLEAR_TRAINING, key, value, advice)


def _completed(found: Mapping[str, Any], roles: Mapping[str, str]) -> Any:
    """Return the messages with the keys next to them moved in: system prompt, thought, calls.

    Raises:
        Flaw: there is not exactly one answer for a thought or calls, or there are two system prompts.
    """
    messages = found.get("messages")
    if not isinstance(messages, list) or not messages:
        return messages
    messages = [
        m if isinstance(m, OfColumn) or not isinstance(m, Mapping) else {**m} for m in messages
    ]
    answers = [
        i
        for i, message in enumerate(messages)
        if isinstance(message, Mapping) and role_of(message.get("role"), roles) == "assistant"
    ]
    for names in (THOUGHTS, CALLS):
        key = only_key(found, names, "")
        if key is None:
            continue
        if len(answers) != 1 or only_key(messages[answers[0]], names, f"messages[{answers[0]}]"):
            advice = "the key is next to the messages; move it into its answer"
            raise Flaw(MALFORMED, key, found[key], advice)
        messages[answers[0]][key] = found[key]
    return [*_system_prompt(found, messages[0], roles), *messages]


def _system_prompt(
    found: Mapping[str, Any], first: Any, roles: Mapping[str, str]
) -> list[Mapping[str, Any]]:
    key = only_key(found, SYSTEM_PROMPTS, "")
    if key is None:
        return []
    if isinstance(first, Mapping) and role_of(first.get("role"), roles) == "system":
        if first.get("content") == found[key]:
            return []
        advice = "the messages begin with a different system prompt; keep one of them"
        raise Flaw(MALFORMED, key, found[key], advice)
    return [OfColumn("system", found[key], key)]


def check_messages(
    messages: Any, flaws: Flaws, roles: Mapping[str, str] | None = None
) -> list[Message]:
    """Return the messages of `RAW`.

    Raises:
        Flaw: the messages are flawed, and the policy for that flaw is not a repair.
    """
    if not isinstance(messages, list) or not messages:
        kind = BAD_JSON if isinstance(messages, str) else MALFORMED
        raise Flaw(kind, "messages", messages, "give a list of {role, content}")
    checked = [
        check_message(message, f"messages[{i}]", flaws, roles or {})
        for i, message in enumerate(messages)
    ]
    if checked[0]["role"] == TEXT:
        return _plain_text(checked)
    checked = _alternating(_begun(checked, flaws), flaws)
    for i, message in enumerate(checked):
        _check_order(i, message, checked, flaws)
    if not any(m["role"] == "assistant" and m["train"] for m in checked):
        last = checked[-1]["role"] if checked else None
        raise Flaw(NO_ANSWER, "messages[-1].role", last, "no assistant message to train on")
    return checked


def _plain_text(checked: list[Message]) -> list[Message]:
    if len(checked) > 1:
        advice = "a plain text must be the only content of its record"
        raise Flaw(MALFORMED, "messages", checked[1]["role"], advice)
    if not checked[0]["train"]:
        raise Flaw(NO_ANSWER, "messages[0]", False, "the text is not to be trained")
    return checked


def _begun(messages: list[Message], flaws: Flaws) -> list[Message]:
    """Return the messages without answers before the first prompt, which the policy skip leaves out.

    Raises:
        Flaw: the conversation begins with an answer, and the policy is not skip.
    """
    start = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    if start == len(messages) or messages[start]["role"] != "assistant":
        return messages
    advice = "the conversation begins with an assistant message, without a prompt"
    flaws.allows(Flaw(ASSISTANT_FIRST, f"messages[{start}].role", "assistant", advice), SKIP)
    first_user = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
    return messages[:start] + messages[first_user:]


def _alternating(messages: list[Message], flaws: Flaws) -> list[Message]:
    """Return the messages with neighbours of one role merged or kept, according to the policy.

    Results of several tool calls are always kept.

    Raises:
        Flaw: there are such neighbours, and the policy is neither merge nor keep.
    """
    result: list[Message] = []
    for i, message in enumerate(messages):
        if not result or result[-1]["role"] != message["role"] or message["role"] == "tool":
            result.append(message)
            continue
        flaw = Flaw(
            CONSECUTIVE,
            f"messages[{i}].role",
            message["role"],
            "the previous message has the same role",
        )
        flaws.allows(flaw, MERGE, KEEP)
        if flaws.policy(CONSECUTIVE) == KEEP:
            result.append(message)
        else:
            result[-1] = _merged(result[-1], message, i)
    return result


def _merged(first: Message, second: Message, number: int) -> Message:
    if first["extra"] or second["extra"] or first["train"] != second["train"]:
        advice = (
            "cannot be merged with the previous message: one has tool calls, or only one is trained"
        )
        raise Flaw(MALFORMED, f"messages[{number}]", second["content"], advice)
    return {**first, "content": f"{first['content']}\n\n{second['content']}"}


def _check_order(number: int, message: Message, messages: list[Message], flaws: Flaws) -> None:
    before = messages[:number]
    if message["role"] == "system" and any(m["role"] != "system" for m in before):
        advice = "a system message must come first; models only see system messages at the start"
        flaws.allows(Flaw(SYSTEM, f"messages[{number}].role", "system", advice), KEEP)
    if message["role"] == "tool":
        previous = next((m for m in reversed(before) if m["role"] != "tool"), None)
        if previous is None or '"tool_calls"' not in previous["extra"]:
            advice = "a tool message must follow an assistant message with tool_calls"
            raise Flaw(BAD_CALL, f"messages[{number}].role", "tool", advice)
    if message["role"] == TEXT:
        advice = f"known roles: {', '.join(ROLES)}"
        raise Flaw(UNKNOWN_ROLE, f"messages[{number}].role", TEXT, advice)


def _identity(identity: Any, flaws: Flaws) -> str:
    """Return an id as text; a value that is neither a string nor an integer is left out and counted."""
    if isinstance(identity, str | int) and not isinstance(identity, bool):
        return clean(str(identity), "id", flaws)
    if identity is not None:
        flaws.leave_out("id (neither a string nor an integer)")
    return ""


def _tools(tools: Any, key: str, flaws: Flaws) -> str:
    """Return the list of tools as JSON text, with the order of keys kept."""
    checked = check_tools(tools, key)
    return json_text(checked, key, flaws) if checked else ""


def _metadata(metadata: Any, flaws: Flaws) -> str:
    if metadata is not None and not isinstance(metadata, Mapping):
        flaws.leave_out("metadata (not an object)")
        return "{}"
    return json_text(metadata or {}, "metadata", flaws, sort_keys=True)
