"""Recognise the common shapes of records, and convert each to a conversation::

    messages           {"messages": [{"role": "user", "content": "Hi"}, ...], "tools": [...]}     OpenAI
    sharegpt           {"conversations": [{"from": "human", "value": "Hi"}, ...], "system": "..."}
    alpaca             {"instruction": "...", "input": "...", "output": "..."}, optional history and system
    prompt_completion  {"prompt": "...", "completion": "..."}: two texts, or two lists of messages
    question_answer    {"question": "...", "answer": "..."}
    text               {"text": "..."}: all of it is trained
    oasst              one row for each message of a tree: message_id, parent_id, role, text, rank
    columns            any columns, mapped by `dataset.columns`

All rows of oasst are held in memory until the trees are complete; the other shapes need no such memory.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capas.core.errors import CapasError
from capas.core.records import TEXT
from capas.dataset.conversation import READ, Unused
from capas.dataset.flaws import (
    BAD_CALL,
    BAD_JSON,
    MALFORMED,
    MISSING_COLUMN,
    NOT_TEXT,
    UNKNOWN_ROLE,
    Flaw,
)
from capas.dataset.message import OfColumn
from capas.dataset.names import FUNCTION_CALL, ROLES, SYSTEM_PROMPTS, THOUGHTS, role_of

Found = dict[str, Any]
Columns = Mapping[str, str | list[str]]
# The columns by which a shape is recognised, the most specific first.
SIGNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "oasst": ("message_id", "role", "text"),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
TREE = ("message_id", "parent_id", "role", "text", "rank", "deleted")
WANTED = {shape: frozenset(columns) for shape, columns in SIGNS.items()}
_MAPPED = ("messages", "tools", "metadata", "reasoning_content")  # keys of what `convert` returns


def recognises(value: Mapping[str, Any]) -> bool:
    """Return whether these columns include those of a known shape."""
    return any(wanted <= value.keys() for wanted in WANTED.values())


def example(there: Sequence[str], user: str | None = None, assistant: str | None = None) -> str:
    """Return a mapping of these columns as a user would write it; the first ones stand for unknown ones."""
    others = [name for name in map(str, there) if name not in (user, assistant)]
    chosen = {"user": user or next(iter(others), "question")}
    chosen["assistant"] = assistant or next((n for n in others if n != chosen["user"]), "answer")
    words = (f"{role}: {_written(name)}" for role, name in chosen.items())
    return f"{{{', '.join(words)}}}"


def _written(name: str) -> str:
    """Return a column's name as Hydra reads it as a text."""
    is_word = re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)
    if is_word and name.lower() not in ("null", "true", "false", "inf", "nan"):
        return name
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(name, Quote.double).with_quotes()


def recognise(value: Mapping[str, Any]) -> str:
    """Return the shape that these columns belong to.

    Raises:
        Flaw: no known shape has these columns.
    """
    for shape, wanted in WANTED.items():
        if wanted <= value.keys():
            return shape
    known = "; ".join(f"{shape}: {', '.join(columns)}" for shape, columns in SIGNS.items())
    advice = (
        f"no known shape has these columns ({known}); set dataset.shape=columns and name those of "
        f"question and answer in dataset.columns, e.g. {example(list(value))}"
    )
    raise Flaw(MISSING_COLUMN, "columns", sorted(map(str, value)), advice)


def check_columns(there: Iterable[str], shape: str, columns: Columns, key: str, where: str) -> None:
    """Check, before any record is read, that a file has the columns that the shape needs.

    Args:
        there: all columns of the file, or those of its first records.
        key: the key of the source, for the error message.
        where: the file, for the error message.

    Raises:
        CapasError: a needed column is missing, or no known shape has these columns.
    """
    known = dict.fromkeys(there)
    if shape == "auto":
        try:
            recognise(known)
        except Flaw as flaw:
            raise CapasError(f"{where}: columns are {', '.join(known) or 'none'}: {flaw}") from None
        return
    named = [name for names in columns.values() for name in _names(names)]
    for name in named if shape == "columns" else SIGNS[shape]:
        if name in known or name.split(".")[0] in known:
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        stated = f"{key}.columns" if shape == "columns" else f"{key}.shape={shape}"
        raise CapasError(
            f"{where}: column {name!r}, needed by {stated}, does not exist; the columns are "
            f"{', '.join(map(repr, known)) or 'none'}{meant}"
        )


def needed_columns(there: list[str], shape: str, columns: Columns) -> list[str]:
    """Return the columns that a record is made of, or whose names have a meaning that must be checked.

    Raises:
        Flaw: the shape is auto, and no known shape has these columns.
    """
    if shape == "columns":
        used = {name for names in columns.values() for name in _names(names)}
        return [c for c in there if c == "id" or c in used or c in {n.split(".")[0] for n in used}]
    shape = recognise(dict.fromkeys(there)) if shape == "auto" else shape
    if shape == "oasst":
        return [column for column in there if column in TREE]
    used = {*SIGNS[shape], *READ, *(("input", "history") if shape == "alpaca" else ())}
    return [column for column in there if column in used]


def convert(
    value: Any, shape: str, columns: Columns, roles: Mapping[str, str] | None = None
) -> Found:
    """Return a row's messages, id, tools and metadata, not yet checked, and its unused columns.

    Args:
        roles: `dataset.roles`, further names of roles.

    Raises:
        Flaw: the row does not have that shape, or is a Flaw itself.
    """
    if isinstance(value, Flaw):
        raise value
    if not isinstance(value, Mapping):
        raise Flaw(MALFORMED, "record", value, "give an object with the columns of a record")
    shape = recognise(value) if shape == "auto" else shape
    if shape == "columns":
        return _mapped(value, columns, roles or {})
    missing = [column for column in SIGNS[shape] if column not in value]
    if missing:
        advice = f"missing; the shape {shape} has the columns {', '.join(SIGNS[shape])}"
        raise Flaw(MISSING_COLUMN, missing[0], sorted(map(str, value)), advice)
    row = dict(value)
    if shape in ("messages", "sharegpt"):
        [column] = SIGNS[shape]
        return _with_messages(_listed(row.pop(column), column, roles or {}), row)
    return _CONVERTERS[shape](row)


def _with_messages(messages: list[Any], rest: Found) -> Found:
    return {**rest, "messages": messages}


def _listed(messages: Any, column: str, roles: Mapping[str, str]) -> list[Any]:
    """Return the messages of a column, in OpenAI's or ShareGPT's form, or given as JSON text.

    Raises:
        Flaw: the column is not a list of messages.
    """
    given = messages
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            advice = f"messages given as text must be the JSON of a list: {error}"
            raise Flaw(BAD_JSON, column, given, advice) from None
    if not isinstance(messages, list) or not messages:
        raise Flaw(MALFORMED, column, given, "give a list of messages")
    if not (isinstance(messages[0], Mapping) and "from" in messages[0]):
        return messages
    return [_turn(turn, f"{column}[{i}]", roles) for i, turn in enumerate(messages)]


def _turn(turn: Any, at: str, roles: Mapping[str, str]) -> Found:
    if not isinstance(turn, Mapping):
        raise Flaw(MALFORMED, at, turn, "give an object with from and value")
    speaker = turn.get("from")
    role = role_of(speaker, roles)
    if role is None:
        advice = f"known roles: {', '.join(ROLES)}, plus the names mapped in dataset.roles"
        raise Flaw(UNKNOWN_ROLE, f"{at}.from", speaker, advice)
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    for key in ("role", "content"):  # from and value take precedence; these are counted as left out
        if key in rest:
            rest[f"{key} beside from and value"] = rest.pop(key)
    if role == FUNCTION_CALL:
        calls = _json_calls(turn.get("value"), f"{at}.value")
        return OfColumn("assistant", "", f"{at}.value", {**rest, "tool_calls": calls}, at)
    return OfColumn(role, turn.get("value"), f"{at}.value", rest, at)


def _json_calls(text: Any, at: str) -> list[Any]:
    try:
        calls = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        advice = f"a function call is JSON, {{name, arguments}}: {error}"
        raise Flaw(BAD_CALL, at, text, advice) from None
    return calls if isinstance(calls, list) else [calls]


def _alpaca(row: Found) -> Found:
    prompt = _joined([row.pop("instruction"), row.pop("input", "")])
    answer = OfColumn("assistant", row.pop("output"), "output")
    history = _history(row.pop("history", None))
    return _with_messages([*history, OfColumn("user", prompt, "instruction"), answer], row)


def _history(history: Any) -> list[Found]:
    """Return the messages of earlier turns, given as pairs [asked, answered].

    Raises:
        Flaw: the history is not a list of pairs.
    """
    if history in (None, "", []):
        return []
    if not isinstance(history, list) or any(
        not isinstance(p, list) or len(p) != 2 for p in history
    ):
        raise Flaw(MALFORMED, "history", history, "give a list of pairs [asked, answered]")
    return [
        OfColumn(role, content, f"history[{i}]")
        for i, pair in enumerate(history)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _prompt_completion(row: Found) -> Found:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _with_messages([*row.pop("prompt"), *row.pop("completion")], row)
    return _with_messages(_pair(row, "prompt", "completion"), row)


def _question_answer(row: Found) -> Found:
    return _with_messages(_pair(row, "question", "answer"), row)


def _plain(row: Found) -> Found:
    """Return a plain text, all of it trained; columns with a system prompt or a thought are left out."""
    text = row.pop("text")
    rest = {k: Unused(v) if k in (*SYSTEM_PROMPTS, *THOUGHTS) else v for k, v in row.items()}
    return _with_messages([OfColumn(TEXT, text, "text")], rest)


def _oasst(row: Found) -> Found:
    raise Flaw(MISSING_COLUMN, "columns", sorted(row), "rows of trees: set dataset.shape=oasst")


_CONVERTERS = {
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "text": _plain,
    "oasst": _oasst,
}


def _pair(row: Found, prompt: str, answer: str) -> list[Found]:
    columns = (("user", prompt), ("assistant", answer))
    return [OfColumn(role, row.pop(column), column) for role, column in columns]


def _joined(parts: list[Any]) -> Any:
    """Return the non-empty texts joined by blank lines, or the first value that is not text."""
    given = [part for part in parts if part not in (None, "")]
    wrong = [part for part in given if not isinstance(part, str)]
    if not given:
        return "" if "" in parts else None
    return (wrong or ["\n\n".join(given)])[0]


def _mapped(row: Mapping[str, Any], columns: Columns, roles: Mapping[str, str]) -> Found:
    """Return a row converted by `dataset.columns`; several columns of one role are joined by blank lines."""
    cells = {role: [_cell(row, name) for name in _names(names)] for role, names in columns.items()}
    named = {role: " + ".join(_names(names)) for role, names in columns.items()}
    used = {name for names in columns.values() for name in _names(names)}
    found = _unmapped(row, used if "id" in columns else {*used, "id"})
    found |= {key: cells[key][0] for key in ("tools", "reasoning_content") if key in cells}
    found["id"] = _mapped_id(cells["id"][0], named["id"]) if "id" in cells else row.get("id")
    messages: list[Any] = []
    if (system := _joined(cells.get("system", []))) not in (None, ""):
        messages.append(OfColumn("system", system, named["system"]))
    if "messages" in columns:
        messages += _listed(cells["messages"][0], named["messages"], roles)
    for role in ("user", TEXT, "assistant"):
        if role in columns:
            messages.append(OfColumn(role, _joined(cells[role]), named[role]))
    return _with_messages(messages, found)


def _unmapped(row: Mapping[str, Any], used: set[str]) -> Found:
    """Return the columns, and the keys within columns, that no mapped name uses."""
    found: Found = {}
    for column in [column for column in row if column not in used]:
        start, value = f"{column}.", row[column]
        within = {name.removeprefix(start) for name in used if name.startswith(start)}
        if within and isinstance(value, Mapping):
            found |= {start + key: inner for key, inner in _unmapped(value, within).items()}
        else:
            name = f"{column} (not in dataset.columns)" if column in (*_MAPPED, "id") else column
            found[name] = Unused(value)
    return found


def _mapped_id(identity: Any, column: str) -> Any:
    if identity is None or (isinstance(identity, str | int) and not isinstance(identity, bool)):
        return identity
    raise Flaw(NOT_TEXT, column, identity, "an id must be a string or an integer")


def _names(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _cell(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column; 'inputs.question' is the key question in the column inputs.

    Raises:
        Flaw: the row has no such column.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            advice = f"no such column (dataset.columns names {name})"
            raise Flaw(MISSING_COLUMN, "columns", sorted(map(str, row)), advice)
        value = value[part]
    return value
