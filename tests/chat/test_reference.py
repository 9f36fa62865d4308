"""A sample of records is what transformers makes of them, in the folder that users get."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import say, template_text
from formatted import Messages, load, split
from test_families import IM, OPENED, named
from tiny import write_tokenizer

from capas.chat.audit import NUM_SAMPLED
from capas.chat.format import ChatFormat
from capas.chat.reference import compare
from capas.core.errors import CapasError

TOLD: list[Messages] = [
    say("Hi", "Hello", system="Be brief."),
    say("a", "\n\nb"),
    say("a", "b", "c", "d"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer", [*IM, "<s>"], named("<s>", "<|im_end|>"))
    return tmp_path / "tokenizer"


def compared(chat: ChatFormat, told: list[Messages] = TOLD) -> int:
    formatter, _ = split(chat, told)
    return compare(chat, {"train": formatter.sample})


def test_records_are_as_transformers_makes_them(folder: Path, tiny_tools_dir: Path) -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }} {{ date_string }}" + OPENED
    assert compared(load(OPENED, folder)) == compared(load(dated, folder)) == len(TOLD)
    assert compared(load(OPENED, folder), [say("a", str(i)) for i in range(99)]) == NUM_SAMPLED
    for preset in ("llama3", "mistral", "gemma", "qwen"):
        chat = load(template_text(preset), tiny_tools_dir, system="fold")
        assert compared(chat) == len(TOLD), preset


def test_a_process_of_its_own_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    chat = load(OPENED, folder)
    assert compared(chat) == len(TOLD)
    assert "transformers" not in sys.modules
    formatter, _ = split(chat, TOLD)
    prompt = formatter.sample[2].prompt_ids
    assert prompt is not None
    wrong = replace(formatter.sample[2], prompt_ids=[*prompt, 7])
    with pytest.raises(CapasError, match=r"train record '2', prompt: .* nothing in transformers"):
        compare(chat, {"train": [wrong]})


def test_the_first_token_that_differs_is_named(folder: Path) -> None:
    """Its class has a beginning of text of its own, which no file of the folder names."""
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    expected = (
        r"train record '0', conversation: its ids differ from those of .* first at token 0: "
        r"'<\|im_start\|>' \(id \d+\) here, '<\|endoftext\|>' \(id \d+\) in transformers"
    )
    with pytest.raises(CapasError, match=expected):
        compared(load(OPENED, folder))


def test_a_special_tokens_map_of_its_own_counts(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "special_tokens_map.json").write_text(json.dumps(named("<s>", "<|im_end|>")))
    chat = load(OPENED, folder)
    assert chat.render(TOLD[0]).startswith("<s>")
    assert compared(chat) == len(TOLD)


def test_a_folder_that_transformers_cannot_load_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert compared(load(OPENED, folder)) == 0
    assert (
        "the check against transformers was skipped: it cannot load this tokenizer" in caplog.text
    )
