"""Roles, thoughts, what is trained and contents under the names that data sets in use give them."""

import json
import re
from typing import Any

import pytest
from checking import check, flaws

from capas.core.errors import CapasError
from capas.dataset.names import THOUGHTS, TRAINED, UNCLEAR, UNTRAINED

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
PAIR = {"question": "Q", "answer": "A"}


def roles(*names: str, mapped: Any = None) -> list[str]:
    turns = [{"role": name, "content": "x"} for name in names]
    shared = [{"from": name, "value": "x"} for name in names]
    found = [
        [message["role"] for message in check(row, roles=mapped)[0]["messages"]]
        for row in ({"messages": turns}, {"conversations": shared})
    ]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("asks", ["user", "Human", "HUMAN", "prompter", "cliente"])
@pytest.mark.parametrize("answers", ["assistant", "gpt", "model", "Bot", "chatbot", "agente"])
def test_roles_are_read_under_every_name_in_use(asks: str, answers: str) -> None:
    mapped = {"cliente": "user", "agente": "assistant"}
    expected = ["system", "user", "assistant"]
    assert roles("developer", asks, answers, mapped=mapped) == expected


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(
        CapasError, match=r"messages\[0\].role is 'cliente': known roles: .*dataset.roles"
    ):
        roles("cliente", "assistant")
    with pytest.raises(CapasError, match=r"dataset\.flaws\.unknown_role"):
        roles("user ", "assistant")


@pytest.mark.parametrize("key", [*TRAINED, *UNTRAINED])
def test_what_is_trained_is_read_under_every_name_in_use(key: str) -> None:
    off: tuple[Any, ...] = (True, 1, 1.0) if key in UNTRAINED else (False, 0, 0.0)
    for value in off:
        messages = [ASKED, {**ANSWERED, key: value}, ASKED, {**ANSWERED, key: not value}]
        [record] = check({"messages": messages})
        assert [m["train"] for m in record["messages"]] == [True, False, True, True]
    [record] = check({"messages": [{**ASKED, key: off[0]}, {**ANSWERED, key: None}]})
    assert [m["train"] for m in record["messages"]] == [True, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED, {**ANSWERED, "loss": [0, 1]}]}, "messages[1].loss is [0, 1]: give true"),
        ({"messages": [ASKED, {**ANSWERED, "loss_scale": 0.5}]}, "messages[1].loss_scale is 0.5"),
        ({"messages": [ASKED, {**ANSWERED, "train": True, "masked": True}]}, "contradict each other"),
        ({"messages": [{**ASKED, "train": True}, ANSWERED]}, "user messages are never trained"),
        ({**PAIR, "loss_mask": [0, 1]}, "loss_mask is [0, 1]: this key selects what is trained"),
        ({**PAIR, "weight": "0.5"}, "weight is '0.5': this key selects"),
        ({**PAIR, "train_on_inputs": True}, "train_on_inputs is True: this key selects"),
        *(({"messages": [ASKED, {**ANSWERED, key: 1}]}, f"[1].{key} is 1: this key is") for key in UNCLEAR),
        ({"conversations": [{"from": "user", "value": "x"}, {"from": "gpt", "value": "y", "loss": 2}]},
         "conversations[1].loss is 2"),
    ],
)  # fmt: skip
def test_what_asks_for_more_than_whole_answers_is_refused(row: Any, message: str) -> None:
    with pytest.raises(CapasError, match=re.escape(message)) as refusal:
        check(row)
    assert "dataset.flaws.unclear_training" in str(refusal.value)


def test_a_record_may_say_that_it_is_trained_as_a_whole() -> None:
    found = flaws()
    [record] = check({**PAIR, "weight": 1.0, "masked": False, "mask_history": None}, counts=found)
    assert record["messages"][1]["train"]
    assert not found.left_out


@pytest.mark.parametrize("key", THOUGHTS)
def test_thoughts_are_read_under_every_name_in_use(key: str) -> None:
    for row in ({"messages": [ASKED, {**ANSWERED, key: "hm"}]}, {**PAIR, key: "hm"}):
        [record] = check(row)
        assert json.loads(record["messages"][1]["extra"]) == {"reasoning_content": "hm"}
    [record] = check({**PAIR, key: ""})
    assert record["messages"][1]["extra"] == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED, {**ANSWERED, "thinking": ["a"]}]}, "messages[1].thinking is ['a']"),
        ({"messages": [ASKED, {**ANSWERED, "thinking": "a", "reasoning": "b"}]},
         "thinking and reasoning are synonyms but have different"),
        ({"messages": [{**ASKED, "thinking": "a"}, ANSWERED]}, "only assistant messages may have"),
        ({"messages": [ASKED, ANSWERED] * 2, "thinking": "a"}, "move it into its answer"),
        ({**PAIR, "reasoning": 7}, "reasoning is 7: give it as text"),
    ],
)  # fmt: skip
def test_a_thought_that_cannot_be_placed_is_refused(row: Any, message: str) -> None:
    with pytest.raises(CapasError, match=re.escape(message)):
        check(row)


def test_a_thought_may_be_a_column() -> None:
    columns = {"user": "question", "assistant": "answer", "reasoning_content": "por"}
    [record] = check({**PAIR, "por": "hm"}, shape="columns", columns=columns)
    assert json.loads(record["messages"][1]["extra"]) == {"reasoning_content": "hm"}


def test_a_content_of_text_parts_is_one_text() -> None:
    parts = [
        {"type": "text", "text": "He"},
        {"type": "text", "text": "llo", "cache_control": {}},
        "!",
    ]
    found = flaws()
    messages = [
        ASKED,
        {"role": "model", "parts": [{"text": "So"}]},
        ASKED,
        {**ANSWERED, "content": parts},
    ]
    [record] = check({"messages": messages}, counts=found)
    assert [m["content"] for m in record["messages"]] == ["Hi", "So", "Hi", "Hello!"]
    assert found.left_out == {"messages[].content[].cache_control": 1}
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(CapasError, match=r"\[0\].content\[0\] is 'a part of the type image_url'"):
        check({"messages": [{**ASKED, "content": image}, ANSWERED]})


def test_a_system_prompt_beside_the_messages_is_read() -> None:
    for key in ("system", "system_prompt"):
        for row in ({"messages": [ASKED, ANSWERED]}, PAIR, {"prompt": "P", "completion": "C"}):
            [record] = check({**row, key: "S"})
            assert (record["messages"][0]["role"], record["messages"][0]["content"]) == (
                "system",
                "S",
            )
    own = {"role": "system", "content": "Own"}
    with pytest.raises(CapasError, match="system is 'S': the messages begin with a different"):
        check({"messages": [own, ASKED, ANSWERED], "system": "S"})
    assert len(check({"messages": [own, ASKED, ANSWERED], "system": "Own"})[0]["messages"]) == 3


@pytest.mark.parametrize("value", [{"a": ["b"]}, ["b"], 7, False, float("nan")])
@pytest.mark.parametrize(
    "column", ["system", "user", "assistant", "text", "messages", "tools", "id"]
)
def test_no_cell_of_another_type_becomes_text(column: str, value: Any) -> None:
    """Neither alone nor joined with a text. (An integer is an id.)"""
    row = {"q": "Q", "a": "A", "c": value, "t": "T"}
    base = {} if column in ("text", "messages") else {"user": "q", "assistant": "a"}
    names: list[Any] = ["c"] if column in ("messages", "tools", "id") else ["c", ["t", "c"]]
    for name in names if (column, value) != ("id", 7) else ():
        with pytest.raises(
            CapasError, match=r"^mine.jsonl, line 1.*\bis .*: .*\nOr set dataset.flaws"
        ):
            check(row, shape="columns", columns={**base, column: name})


def test_columns_that_are_not_mapped_are_counted_whatever_their_name() -> None:
    counts = flaws()
    row = {
        "q": "Q",
        "in": {"a": "A", "b": "B"},
        "tools": [1],
        "metadata": {"x": 1},
        "loss": 0.5,
        "e": "",
    }
    check(row, shape="columns", columns={"user": "q", "assistant": "in.a"}, counts=counts)
    assert counts.left_out == {
        "in.b": 1,
        "loss": 1,
        "metadata (not in dataset.columns)": 1,
        "tools (not in dataset.columns)": 1,
    }


def test_a_conversation_that_begins_with_an_answer_follows_its_rule() -> None:
    system = {"role": "system", "content": "S"}
    with pytest.raises(
        CapasError, match=r"messages\[1\].role is 'assistant': the conversation begins"
    ):
        check({"messages": [system, ANSWERED, ASKED, ANSWERED]})
    counts = flaws(assistant_first="skip", no_answer="drop")
    found = check(
        {"messages": [system, ANSWERED, ASKED, ANSWERED]},
        {"messages": [ANSWERED]},
        {"messages": [system, ANSWERED]},
        counts=counts,
    )
    assert [[m["role"] for m in r["messages"]] for r in found] == [["system", "user", "assistant"]]
    assert (counts.repaired, counts.dropped) == ({"assistant_first": 3}, {"no_answer": 2})
