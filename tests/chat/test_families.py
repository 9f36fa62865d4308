"""Beginnings and ends of texts and turns, as families of models have them: all of them are formatted."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import say, template_text
from formatted import load, split, trained
from tiny import write_tokenizer
from tokenizers import Tokenizer, processors

from capas.chat.format import ChatFormat
from capas.core.errors import CapasError

CHATML = template_text("chatml")
OPENED = "{{ bos_token }}" + CHATML
GRANITE = """{%- for m in messages %}
{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""
LLAMA2 = """{%- for m in messages %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
GPT2 = """{%- for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
HARMONY = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.thinking and loop.last -%}
<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>
{%- endif -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}
{%- else -%}
<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""
HARMONY_TOKENS = [
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|endoftext|>",
]
ROLE_TOKENS = ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"]
IM = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def named(bos: str | None, eos: str, pad: str | None = None) -> dict[str, str]:
    tokens = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    return {name: token for name, token in tokens.items() if token}


# template, added tokens, named ones; how often a text begins in a conversation of two answers
FAMILIES: dict[str, tuple[str, list[str], dict[str, str], int]] = {
    "SmolLM2": (CHATML, IM, named("<|im_start|>", "<|im_end|>", "<|im_end|>"), 4),
    "Qwen": (CHATML, IM, named(None, "<|im_end|>", "<|endoftext|>"), 0),
    "Phi 4": (CHATML, IM, named("<|endoftext|>", "<|im_end|>", "<|endoftext|>"), 0),
    "Yi": (OPENED, [*IM, "<s>"], named("<s>", "<|im_end|>"), 1),
    "Granite": (GRANITE, ROLE_TOKENS, named("<|end_of_text|>", "<|end_of_text|>"), 4),
    "Llama 2": (LLAMA2, ["<s>", "</s>", "[INST]", "[/INST]"], named("<s>", "</s>"), 2),
    "GPT-2": (GPT2, ["<|endoftext|>"], named("<|endoftext|>", "<|endoftext|>"), 4),
    "gpt-oss": (HARMONY, HARMONY_TOKENS, named("<|start|>", "<|return|>", "<|endoftext|>"), 4),
}
TOLD = [say("How are you?", "Fine."), say("a", "b", "c", "d"), say("\n", "\n\nx")]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ChatFormat, int]:
    template, controls, names, num_begun = FAMILIES[request.param]
    write_tokenizer(tmp_path / "tokenizer", controls, names)
    return load(template, tmp_path / "tokenizer"), num_begun


def test_every_family_is_formatted(family: tuple[ChatFormat, int]) -> None:
    chat, num_begun = family
    formatter, records = split(chat, TOLD)
    assert formatter.facts()["num_checked"] == len(TOLD) == len(records)
    assert records[1]["input_ids"].count(chat.bos_token_id) == num_begun
    for told, record in zip(TOLD, records, strict=True):
        assert record["input_ids"][: len(record["prompt_ids"])] == record["prompt_ids"]
        assert chat.decode(record["input_ids"]) == chat.render(told)
        assert chat.decode(record["prompt_ids"]) == chat.render(told[:-1], True)


def test_answers_are_trained_with_a_token_that_stops(family: tuple[ChatFormat, int]) -> None:
    chat, _ = family
    _, records = split(chat, TOLD)
    stops = {chat.decode([i]) for i in chat.stop_token_ids}
    last = trained(chat, records[1])[-1]
    assert last.endswith(chat.end_token) and chat.end_token in stops
    assert ["b" in text for text in trained(chat, records[1])] == [True, False]


def test_a_beginning_that_the_template_does_not_write_is_found(tmp_path: Path) -> None:
    template, controls, names, _ = FAMILIES["SmolLM2"]
    write_tokenizer(tmp_path / "tokenizer", controls, names)
    chat = load(template, tmp_path / "tokenizer")
    assert chat.count_bos(say("a <|im_start|>", "<|im_start|>")) == 2
    _, (record,) = split(chat, [say("a <|im_start|>", "<|im_start|>")])
    assert record["input_ids"].count(chat.bos_token_id) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SmolLM2", "Once.<|im_end|>"),
        ("GPT-2", "<|endoftext|>Once.<|endoftext|>"),
        ("Granite", "<|end_of_text|>Once.<|end_of_text|>"),
        ("Llama 2", "<s>Once.</s>"),
        ("Qwen", "Once.<|im_end|>"),
    ],
)
def test_a_plain_text_begins_as_texts_do_and_not_as_turns_do(
    name: str, expected: str, tmp_path: Path
) -> None:
    template, controls, names, _ = FAMILIES[name]
    write_tokenizer(tmp_path / "tokenizer", controls, names)
    chat = load(template, tmp_path / "tokenizer")
    _, (record,) = split(chat, [[{"role": "text", "content": "Once."}]])
    assert chat.decode(record["input_ids"]) == expected


def test_a_post_processor_adds_no_second_beginning(tmp_path: Path) -> None:
    """Its tokens are for texts alone: `apply_chat_template` leaves them out, too."""
    folder = tmp_path / "tokenizer"
    tokenizer: Tokenizer = write_tokenizer(folder, [*IM, "<s>"], named("<s>", "<|im_end|>"))
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $0", None, [("<s>", bos)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenizer.encode("a").ids[0] == bos
    for template, count in ((CHATML, 0), (OPENED, 1)):
        chat = load(template, folder)
        _, (record,) = split(chat, [say("a", "b")])
        assert record["input_ids"].count(bos) == count
        assert not chat.doubles_bos
    assert load("{{ bos_token }}" + OPENED, folder).doubles_bos


def test_harmony_ends_earlier_answers_with_another_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", HARMONY_TOKENS, named(None, "<|return|>"))
    simple = HARMONY.replace("m.thinking", "false")
    final = "<|channel|>final<|message|>"
    for template, first, stops in (
        (simple, f"{final}b<|end|>", ["<|return|>", "<|end|>"]),
        (HARMONY, f"{final}b", ["<|return|>"]),  # where it ends a thought as well it stops nothing
    ):
        chat = load(template, tmp_path / "tokenizer")
        _, (record,) = split(chat, [say("a", "b", "c", "d")])
        assert trained(chat, record) == [first, f"{final}d<|return|>"]
        assert [chat.decode([i]) for i in chat.stop_token_ids] == stops
        assert chat.end_tokens == ("<|return|>", "<|end|>")


def test_a_thought_reaches_a_template_that_calls_it_otherwise(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", HARMONY_TOKENS, named(None, "<|return|>"))
    chat = load(HARMONY, tmp_path / "tokenizer")
    told: list[dict[str, Any]] = say("a", "b")
    told[1]["reasoning_content"] = "Hm."
    _, (record,) = split(chat, [told])
    (text,) = trained(chat, record)
    assert text.startswith("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>")


def test_an_answer_that_ends_with_no_end_token_of_a_turn_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", HARMONY_TOKENS, named(None, "<|return|>"))
    chat = load(HARMONY.replace("'<|end|>' }}", "'<|start|>' }}"), tmp_path / "tokenizer")
    with pytest.raises(CapasError, match=r"does not end message 1 \(assistant\) with <\|return\|>"):
        split(chat, [say("a", "b", "c", "d")])


def test_special_tokens_map_counts_as_in_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder, [*IM, "<s>"], {"eos_token": "<|endoftext|>"})
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "<|im_end|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert load(OPENED, folder).render(say("a"))[:3] == "<s>"
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "added_tokens_decoder": {}}))
    assert "<s>" not in load(OPENED, folder).render(say("a"))  # a newer file says it all
