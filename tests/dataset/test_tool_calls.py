"""Tool calls and tools under the names that data sets in use give them, and what is refused."""

import json
import re
from typing import Any

import pytest
from checking import check

from capas.core.errors import CapasError
from capas.dataset.names import ARGUMENTS

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CITY = {"city": "Paris", "at": 1}
CALL = {"type": "function", "function": {"name": "w", "arguments": CITY}}


def stored(call: Any, key: str = "tool_calls") -> Any:
    """The calls of an answer as the record keeps them."""
    [record] = check({"messages": [ASKED, {"role": "assistant", key: call}]})
    return json.loads(record["messages"][1]["extra"])["tool_calls"]


@pytest.mark.parametrize("key", ARGUMENTS)
def test_arguments_are_read_under_every_name_in_use(key: str) -> None:
    for arguments in (CITY, json.dumps(CITY)):
        function = {"name": "w", key: arguments}
        beside = {"type": "function", "function": {"name": "w"}, key: arguments}
        for call in ({"type": "function", "function": function}, function, beside):
            assert stored([call]) == [CALL]


@pytest.mark.parametrize(
    "call",
    [
        {"function": "w", "arguments": CITY},
        {"type": "tool_use", "name": "w", "input": CITY},
        {"tool_name": "w", "args": CITY, "parameters": None},
    ],
)
def test_calls_of_other_forms_are_read(call: Any) -> None:
    assert stored([call]) == [CALL]


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "function_calls", "tool_call"])
def test_calls_are_read_under_every_name_in_use(key: str) -> None:
    for calls in ([CALL], CALL["function"], json.dumps([CALL])):
        assert stored(calls, key) == [CALL]


def test_a_call_without_arguments_holds_nothing_else() -> None:
    for call in ({"name": "w"}, {"id": "x", "function": {"name": "w", "arguments": None}}):
        assert stored([call])[0]["function"] == {"name": "w", "arguments": {}}


def test_an_id_and_the_order_of_keys_are_kept() -> None:
    call = {"function": {"arguments": CITY, "strict": True, "name": "w"}, "id": "x"}
    assert json.dumps(stored([call])) == json.dumps([call])
    assert stored([{"name": "w", "arguments": CITY, "id": "x"}]) == [{**CALL, "id": "x"}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "w", "values": CITY}, "tool_calls[0] is {'name'"),
        ({"name": "w", "values": CITY}, "besides its name it has values. Name the key arguments"),
        ({"function": {"name": "w", "city": "Paris"}}, "besides its name it has city."),
        ({"function": {"name": "w"}, "payload": CITY}, "besides its name it has payload."),
        ({"name": "w", "args": {}, "input": {}}, "more than once: args, input"),
        ({"function": {"name": "w", "args": {}}, "args": {}}, "tool_calls[0].args is {}"),
        ({"name": "w", "input": "["}, "tool_calls[0].input is '[': arguments given as text must"),
        ({"name": "w", "kwargs": "[1]"}, "tool_calls[0].kwargs is '[1]': give an object"),
        ({"arguments": CITY}, "the function has no name"),
        ("w", "tool_calls[0] is 'w': give {type, function"),
    ],
)
def test_a_call_that_cannot_be_read_is_refused_with_its_place(call: Any, message: str) -> None:
    with pytest.raises(CapasError, match=re.escape(message)) as refusal:
        stored([call])
    assert "dataset.flaws.bad_call" in str(refusal.value)


def test_tools_are_read_under_every_name_in_use() -> None:
    function = {"name": "w", "parameters": {}}
    wrapped = [{"type": "function", "function": function}]
    for key, tools in {
        "tools": wrapped,
        "functions": [function],
        "available_tools": wrapped,
    }.items():
        for given in (tools, json.dumps(tools)):
            [record] = check({"messages": [ASKED, ANSWERED], key: given})
            assert json.loads(record["tools"]) == wrapped, key
    with pytest.raises(CapasError, match="tools and functions are synonyms but have different"):
        check({"messages": [ASKED, ANSWERED], "tools": wrapped, "functions": [function]})
    with pytest.raises(CapasError, match=r"tools is \{'name': 'w'\}: give a list"):
        check({"messages": [ASKED, ANSWERED], "tools": {"name": "w"}})


def test_a_result_under_the_role_function_is_one_of_a_tool() -> None:
    calling = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "w", "arguments": "{}"},
    }
    result = {"role": "function", "name": "w", "content": "20"}
    [record] = check({"messages": [ASKED, calling, result, ANSWERED]})
    assert [m["role"] for m in record["messages"]] == ["user", "assistant", "tool", "assistant"]
