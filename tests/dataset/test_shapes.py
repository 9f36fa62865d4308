"""Every shape of records that is known, recognised and stated, and the conversation it becomes."""

import json
import re
from typing import Any

import pytest
from checking import check, flaws

from capas.core.errors import CapasError
from capas.dataset.rows import Row
from capas.dataset.trees import threads

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Paris", "at": 1}}}


def told(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in record["messages"]]


def extra(record: dict[str, Any], number: int) -> Any:
    return json.loads(record["messages"][number]["extra"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [ASKED, ANSWERED]}, [("user", "Hi"), ("assistant", "Hello")]),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "H"}]},
            [("user", "Hi"), ("assistant", "H")],
        ),
        (
            {"system": "S", "conversations": [ASKED, ANSWERED]},
            [("system", "S"), ("user", "Hi"), ("assistant", "Hello")],
        ),
        ({"messages": [{"from": "user", "value": "Hi"}, {"from": "gpt", "value": "H"}]}, None),
        (
            {"instruction": "I", "input": "in", "output": "O"},
            [("user", "I\n\nin"), ("assistant", "O")],
        ),
        ({"instruction": "I", "input": "", "output": "O"}, [("user", "I"), ("assistant", "O")]),
        ({"instruction": "I", "output": "O"}, [("user", "I"), ("assistant", "O")]),
        (
            {"instruction": "I", "output": "O", "history": [["a", "b"]], "system": "S"},
            [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "I"), ("assistant", "O")],
        ),
        ({"prompt": "2+2=", "completion": " 4"}, [("user", "2+2="), ("assistant", " 4")]),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"question": "Q", "answer": "A"}, [("user", "Q"), ("assistant", "A")]),
        ({"text": "\n all of it\n"}, [("text", "\n all of it\n")]),
    ],
)
def test_a_shape_is_recognised(row: dict[str, Any], expected: list[tuple[str, str]] | None) -> None:
    [record] = check(row)
    assert told(record) == (expected or [("user", "Hi"), ("assistant", "H")])
    assert record["id"] == ""


@pytest.mark.parametrize("key", ["role", "content", "column", "self"])
def test_other_keys_of_a_turn_are_counted(key: str) -> None:
    found = flaws()
    turns = [{"from": "human", "value": "Hi", key: "x"}, {"from": "gpt", "value": "H"}]
    [record] = check({"conversations": turns}, counts=found)
    assert told(record) == [("user", "Hi"), ("assistant", "H")]
    name = f"{key} beside from and value" if key in ("role", "content") else key
    assert found.left_out == {f"messages[].{name} (user)": 1}


@pytest.mark.parametrize(
    ("row", "columns", "field"),
    [
        ({"pregunta": "Q", "respuesta": " "}, {"user": "pregunta", "assistant": "respuesta"}, "respuesta"),
        ({"q": "Q", "a": "", "b": ""}, {"user": "q", "assistant": ["a", "b"]}, "a + b"),
        ({"q": "Q", "a": None, "b": ""}, {"user": "q", "assistant": ["a", "b"]}, "a + b"),
        ({"t": ""}, {"text": "t"}, "t"),
        ({"instruction": "I", "output": ""}, {}, "output"),
        ({"instruction": "I", "output": "O", "history": [["a", ""]]}, {}, "history[0]"),
        ({"prompt": "P", "completion": ""}, {}, "completion"),
        ({"question": "Q", "answer": "\n"}, {}, "answer"),
        ({"text": ""}, {}, "text"),
        ({"system": "S", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]},
         {}, "conversations[1].value"),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}]}, {}, "messages[1].content"),
    ],
)  # fmt: skip
def test_a_flaw_names_what_stands_in_the_file(
    row: dict[str, Any], columns: dict[str, Any], field: str
) -> None:
    with pytest.raises(CapasError, match=rf"{re.escape(field)} is '.*': an empty answer"):
        check(row, shape="columns" if columns else "auto", columns=columns)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"user": "pregunta", "assistant": "in.r"}, [("user", "P"), ("assistant", "R")]),
        (
            {"user": ["pregunta", "contexto"], "assistant": "in.r", "system": "s", "id": "clave"},
            [("system", "S"), ("user", "P\n\nC"), ("assistant", "R")],
        ),
        ({"messages": "chat"}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"text": "contexto"}, [("text", "C")]),
    ],
)
def test_columns_are_mapped(columns: Any, expected: list[tuple[str, str]]) -> None:
    answers, chat = {"r": "R"}, [ASKED, ANSWERED]
    row = {"pregunta": "P", "contexto": "C", "s": "S", "clave": 7, "in": answers, "chat": chat}
    [record] = check(row, shape="columns", columns=columns)
    assert told(record) == expected
    assert record["id"] == ("7" if "id" in columns else "")


def test_columns_that_nothing_uses_are_counted() -> None:
    counts = flaws()
    row = {"question": "Q", "answer": "A", "source": "web", "score": None}
    check(row, row, counts=counts)
    check({"messages": [{**ASKED, "name": "Ana"}, ANSWERED]}, counts=counts)
    assert counts.left_out == {"source": 2, "messages[].name (user)": 1}


def test_calls_and_tools_are_kept_in_their_order() -> None:
    messages = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "x", "name": "w", "content": "20"},
        ANSWERED,
    ]
    tools = [{"type": "function", "function": {"name": "w", "description": "é"}}]
    [record] = check({"messages": messages, "tools": tools})
    assert record["messages"][1]["content"] == ""
    assert '{"city": "Paris", "at": 1}' in record["messages"][1]["extra"]
    assert extra(record, 1) == {"tool_calls": [CALL]}
    assert extra(record, 2) == {"name": "w", "tool_call_id": "x"}
    assert record["messages"][3]["extra"] == ""
    assert json.loads(record["tools"]) == tools
    assert check({"messages": messages, "tools": json.dumps(tools)})[0]["tools"] == record["tools"]


def test_arguments_given_as_text_become_the_object() -> None:
    function = {"name": "w", "arguments": json.dumps(CALL["function"]["arguments"])}
    for call in ({"type": "function", "function": function}, function):
        [record] = check({"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]})
        assert extra(record, 1) == {"tool_calls": [CALL]}


def test_a_function_call_of_sharegpt_becomes_a_tool_call() -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "20"},
        {"from": "gpt", "value": "20 degrees"},
    ]
    [record] = check({"conversations": turns, "tools": "[]"})
    assert [role for role, _ in told(record)] == ["user", "assistant", "tool", "assistant"]
    assert extra(record, 1) == {"tool_calls": [CALL]}
    assert record["tools"] == ""


def test_an_answer_may_be_kept_out_of_the_loss() -> None:
    answers = [{**ANSWERED, "train": False}, {**ANSWERED, "weight": 0}, ANSWERED]
    messages = [message for answer in answers for message in (ASKED, answer)]
    [record] = check({"messages": messages})
    assert [m["train"] for m in record["messages"]] == [True, False, True, False, True, True]


def test_thoughts_are_kept_and_other_ends_stay() -> None:
    messages = [ASKED, {**ANSWERED, "reasoning_content": "hm"}, ASKED]
    [record] = check({"messages": messages, "id": 0, "metadata": {"b": 1, "a": None}})
    assert extra(record, 1) == {"reasoning_content": "hm"}
    assert told(record)[-1] == ("user", "Hi")
    assert (record["id"], record["metadata"]) == ("0", '{"a": null, "b": 1}')


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "record is [1]: give an object"),
        ({}, "columns is []: no known shape has these columns (messages: messages; sharegpt"),
        ({"pregunta": "x"}, "columns is ['pregunta']: no known shape"),
        ({"conversations": "x"}, "conversations is 'x': messages given as text must be the JSON"),
        ({"conversations": 7}, "conversations is 7: give a list"),
        (
            {"conversations": [{"from": "me", "value": "x"}]},
            "[0].from is 'me': known roles: system",
        ),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "conversations[0].value is 1"),
        ({"instruction": "", "output": "x"}, "instruction is '': the prompt is empty"),
        ({"question": None, "answer": "x"}, "question is None: the prompt is empty"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history is [['a']]"),
        ({"message_id": "a", "role": "prompter", "text": "x"}, "set dataset.shape=oasst"),
    ],
)
def test_what_has_no_known_shape_is_refused(row: Any, message: str) -> None:
    with pytest.raises(CapasError, match=re.escape(message)) as refusal:
        check(row)
    assert str(refusal.value).startswith("mine.jsonl, line 1: ")


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(CapasError, match=r"\['a'\]: no such column.*names pregunta"):
        check({"a": "x"}, shape="columns", columns={"user": "pregunta", "assistant": "a"})
    with pytest.raises(
        CapasError, match=r"question is \['a'\]: missing; the shape question_answer"
    ):
        check({"a": "x"}, shape="question_answer")


def node(name: str, parent: str | None, role: str, rank: int | None, **more: Any) -> dict[str, Any]:
    row = {"message_id": name, "parent_id": parent, "role": role, "text": name, "rank": rank}
    return {**row, **more}


def test_the_best_ranked_thread_of_each_tree_is_taken() -> None:
    rows = [
        node("b2", "a", "assistant", 0),
        node("b1", "a", "assistant", 1),
        node("c", "b2", "prompter", None),
        node("a", None, "prompter", None),
        node("gone", "a", "assistant", 0, deleted=True),
        node("below", "gone", "prompter", None),
        node("lone", None, "prompter", None),
        node("lost", "nowhere", "assistant", 0),
        {"text": "no message_id"},
    ]
    found = threads(Row("x", "record", n, row) for n, row in enumerate(rows, 1))
    counts = flaws(malformed="drop", no_answer="drop")
    [record] = check(*(row.value for row in found), shape="messages", counts=counts)
    assert told(record) == [("user", "a"), ("assistant", "b2")]
    assert record["id"] == "a"
    assert counts.dropped == {"malformed": 2, "no_answer": 1}
