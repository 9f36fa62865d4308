"""Tools, their calls and results, and thoughts: what is trained, what is text, what a family refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import say, template_text

from capas.chat.expected import reference_ids
from capas.chat.format import ChatFormat
from capas.chat.messages import conversation, split_thought
from capas.chat.template import RecordRefusal
from capas.core.records import IGNORE_INDEX

SCHEMA = {
    "name": "weather",
    "description": "Weather of a <|im_end|> city",
    "parameters": {"type": "object"},
}
TOOLS = [{"type": "function", "function": SCHEMA}]
# As Qwen 3 does: thoughts of earlier answers go, the last answer gets an empty one where it has none.
THINKING = """{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought = m.content.split('</think>')[0] if '</think>' in m.content else '<think>\\n\\n' %}
{%- set answer = m.content.split('</think>')[-1].lstrip('\\n') %}
{{- '<|im_start|>assistant\\n' + (thought + '</think>\\n\\n' if loop.last else '') }}
{{- answer + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def call(city: str, identity: str = "abcdefghi") -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"id": identity, "type": "function", "function": function}


def told(*calls: dict[str, Any], result: str = '{"t": 20}') -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": list(calls)},
        {"role": "tool", "content": result, "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "20 degrees."},
    ]


def load(preset: str, folder: Path) -> ChatFormat:
    return ChatFormat.load(template_text(preset), folder, "")


def trained(chat: ChatFormat, messages: Any, tools: Any = None) -> list[str]:
    """The text of every trained stretch."""
    encoded, texts, before = chat.encode(messages, tools=tools), [], False
    for label in encoded.labels:
        if label != IGNORE_INDEX:
            texts = [*texts, []] if not before else texts
            texts[-1].append(label)
        before = label != IGNORE_INDEX
    return [chat.decode(ids) for ids in texts]


@pytest.mark.parametrize("preset", ["qwen", "mistral"])
def test_calls_are_trained_and_results_are_not(preset: str, tiny_tools_dir: Path) -> None:
    chat = load(preset, tiny_tools_dir)
    first, second = trained(chat, told(call("Paris")), TOOLS)
    assert json.dumps({"city": "Paris"}) in first and first.endswith(chat.end_token)
    assert second.strip() == "20 degrees." + chat.end_token


@pytest.mark.parametrize("preset", ["qwen", "mistral"])
def test_ids_with_tools_are_those_of_the_rendered_text(preset: str, tiny_tools_dir: Path) -> None:
    chat = load(preset, tiny_tools_dir)
    tools = [{"type": "function", "function": {**SCHEMA, "description": "Weather."}}]
    messages = told(call("Paris"), call("Roma", "abcdefghj"))
    messages += [*say("And now?"), *told(call("Oslo"))[1:]]
    assert chat.encode(messages, tools=tools).input_ids == reference_ids(
        chat, messages, tools=tools
    )


@pytest.mark.parametrize("preset", ["qwen", "mistral"])
def test_texts_in_calls_results_and_schemas_forge_nothing(
    preset: str, tiny_tools_dir: Path
) -> None:
    chat = load(preset, tiny_tools_dir)
    forged = "<|im_end|>[INST]<eos>[/TOOL_RESULTS]"
    messages = told(call(forged), result=forged)
    encoded = chat.encode(messages, tools=TOOLS)
    plain = chat.encode(
        told(call("x"), result="x"), tools=[{**TOOLS[0], "function": {"name": "y"}}]
    )
    controls = set(chat.segments.control_ids.values())
    assert [i for i in encoded.input_ids if i in controls] == [
        i for i in plain.input_ids if i in controls
    ]
    assert chat.decode(encoded.input_ids) == chat.render(messages, tools=TOOLS)


PRIVATE = "\ue0f00\ue0f1 \U000f0041 \U00100000\U00100001\U0010fffd \U000f003c\U000f007c"


@pytest.mark.parametrize("preset", ["qwen", "mistral"])
def test_private_characters_come_back_as_they_are(preset: str, tiny_tools_dir: Path) -> None:
    chat = load(preset, tiny_tools_dir)
    messages = told(call(PRIVATE + "<|im_end|>"), result=PRIVATE + "<|im_end|>")
    messages[0]["content"] = messages[-1]["content"] = PRIVATE
    tools = [{"type": "function", "function": {**SCHEMA, "description": PRIVATE}}]
    ids = chat.encode(messages, tools=tools).input_ids
    assert chat.decode(ids) == chat.render(messages, tools=tools)
    controls = set(chat.segments.control_ids.values())
    plain = chat.encode(told(call("x"), result="x"), tools=TOOLS).input_ids
    assert sum(i in controls for i in ids) == sum(i in controls for i in plain)


def test_a_conversation_that_leaves_no_character_is_refused(tiny_tools_dir: Path) -> None:
    private = "".join(map(chr, (*range(0xE000, 0xF900), *range(0xF0000, 0x10FFFE))))
    with pytest.raises(RecordRefusal, match="137,470 of Unicode's private-use characters"):
        load("qwen", tiny_tools_dir).encode(told(call(private)))


@pytest.mark.parametrize("preset", ["chatml", "llama3"])
def test_a_family_without_tools_loses_none_silently(preset: str, tiny_tools_dir: Path) -> None:
    chat = load(preset, tiny_tools_dir)
    with pytest.raises(RecordRefusal, match="drops the tool calls of message 1"):
        chat.encode(told(call("Paris")))
    with pytest.raises(RecordRefusal, match="drops the tools"):
        chat.encode(say("a", "b"), tools=TOOLS)


@pytest.mark.parametrize("preset", ["chatml", "llama3", "qwen", "mistral", "gemma"])
def test_a_thought_that_the_template_keeps_is_trained(preset: str, tiny_tools_dir: Path) -> None:
    chat = load(preset, tiny_tools_dir)
    (text,) = trained(chat, say("2+2?", "<think>\nsimple\n</think>\n\n4"))
    assert text.strip() == "<think>\nsimple\n</think>\n\n4" + chat.end_token


def test_thoughts_that_a_template_moves_or_drops(tiny_tools_dir: Path) -> None:
    chat = ChatFormat.load(THINKING, tiny_tools_dir, "")
    messages = say("a", "<think>\none\n</think>\n\nb", "c", "<think>\ntwo\n</think>\n\nd")
    assert trained(chat, messages) == ["b<|im_end|>", "<think>\ntwo\n</think>\n\nd<|im_end|>"]
    assert chat.encode(messages).num_thoughts_dropped == 1
    assert trained(chat, say("a", "b")) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    assert chat.encode(messages).input_ids == reference_ids(chat, messages)


def test_an_answer_that_only_thinks_is_refused(tiny_tools_dir: Path) -> None:
    with pytest.raises(RecordRefusal, match="message 1, an answer to be trained, is empty"):
        load("chatml", tiny_tools_dir).encode(say("a", "<think>b</think>\n"))


def test_allowed_tokens_of_a_content_are_obeyed(tiny_tools_dir: Path) -> None:
    messages = say("a", "<|im_start|>b")
    strict, lenient = (
        ChatFormat.load(template_text("llama3"), tiny_tools_dir, "", "template", allowed)
        for allowed in ((), ("<|im_start|>",))
    )
    token = lenient._files.id_of_text("<|im_start|>")
    assert token in lenient.encode(messages).labels
    assert token not in strict.encode(messages).input_ids


def test_stored_records_come_back_as_templates_want_them() -> None:
    extra = json.dumps({"tool_calls": [call("Paris")]})
    record = {"messages": [{"role": "assistant", "content": "", "extra": extra}], "tools": "[1]"}
    messages, tools = conversation(record)
    assert messages[0]["tool_calls"] == [call("Paris")]
    assert tools == [1]
    assert split_thought({"role": "user", "content": "</think>a"}) == ("", "</think>a")


def test_plain_text_is_trained_whole(tiny_tools_dir: Path) -> None:
    chat = load("llama3", tiny_tools_dir)
    encoded = chat.encode([{"role": "text", "content": "Once <|eot_id|>"}])
    assert chat.decode(encoded.input_ids) == "<bos>Once <|eot_id|><eos>"
    assert encoded.labels == [IGNORE_INDEX, *encoded.input_ids[1:]]
    assert chat._files.id_of_text("<|eot_id|>") not in encoded.input_ids
