"""Conversations encoded many at a time give what they give one at a time, and nothing is left out."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from conftest import say, stored, template_text

from capas.chat.batch import Batch
from capas.chat.columns import BLANKS, ColumnEncoder
from capas.chat.format import ChatFormat
from capas.chat.tokenizer import TokenizerFiles, encode_plain
from capas.core.records import IGNORE_INDEX, TOKENIZED

PRESETS = ("chatml", "llama3", "mistral", "gemma", "qwen")
WORDS = [
    "a",
    "The",
    " ",
    "\n",
    "\n\n",
    "12",
    "ñ",
    "n\u0303",
    "🦊",
    "\u0301",
    "<|im_end|>",
    "▁",
    "[INST]",
]
Messages = list[dict[str, Any]]


@pytest.fixture(params=PRESETS)
def chat(request: pytest.FixtureRequest, tiny_tokenizer_dir: Path) -> ChatFormat:
    system = "fold" if request.param == "gemma" else "template"
    return ChatFormat.load(template_text(request.param), tiny_tokenizer_dir, "", system)


def batch(told: list[Messages], folder: Path, **columns: str) -> Batch:
    tokenizer = TokenizerFiles(folder).build()
    records = []
    for index, messages in enumerate(told):
        ids = encode_plain(tokenizer, [m["content"] for m in messages])
        with_ids = [{**m, "input_ids": i} for m, i in zip(messages, ids, strict=True)]
        record = {"id": str(index), "messages": with_ids, "metadata": "{}", **columns}
        records.append(stored(record))
    return Batch(pa.RecordBatch.from_pylist(records, schema=TOKENIZED))


def random_conversations(count: int, seed: str) -> list[Messages]:
    rng = random.Random(seed)
    told = []
    for _ in range(count):
        contents = [
            "".join(rng.choices(WORDS, k=rng.randint(0, 6))) for _ in range(2 * rng.randint(1, 3))
        ]
        contents[1::2] = [text + rng.choice(("x", "x ", "\nx")) for text in contents[1::2]]
        told.append(say(*contents, system=rng.choice((None, None, "", "Be brief.", " \n"))))
    return told


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
def test_ids_masks_and_prompts_are_those_of_single_records(
    chat: ChatFormat, train_on: str, tiny_tokenizer_dir: Path
) -> None:
    told = random_conversations(120, train_on)
    found = ColumnEncoder(chat, train_on).encode(batch(told, tiny_tokenizer_dir))
    for place, row in enumerate(found.rows.tolist()):
        encoded = chat.encode(told[row], train_on)
        assert found.ids.row(place).tolist() == encoded.input_ids, told[row]
        mask = [label != IGNORE_INDEX for label in encoded.labels]
        assert found.trained.row(place).tolist() == mask, told[row]
        assert found.prompts.row(place).tolist() == chat.prompt_ids(told[row][:-1]), told[row]
        assert found.trimmed[place] == encoded.num_trimmed
    assert len(found.rows) > 80
    assert found.rows.tolist() == sorted(set(found.rows.tolist()))


@pytest.mark.parametrize("seed", range(3))
def test_blank_and_untrained_messages_stay_apart(
    chat: ChatFormat, seed: int, tiny_tokenizer_dir: Path
) -> None:
    rng = random.Random(seed)
    told = []
    for _ in range(60):
        messages = say(rng.choice(("", " ", "a", "b\n")), "x", system=rng.choice((None, "", "S")))
        told.append(
            [{**m, "train": m["role"] == "assistant" or rng.random() < 0.5} for m in messages]
        )
    found = ColumnEncoder(chat, "assistant").encode(batch(told, tiny_tokenizer_dir))
    assert len(found.rows) > 20
    for place, row in enumerate(found.rows.tolist()):
        assert found.ids.row(place).tolist() == chat.encode(told[row]).input_ids, told[row]


def test_most_ordinary_conversations_need_no_second_look(
    chat: ChatFormat, tiny_tokenizer_dir: Path
) -> None:
    told = [say(f"How much is {n} + {n}?", f"It is {2 * n}.") for n in range(50)]
    assert len(ColumnEncoder(chat, "assistant").encode(batch(told, tiny_tokenizer_dir)).rows) == 50


def test_an_answer_with_train_false_has_no_loss(chat: ChatFormat, tiny_tokenizer_dir: Path) -> None:
    told = say("a", "wrong", "b", "right")
    told[1]["train"] = False
    found = ColumnEncoder(chat, "assistant").encode(batch([told], tiny_tokenizer_dir))
    trained = found.ids.row(0)[found.trained.row(0)].tolist()
    assert chat.decode(trained).strip() == "right" + chat.end_token
    assert [i for i in chat.encode(told).labels if i != IGNORE_INDEX] == trained


def test_what_has_a_scaffold_of_its_own_is_left_to_the_single_way(
    chat: ChatFormat, tiny_tokenizer_dir: Path
) -> None:
    call = {"extra": json.dumps({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]})}
    told = [
        say("a", "<think>b</think>c"),
        [say("a")[0], {**say("a", "")[1], **call}],
        [{"role": "text", "content": "Once upon a time."}],
    ]
    encoder = ColumnEncoder(chat, "assistant")
    assert len(encoder.encode(batch(told, tiny_tokenizer_dir)).rows) == 0
    assert len(encoder.encode(batch([say("a", "b")], tiny_tokenizer_dir, tools="[1]")).rows) == 0


def test_what_follows_the_last_answer_is_no_part_of_it(
    chat: ChatFormat, tiny_tokenizer_dir: Path
) -> None:
    encoder = ColumnEncoder(chat, "assistant")
    longer = encoder.encode(batch([say("a", "b", "c")], tiny_tokenizer_dir))
    shorter = encoder.encode(batch([say("a", "b")], tiny_tokenizer_dir))
    assert longer.ids.row(0).tolist() == shorter.ids.row(0).tolist()


def test_arrow_trims_what_python_trims() -> None:
    assert sorted(BLANKS) == [c for c in map(chr, range(0x110000)) if c.isspace()]
    text = f"{BLANKS}a{BLANKS}"
    assert pc.utf8_trim(pa.array([text, BLANKS, ""]), BLANKS).to_pylist() == ["a", "", ""]
