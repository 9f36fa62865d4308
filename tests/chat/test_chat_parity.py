"""The four families' real tokenizers and official templates, against `tokenizer.apply_chat_template`.

Ids must be equal and the project's own templates must render the official text, byte for byte.
"""

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from checking import check
from conftest import say, template_text
from tokenizers import Tokenizer

from capas.chat.expected import reference_ids
from capas.chat.format import ChatFormat
from capas.chat.messages import conversation
from capas.chat.plain import PlainEncoder
from capas.chat.template import Template, TemplateRefusal
from capas.chat.tokenizer import TokenizerFiles, encode_plain
from capas.core.errors import CapasError
from capas.core.records import IGNORE_INDEX

FAMILIES = {"qwen2.5": "qwen", "llama3": "llama3", "mistral-v3": "mistral", "gemma2": "gemma"}
SYSTEMS = ("You are terse.", "  Sé breve.\n\n", "¿Qué?\nSegunda línea")
# Of the instructions, the threads of OASST and the conversations of many turns, one in so many.
EVERY = {"quick": (350, 20, 150), "large": (120, 8, 60), "full": (1, 1, 1)}
TIERS = pytest.mark.parametrize("tier", ["quick", pytest.param("large", marks=pytest.mark.slow)])
WITH_TOOLS = [
    "tool-basic",
    "tool-null-content",
    "tool-arrow-merge",
]  # no place for them in two families
Messages = list[dict[str, Any]]


@dataclass
class Family:
    """One family: its tokenizer as transformers loads it, its official template, and capas' template."""

    name: str
    files: TokenizerFiles
    reference: Any
    official: ChatFormat
    ours: ChatFormat
    plain: Tokenizer

    @property
    def templates(self) -> tuple[Template, Template]:
        """The official one and ours."""
        return self.official._template, self.ours._template

    def expected(self, messages: Messages) -> list[int] | None:
        """None where the official template refuses the conversation."""
        from jinja2 import TemplateError

        try:
            return self.reference.apply_chat_template(messages, tokenize=True, return_dict=False)
        except (TemplateError, TypeError):
            return None

    def holds_control(self, messages: Messages) -> bool:
        return any(self.official.count_control_tokens(m["content"]) for m in messages)

    def with_ids(self, messages: Messages) -> Messages:
        ids = encode_plain(self.plain, [m["content"] for m in messages])
        return [{**m, "input_ids": i} for m, i in zip(messages, ids, strict=True)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, kit: Path) -> Family:
    from transformers import AutoTokenizer

    folder = kit / "tok" / request.param
    files = TokenizerFiles(folder)  # parsed once: some are large
    texts = (
        (folder / "chat_template.jinja").read_text("utf-8"),
        template_text(FAMILIES[request.param]),
    )
    official, ours = (
        ChatFormat(Template(text, files.named, ""), files, "template") for text in texts
    )
    reference = AutoTokenizer.from_pretrained(folder)
    return Family(request.param, files, reference, official, ours, official.segments._alone)


def instructions(kit: Path, every: int) -> Iterator[Messages]:
    with gzip.open(kit / "data/instructions_52k.jsonl.gz", "rt", encoding="utf-8") as lines:
        for index, line in enumerate(lines):
            if index % every:
                continue
            row = json.loads(line)
            if row["instruction"] and row["output"]:
                request = (
                    f"{row['instruction']}\n\n{row['input']}"
                    if row["input"]
                    else row["instruction"]
                )
                yield say(request, row["output"])


def threads(kit: Path, name: str, every: int) -> Iterator[Messages]:
    for index, line in enumerate((kit / f"data/{name}.jsonl").open(encoding="utf-8")):
        if index % every == 0:
            yield [
                {"role": m["role"], "content": m["content"]} for m in json.loads(line)["messages"]
            ]


@lru_cache(maxsize=2)
def conversations(kit: Path, tier: str) -> list[Messages]:
    """Single- and multi-turn, every third with a system message."""
    single, few, many = EVERY[tier]
    found = [*instructions(kit, single), *threads(kit, "oasst_threads", few)]
    found += threads(kit, "multiturn_3k", many)
    return [
        say(system=SYSTEMS[i // 3 % 3]) + told if i % 3 == 0 else told
        for i, told in enumerate(found)
    ]


def check_ids(family: Family, told: list[Messages]) -> int:
    """How many conversations were compared; those that the official template refuses are refused here."""
    compared = 0
    for messages in told:
        expected = family.expected(messages)
        if expected is None:
            with pytest.raises(CapasError):
                family.official.encode(messages)
        elif not family.holds_control(messages):
            found = family.official.encode(family.with_ids(messages)).input_ids
            if found != expected:  # an answer whose beginning would melt with the prompt
                assert any(m["content"][:1].isspace() for m in messages if m["role"] == "assistant")
                assert family.reference.decode(found) == family.reference.decode(expected)
                expected = reference_ids(family.official, messages)
            assert found == expected, messages
            compared += 1
    return compared


def test_ids_equal_apply_chat_template(family: Family, kit: Path) -> None:
    told = conversations(kit, "quick")
    compared = check_ids(family, told)
    assert len(told) >= 180
    assert compared >= (120 if family.name == "gemma2" else 180)  # Gemma refuses system messages


@pytest.mark.slow
def test_ids_equal_apply_chat_template_on_all_records(family: Family, kit: Path) -> None:
    compared = check_ids(family, conversations(kit, "full"))
    assert compared >= (36_000 if family.name == "gemma2" else 55_000)


@TIERS
def test_both_libraries_give_the_same_ids(family: Family, kit: Path, tier: str) -> None:
    encoder = PlainEncoder(family.files)
    assert encoder.backend == "fastokens"
    hostile = (kit / "hostile.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [m["content"] for told in conversations(kit, tier) for m in told] + hostile
    found = encoder.encode(texts)
    assert [list(found.row(i)) for i in range(len(texts))] == encode_plain(family.plain, texts)


def test_edges_of_contents(family: Family) -> None:
    edges = ("", " ", "\n", "\n\n", "\t", " \n ", "\u00a0", "\u3000")
    edges += ("'s", "ll", "\u0301", "▁", "12", "…", "[", "<")
    told = [say(f"{e}Hola{f}", f"{f or 'x'}Adiós{e}", f"{e}", "x") for e in edges for f in edges]
    assert (
        check_ids(family, [messages for messages in told if messages[2]["content"].strip()]) >= 100
    )


@TIERS
def test_labels_are_the_answers(family: Family, kit: Path, tier: str) -> None:
    for messages in conversations(kit, tier)[1 :: 9 if tier == "large" else 4]:
        labels = family.ours.encode(messages).labels if family.expected(messages) else []
        trained = family.reference.decode([i for i in labels if i != IGNORE_INDEX])
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        ends = re.escape(family.ours.end_token)
        if labels and not family.holds_control(messages) and "▁" not in str(messages):
            assert [part.strip() for part in re.split(ends, trained)[:-1]] == answers


@TIERS
def test_our_template_renders_the_official_text(family: Family, kit: Path, tier: str) -> None:
    official, ours = family.templates
    compared = 0
    for messages in [*conversations(kit, tier), *ODD]:
        for add_generation_prompt in (False, True):
            try:
                expected = official.render(messages, add_generation_prompt)
            except TemplateRefusal:
                continue
            assert ours.render(messages, add_generation_prompt) == expected
            compared += 1
    assert compared > {"quick": 250, "large": 700}[tier]


ODD = [
    say("a", system=""),
    [*say("a"), *say("b", "c")],
    [*say("a", "b"), *say("-", "c")[1:]],
    [*say("a", "b"), *say("c", "d", system="middle")],
    [*say(system="one"), *say("a", "b", "c", system="two")],
    say("", "b"),
]


def test_our_template_refuses_what_the_official_one_refuses(family: Family) -> None:
    official, ours = family.templates
    for messages in (*ODD, say("a", "b")[1:], say("a", "")):
        assert refuses(ours, messages) == refuses(official, messages), messages


def refuses(template: Template, messages: Messages) -> bool:
    try:
        template.render(messages)
    except TemplateRefusal:
        return True
    return False


def test_hostile_records(family: Family, kit: Path) -> None:
    """Each is refused with its name, or no content becomes a control token and the text survives."""
    lines = (kit / "hostile.jsonl").read_text(encoding="utf-8").splitlines()
    special = {i for i, token in family.files.added.items() if token.special}
    refused = []
    for case in map(json.loads, lines):
        try:
            row = case["rec"]
            (record,) = check({"id": case["id"], **row} if isinstance(row, dict) else row)
            messages, tools = conversation(record)
            encoded = family.ours.encode(family.with_ids(messages), tools=tools)
        except CapasError:
            refused += [case["id"]] if case["expect"] == "accept" else []
            continue
        assert case["expect"] != "reject", case["id"]
        if not tools:
            plain = [{**m, "content": "x"} for m in messages]
            expected = [i for i in family.ours.encode(plain).input_ids if i in special]
            assert [i for i in encoded.input_ids if i in special] == expected, case["id"]
        if case["check"].get("roundtrip") and family.name in ("qwen2.5", "llama3"):
            text = family.ours.tokenizer.decode(encoded.input_ids, skip_special_tokens=False)
            assert text == family.ours.render(messages), case["id"]
    assert refused == ([] if family.name in ("qwen2.5", "mistral-v3") else WITH_TOOLS)


def test_a_template_of_another_family_is_refused_by_name(family: Family) -> None:
    others = {preset for preset in FAMILIES.values() if preset != FAMILIES[family.name]}
    for preset in others:
        with pytest.raises(
            CapasError, match=r"lacks control tokens that the chat template writes: [<\[]"
        ):
            ChatFormat(
                Template(template_text(preset), family.files.named, ""), family.files, "template"
            )
