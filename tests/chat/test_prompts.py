"""The prompt that a generation starts from begins the ids that were trained, or the record is refused."""

from pathlib import Path
from typing import Any

import pytest
from conftest import say, template_text
from formatted import load, split, trained
from test_tools import THINKING

from capas.chat.template import RecordRefusal
from capas.core.errors import CapasError

CHATML = template_text("chatml")
THOUGHTS = (
    "{%- set thought = m.reasoning_content or '' %}"
    "{%- if '</think>' in m.content %}{%- set thought = m.content.split('</think>')[0][7:] %}{% endif %}"
    "{%- set answer = m.content.split('</think>')[-1].lstrip('\\n') %}"
)
# As Qwen 3.5: the prompt closes an empty thought; the last answer has its own, earlier ones have none.
CLOSING = (
    """{%- for m in messages %}{% if m.role == 'assistant' %}"""
    + THOUGHTS
    + """{{- '<|im_start|>assistant\\n' }}
{%- if loop.last %}{{ '<think>\\n' + thought | trim + '\\n</think>\\n\\n' }}{% endif %}
{{- answer + '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"""
)
# The prompt opens a thought, and every answer is copied: one with a thought in its content goes on.
OPENING = CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n")
# As DeepSeek R1: the prompt opens a thought, and no answer keeps its own.
LOSING = OPENING.replace("message.content +", "message.content.split('</think>')[-1] +")
QUESTION = {"role": "user", "content": "2+2?"}


def thinking(thought: str = "It is four.", content: str = "4") -> list[dict[str, Any]]:
    return [QUESTION, {"role": "assistant", "content": content, "reasoning_content": thought}]


def in_content(thought: str, answer: str = "4") -> list[dict[str, Any]]:
    content = f"<think>\n{thought}\n</think>\n\n{answer}"
    return [QUESTION, {"role": "assistant", "content": content}]


def test_a_thought_that_the_prompt_has_closed_already_is_refused(tiny_tools_dir: Path) -> None:
    chat = load(CLOSING, tiny_tools_dir)
    _, (record,) = split(chat, [say("2+2?", "4")])
    assert trained(chat, record) == ["4<|im_end|>"]
    assert chat.decode(record["prompt_ids"]).endswith("assistant\n<think>\n\n</think>\n\n")
    for told in (thinking(), in_content("It is four.")):
        with pytest.raises(CapasError, match=r"record '0': the prompt for message 1.*after"):
            split(chat, [told])
    formatter, records = split(chat, [thinking(), say("a", "b")], refused="drop")
    assert ([r["id"] for r in records], formatter.refused.count) == (["1"], 1)


def test_earlier_answers_that_nobody_asks_for_so_can_stay_untrained(tiny_tools_dir: Path) -> None:
    chat, told = load(CLOSING, tiny_tools_dir), say("a", "b", "c", "d")
    with pytest.raises(
        CapasError, match=r"prompt for message 1 .*train_on=last_assistant to leave them"
    ):
        split(chat, [told])
    _, (record,) = split(chat, [told], "last_assistant")
    assert trained(chat, record) == ["d<|im_end|>"]


def test_a_prompt_may_open_the_thought(tiny_tools_dir: Path) -> None:
    chat = load(OPENING, tiny_tools_dir)
    _, (record,) = split(chat, [in_content("It is four.")])
    assert chat.decode(record["prompt_ids"]).endswith("assistant\n<think>\n")
    assert trained(chat, record) == ["It is four.\n</think>\n\n4<|im_end|>"]
    with pytest.raises(CapasError, match="the prompt goes on with '<think>"):
        split(chat, [say("2+2?", "4")])


def test_a_template_that_asks_for_thoughts_and_keeps_none_is_refused(tiny_tools_dir: Path) -> None:
    with pytest.raises(CapasError, match="prompt is not a prefix of its conversation"):
        load(LOSING, tiny_tools_dir)


@pytest.mark.parametrize("answer", ["\nHello", "\n\n x", " \n", "\u0301e"])
def test_an_answer_begins_with_a_token_of_its_own(answer: str, tiny_tools_dir: Path) -> None:
    chat, told = load(CHATML, tiny_tools_dir), say("Hi", answer + ".", "And?", answer + "!")
    _, (record,) = split(chat, [told])
    assert record["input_ids"][: len(record["prompt_ids"])] == record["prompt_ids"]
    assert record["prompt_ids"] == chat.prompt_ids(told[:-1])
    assert trained(chat, record) == [f"{answer}.<|im_end|>", f"{answer}!<|im_end|>"]
    assert chat.decode(record["input_ids"]) == chat.render(told)


def test_a_turn_of_two_answers_is_asked_for_as_a_whole(tiny_tools_dir: Path) -> None:
    chat = load(template_text("mistral"), tiny_tools_dir)
    _, (record,) = split(chat, [[*say("a", "b"), *say("-", "c")[1:]]])
    assert chat.decode(record["prompt_ids"]) == "<bos>[INST] a[/INST]"
    assert record["reference"].strip() == "b\n\nc"


def test_a_conversation_that_begins_with_an_answer(tiny_tools_dir: Path) -> None:
    for content in ("Hello", "<think>\na\n</think>\n\nHello"):
        chat = load(CHATML, tiny_tools_dir)
        _, (record,) = split(chat, [[{"role": "assistant", "content": content}]])
        assert chat.decode(record["prompt_ids"]) == "<|im_start|>assistant\n"
        assert trained(chat, record) == [content + "<|im_end|>"]
    with pytest.raises(CapasError, match="refuses the conversation"):
        split(
            load(template_text("qwen"), tiny_tools_dir), [[{"role": "assistant", "content": "a"}]]
        )


@pytest.mark.parametrize("template", [THINKING, CHATML])
def test_batches_in_which_every_record_is_special(template: str, tiny_tools_dir: Path) -> None:
    chat = load(template, tiny_tools_dir)
    told = [in_content(f"It is {n}.", f"{n}") for n in range(3)]
    _, records = split(chat, told)
    assert [trained(chat, r) for r in records] == [
        [f"<think>\nIt is {n}.\n</think>\n\n{n}<|im_end|>"] for n in range(3)
    ]
    formatter, records = split(chat, [thinking(), [QUESTION]], refused="drop")  # nothing is left
    assert (records, formatter.refused.count) == ([], 2)


def test_a_thought_that_has_no_place_is_refused(tiny_tools_dir: Path) -> None:
    chat = load(CHATML, tiny_tools_dir)
    for told in (thinking(), [*thinking(), *say("a", "b")]):
        with pytest.raises(RecordRefusal, match=r"drops the thought .* of message 1"):
            chat.encode(told)
    assert chat.encode(thinking(thought=" \n")).num_thoughts_dropped == 0
    no_place = CHATML.replace("message.content +", "message.content.split('</think>')[-1] +")
    with pytest.raises(RecordRefusal, match=r"drops the thought .* of message 1"):
        load(no_place, tiny_tools_dir).encode(in_content("four"))


def test_thoughts_of_earlier_turns_are_counted(tiny_tools_dir: Path) -> None:
    template = THINKING.replace("if '</think>' in m.content", "if '</think>' in m.content").replace(
        "else '<think>\\n\\n'", "else '<think>\\n' + (m.reasoning_content or '') + '\\n'"
    )
    chat = load(template, tiny_tools_dir)
    formatter, records = split(chat, [[*thinking("4"), *thinking("Once more: 4")]])
    assert formatter.facts()["thoughts_dropped"] == 1
    (first, second) = trained(chat, records[0])
    assert (first, second) == ("4<|im_end|>", "<think>\nOnce more: 4\n</think>\n\n4<|im_end|>")
