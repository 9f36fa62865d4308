"""What is wrong with a record: refused with its place, or treated as the stated policy says, and counted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from checking import check, flaws

from capas.core.errors import CapasError
from capas.dataset.flaws import NUM_EXAMPLES

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALLS = [{"function": {"name": "f", "arguments": {}}}]
CALLING = {"role": "assistant", "tool_calls": CALLS}
# Records of the kit whose treatment is a policy: its kind, and the messages left under each. Without a kind
# they are kept exactly and a later stage decides (format cuts what ends with the user; overflow).
POLICIES: dict[str, dict[str, dict[str, int]]] = {
    "st-user-user": {"consecutive_roles": {"merge": 2, "keep": 3, "drop": 0}},
    "st-assistant-assistant": {"consecutive_roles": {"merge": 2, "keep": 3, "drop": 0}},
    "st-system-middle": {"system_in_the_middle": {"keep": 5, "drop": 0}},
    "ctl-think": {},
    "st-ends-user": {},
    "tx-nul": {},
    "sz-long-assistant": {},
    "sz-long-word": {},
    "rec-dup-ws": {},
    "rec-prompt-completion": {},
}


def hostile(kit: Path) -> list[dict[str, Any]]:
    lines = (kit / "hostile.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ('[{"role": "user"', 'messages is \'[{"role": "user"\': messages given as text must be'),
        ('[{"role": "user"}]', "messages[0].content is None"),
        ([], "messages is []: give a list"),
        (None, "messages is None: give a list"),
        (["Hi", "Hello"], "messages[0] is 'Hi': give an object"),
        ([{"content": "Hi"}, ANSWERED], "messages[0].role is None: known roles: system"),
        ([{"role": "user ", "content": "Hi"}, ANSWERED], "messages[0].role is 'user '"),
        ([{"role": "user"}, ANSWERED], "messages[0].content is None"),
        ([{"role": "user", "content": 42}, ANSWERED], "messages[0].content is 42"),
        ([ASKED, {"role": "assistant", "content": float("nan")}], "[1].content is nan"),
        ([ASKED, {"role": "assistant", "content": {"text": "x"}}], "content is {'text'"),
        ([ASKED, {"role": "assistant", "content": " \n"}], "[1].content is ' \\n': an empty"),
        ([SYSTEM], "messages[-1].role is 'system': no assistant message"),
        ([ASKED, {**ANSWERED, "train": False}], "no assistant message to train on"),
        ([ASKED, {**ANSWERED, "train": "no"}], "messages[1].train is 'no'"),
        ([ASKED, {**ANSWERED, "weight": 0.5}], "messages[1].weight is 0.5"),
        ([{"role": "user", "content": "a\ud83d"}, ANSWERED], "character 2 is half of a surrogate"),
        ([{"role": "user", "content": "a\udce9"}, ANSWERED], "character 2 is byte 0xE9"),
        ([ASKED, {"role": "tool", "content": "1"}, ANSWERED], "messages[1].role is 'tool'"),
        ([ASKED, {**CALLING, "tool_calls": "x"}], "messages[1].tool_calls is 'x'"),
        ([ASKED, {**CALLING, "tool_calls": [{}]}], "messages[1].tool_calls[0] is {}"),
        ([ASKED, {**ANSWERED, "reasoning_content": 1}], "messages[1].reasoning_content is 1"),
        ([ASKED, {**ANSWERED, "content": None}], "[1].content is None: an empty answer"),
        ([{"role": "text", "content": "a", "train": False}], "the text is not to be trained"),
        ([{"role": "text", "content": "a"}, ANSWERED], "a plain text must be the only"),
        ([ASKED, {"role": "text", "content": "a"}], "messages[1].role is 'text'"),
        ([ASKED, ASKED, ANSWERED], "messages[1].role is 'user': the previous message"),
        ([ASKED, ANSWERED, SYSTEM, ASKED, ANSWERED], "messages[2].role is 'system'"),
    ],
)
def test_a_bad_conversation_is_refused(messages: Any, message: str) -> None:
    with pytest.raises(CapasError, match=re.escape(message)) as refusal:
        check({"id": "ok", "messages": [ASKED, ANSWERED]}, {"id": "a", "messages": messages})
    assert str(refusal.value).startswith("mine.jsonl, line 2 (id 'a'): ")
    assert re.search(r"Or set dataset\.flaws\.\w+ to ", str(refusal.value))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "f", "arguments": "{"}, "arguments is '{': arguments given as text must be JSON"),
        ({"name": "f", "arguments": [1]}, "arguments is [1]: give an object"),
        ({"name": "f", "arguments": {"x": float("nan")}}, "it is not JSON"),
        ({"name": "", "arguments": {}}, "give {type, function"),
    ],
)
def test_a_bad_call_is_refused(call: Any, message: str) -> None:
    with pytest.raises(CapasError, match=re.escape(message)):
        check({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": call}]}]})


@pytest.mark.parametrize(
    ("record", "message"),
    [({"metadata": {"x": float("nan")}}, "metadata is"), ({"tools": "{"}, "tools is '{'")],
)
def test_what_describes_a_record_must_be_json(record: dict[str, Any], message: str) -> None:
    with pytest.raises(CapasError, match=re.escape(message)):
        check({"messages": [ASKED, ANSWERED], **record})


def test_every_hostile_record_is_accepted_or_refused_with_its_place(kit: Path) -> None:
    found = hostile(kit)
    for case in found:
        if case["expect"] == "reject":
            with pytest.raises(CapasError, match=r"^mine\.jsonl, line 1: .* is .*:") as refusal:
                check(case["rec"])
            assert "Or set dataset.flaws." in str(refusal.value), case["id"]
        elif case["expect"] == "accept" or not POLICIES[case["id"]]:
            assert len(check(case["rec"])) == 1, case["id"]
    assert len(found) == 48
    assert {case["id"] for case in found if case["expect"] == "policy"} == set(POLICIES)


@pytest.mark.parametrize("name", [name for name, policies in POLICIES.items() if policies])
def test_a_hostile_record_follows_each_policy(kit: Path, name: str) -> None:
    [record] = [case["rec"] for case in hostile(kit) if case["id"] == name]
    [(kind, outcomes)] = POLICIES[name].items()
    with pytest.raises(CapasError, match=f"dataset.flaws.{kind}"):
        check(record)
    for policy, num_messages in outcomes.items():
        counts = flaws(**{kind: policy})
        found = check(record, counts=counts)
        assert [len(r["messages"]) for r in found] == ([num_messages] if num_messages else [])
        assert counts.dropped.total() + counts.repaired.total() == 1, policy


def test_contents_of_hostile_records_are_kept_exactly(kit: Path) -> None:
    for case in hostile(kit):
        if (
            case["expect"] == "accept"
            and isinstance(case["rec"], dict)
            and "messages" in case["rec"]
        ):
            [record] = check(case["rec"])
            given = [m["content"] or "" for m in case["rec"]["messages"]]
            assert [m["content"] for m in record["messages"]] == given, case["id"]


def test_messages_are_merged_by_a_blank_line() -> None:
    counts = flaws(consecutive_roles="merge")
    [record] = check({"messages": [SYSTEM, SYSTEM, ASKED, ASKED, ASKED, ANSWERED]}, counts=counts)
    contents = [m["content"] for m in record["messages"]]
    assert contents == ["Be brief.\n\nBe brief.", "Hi\n\nHi\n\nHi", "Hello"]
    with pytest.raises(CapasError, match="cannot be merged"):
        check({"messages": [ASKED, CALLING, ANSWERED]}, counts=counts)


def test_invalid_text_is_replaced_where_it_is_stated() -> None:
    counts = flaws(invalid_text="replace")
    messages = [{"role": "user", "content": "a\ud83d\udce9b"}, ANSWERED]
    [record] = check({"messages": messages}, counts=counts)
    assert record["messages"][0]["content"] == "a\ufffd\ufffdb"
    assert counts.repaired == {"invalid_text": 1}


def test_what_is_dropped_is_counted_with_examples_within_a_budget() -> None:
    counts = flaws(0.5, no_answer="drop", malformed="drop")
    check(*[{"id": f"r{n}", "messages": [ASKED]} for n in range(30)], counts=counts)
    check(*[{"messages": [ASKED, ANSWERED]}] * 30, counts=counts)
    counts.check()
    assert counts.dropped == {"no_answer": 30}
    assert len(counts.examples["no_answer"]) == NUM_EXAMPLES
    first = counts.examples["no_answer"][0]
    assert {k: first[k] for k in ("file", "at", "id", "field")} == {
        "file": "mine.jsonl",
        "at": "line 1",
        "id": "r0",
        "field": "messages[-1].role",
    }
    check(7, counts=counts)
    with pytest.raises(
        CapasError, match=r"31 of 61 records.*\(malformed 1, no_answer 30\).*0\.508197"
    ):
        counts.check()


def test_deep_and_broken_values_are_shown_and_counted_as_text() -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    counts = flaws(malformed="drop", invalid_text="drop")
    messages = [ASKED, ANSWERED]
    odd = {"messages": messages, "id": "a\ud83d"}
    check(deep, {"messages": messages, "\ud83d": 1}, odd, counts=counts)
    assert counts.dropped == {"malformed": 1, "invalid_text": 1}
    assert counts.examples["malformed"][0]["value"] == "[[[[[...]]]]]"
    assert counts.examples["invalid_text"][0]["id"] == "a\\ud83d"
    assert counts.left_out == {"\\ud83d": 1}


def test_an_empty_user_message_is_kept() -> None:
    [record] = check({"messages": [{"role": "user", "content": ""}, ANSWERED]})
    assert record["messages"][0]["content"] == ""
