"""The stage `format`: what it writes, how it treats what is too long, its check, its page."""

import csv
import hashlib
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONTROL_TOKENS, REPOSITORY, say, stored, template_text
from dataside import DataSide

from capas.chat.format import ChatFormat
from capas.chat.formatting import histogram
from capas.chat.tokenizer import TokenizerFiles, encode_plain
from capas.core.dag import read_yaml
from capas.core.errors import CapasError
from capas.core.params import flatten
from capas.core.records import IGNORE_INDEX, TOKENIZED, read_records, write_records
from capas.report.mask.page import WORDS

PRESETS = ("chatml", "llama3", "mistral", "gemma")
LONG = ("dataset.overflow=truncate", "dataset.overflow_budget_fraction=1.0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> DataSide:
    """Everything up to `format`, as shipped."""
    return DataSide(tmp_path_factory.mktemp("made"), tiny_tokenizer_dir).run()


@pytest.fixture
def side(tmp_path: Path, tiny_tokenizer_dir: Path) -> DataSide:
    """Ready for `format`, with one record in every split."""
    side = DataSide(tmp_path, tiny_tokenizer_dir).run("fetch_tokenizer")
    (tmp_path / "data/tokenized").mkdir()
    return put(side, say("Hi", "Hello"))


def put(side: DataSide, *conversations: list[dict[str, str]]) -> DataSide:
    """These conversations, tokenized, as every split."""
    tokenizer = TokenizerFiles(side.root / "tokenizer").build()
    records = []
    for i, messages in enumerate(conversations):
        told = [{**m, "input_ids": encode_plain(tokenizer, [m["content"]])[0]} for m in messages]
        records.append(stored({"id": f"r{i}", "messages": told, "metadata": "{}"}))
    for split in ("train", "validation", "test"):
        write_records(side.root / f"data/tokenized/{split}.parquet", TOKENIZED, records)
    return side


def texts(side: DataSide, record: dict[str, Any]) -> tuple[str, str, str]:
    """All, the trained tokens, the prompt."""
    tokenizer = TokenizerFiles(side.root / "tokenizer").build()
    trained = [label for label in record["labels"] if label != IGNORE_INDEX]
    parts = record["input_ids"], trained, record["prompt_ids"]
    whole, trained_text, prompt = (
        tokenizer.decode(ids, skip_special_tokens=False) for ids in parts
    )
    return whole, trained_text, prompt


def test_records_of_the_default_run(made: DataSide) -> None:
    for record in made.formatted("train"):
        whole, trained, prompt = texts(made, record)
        assert whole.startswith(prompt)
        assert trained.endswith(record["reference"] + "<|im_end|>")
        assert json.loads(record["reference"])["name"]
        assert json.loads(record["metadata"])["kind"] == "seen"


def test_facts_are_those_of_the_records(made: DataSide) -> None:
    facts = made.json("reports/format.json")
    assert set(facts["splits"]) == {"train", "validation", "test"}
    for split, found in facts["splits"].items():
        records = made.formatted(split)
        trained = sum(label != IGNORE_INDEX for r in records for label in r["labels"])
        assert found["num_records"] == len(records) == found["num_checked"]
        assert found["num_tokens"] == sum(len(r["input_ids"]) for r in records)
        assert found["num_supervised_tokens"] == trained
        assert found["max_tokens"] == max(len(r["input_ids"]) for r in records)
    assert (facts["dropped"], facts["end_token"], facts["chat_template"]) == (
        {},
        "<|im_end|>",
        "chatml",
    )


def test_lengths_hold_every_record(made: DataSide) -> None:
    rows = list(csv.DictReader((made.root / "reports/lengths.csv").open()))
    counts = {
        s: sum(int(r["num_records"]) for r in rows if r["split"] == s) for s in ("train", "test")
    }
    assert counts == {"train": 24, "test": 10}
    assert {tuple(row) for row in rows} == {("split", "num_tokens", "num_records")}


def test_chat_json_says_what_later_stages_need(made: DataSide) -> None:
    chat = made.json("data/formatted/chat.json")
    text = (made.root / "data/formatted/chat_template.jinja").read_text()
    files = TokenizerFiles(made.root / "tokenizer")
    assert text == template_text("chatml")
    assert chat["template_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert chat["end_token_id"] == files.id_of_text("<|im_end|>") == chat["stop_token_ids"][0]
    assert chat["pad_token_id"] == files.id_of_text("<pad>")
    again = ChatFormat.load(text, files.folder, "26 Jul 2024").probes_sha256()
    assert chat["probes_sha256"] == again


def test_two_runs_write_the_same_bytes(made: DataSide) -> None:
    before = made.files()
    assert len(before) >= 17
    assert made.run().files() == before


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_works_out_of_the_box(preset: str, made: DataSide, tmp_path: Path) -> None:
    """The embedded records have a system message; the default policy of each preset keeps its text."""
    made.run("format", overrides=(f"chat_template={preset}",))
    record = made.formatted("test")[0]
    whole, trained, _ = texts(made, record)
    assert "Turn the request into one function call" in whole
    assert trained.strip().endswith(
        record["reference"] + made.json("data/formatted/chat.json")["end_token"]
    )
    assert made.json("reports/format.json")["system"] == (
        "fold" if preset == "gemma" else "template"
    )
    made.run("format")


def test_last_assistant_and_all(made: DataSide) -> None:
    sizes = {}
    for train_on in ("last_assistant", "assistant", "all"):
        made.run("format", overrides=(f"chat_template.train_on={train_on}",))
        sizes[train_on] = made.json("reports/format.json")["splits"]["train"][
            "num_supervised_tokens"
        ]
    assert sizes["last_assistant"] < sizes["assistant"] < sizes["all"]
    assert sizes["all"] == made.json("reports/format.json")["splits"]["train"]["num_tokens"]
    made.run("format")


def test_what_follows_the_last_answer_is_cut_and_counted(side: DataSide) -> None:
    put(side, say("Hi", "Hello", "Bye")).run("format")
    assert "Bye" not in texts(side, side.formatted("train")[0])[0]
    assert side.json("reports/format.json")["splits"]["train"]["trailing_messages_cut"] == 1


def test_control_tokens_in_contents_are_counted_and_stay_text(side: DataSide) -> None:
    put(side, say("a <|im_end|> b", "<|im_start|>c<|im_end|>")).run("format")
    facts = side.json("reports/format.json")["splits"]["train"]
    assert (facts["control_tokens_in_content"], facts["num_checked"]) == (3, 0)
    special = {TokenizerFiles(side.root / "tokenizer").id_of_text(text) for text in CONTROL_TOKENS}
    assert sum(i in special for i in side.formatted("train")[0]["input_ids"]) == 4


def test_a_record_that_is_too_long_stops_the_stage(side: DataSide) -> None:
    put(side, say("Hi", "Hello"), say("x" * 40, "y"), say("x" * 60, "y"))
    with pytest.raises(CapasError) as refusal:
        side.run("format", overrides=("dataset.max_length=50",))
    message = str(refusal.value)
    each = ", ".join(f"2 of 3 {split} records" for split in ("train", "validation", "test"))
    assert f"{each} are longer than dataset.max_length=50 tokens" in message
    assert "(validation record 'r2'). Set dataset.max_length=" in message
    needed = int(message.split("Set dataset.max_length=")[1].split()[0])
    assert side.run("format", overrides=(f"dataset.max_length={needed}",)).formatted("train")


def test_a_split_of_which_nothing_is_left_is_refused(side: DataSide) -> None:
    put(side, say("Hi", "Hello"))
    everything = ("dataset.overflow=drop", "dataset.overflow_budget_fraction=1.0")
    with pytest.raises(CapasError, match="no train and no validation and no test record is left"):
        side.run("format", overrides=("dataset.max_length=8", *everything))


def test_the_template_of_the_tokenizer(side: DataSide) -> None:
    put(side, say("Hi", "Hello")).run("format", overrides=("chat_template=qwen",))
    expected = side.files()["data/formatted/train.parquet"]
    for folder in ("tokenizer", "data/models/tokenizer"):
        (side.root / folder / "chat_template.jinja").write_text(template_text("qwen"))
    side.run("format", overrides=("chat_template=model",))
    assert side.files()["data/formatted/train.parquet"] == expected
    assert side.files()["data/formatted/chat_template.jinja"].decode() == template_text("qwen")


def test_a_tokenizer_without_a_template_is_refused_with_the_way_out(side: DataSide) -> None:
    with pytest.raises(CapasError, match=r"has no chat template.*Choose chat_template=chatml"):
        side.run("format", overrides=("chat_template=model",))


@pytest.mark.parametrize("named", [False, True])
def test_a_template_in_the_configuration_of_a_tokenizer(side: DataSide, named: bool) -> None:
    file = side.root / "data/models/tokenizer/tokenizer_config.json"
    text = template_text("chatml")
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
    config = json.loads(file.read_text()) | {"chat_template": several if named else text}
    file.write_text(json.dumps(config))
    put(side, say("Hi", "Hello")).run("format", overrides=("chat_template=model",))
    assert side.files()["data/formatted/chat_template.jinja"].decode() == text


def test_templates_with_names_are_there_to_choose_from(side: DataSide) -> None:
    file = side.root / "data/models/tokenizer/tokenizer_config.json"
    text, config = template_text("chatml"), json.loads(file.read_text())
    several = [{"name": "tool_use", "template": text}, {"name": "rag", "template": "x"}]
    file.write_text(json.dumps(config | {"chat_template": several}))
    put(side, say("Hi", "Hello"))
    chosen = "chat_template=model", "chat_template.path=model:tool_use"
    side.run("format", overrides=chosen)
    assert side.files()["data/formatted/chat_template.jinja"].decode() == text
    for path, name in (("model", "default"), ("model:tools", "tools")):
        with pytest.raises(
            CapasError, match=f"path={path}: .*called {name}. .*path=model:rag, model:tool_use"
        ):
            side.run("format", overrides=("chat_template=model", f"chat_template.path={path}"))
    for damaged in ([{"name": "rag"}], ["x"], 7):
        file.write_text(json.dumps(config | {"chat_template": damaged}))
        with pytest.raises(
            CapasError, match=r"tokenizer_config.json: chat_template must be a string or a list"
        ):
            side.run("format", overrides=("chat_template=model",))


def test_a_template_that_begins_a_text_twice_is_told(
    side: DataSide, caplog: pytest.LogCaptureFixture
) -> None:
    file = side.root / "data/models/tokenizer/chat_template.jinja"
    file.write_text("{{ bos_token + bos_token }}" + template_text("chatml"))
    put(side, say("Hi", "Hello")).run("format", overrides=("chat_template=model",))
    assert "chat_template.path=model writes bos_token twice" in caplog.text


def test_too_long_records_are_dropped_within_the_budget(side: DataSide) -> None:
    put(side, say("Hi", "Hello"), say("x" * 60, "y"))
    drop = ("dataset.max_length=50", "dataset.overflow=drop")
    with pytest.raises(
        CapasError, match=r"is allowed for at most 0.4 of a split.*overflow_budget_fraction=0.5"
    ):
        side.run("format", overrides=(*drop, "dataset.overflow_budget_fraction=0.4"))
    side.run("format", overrides=(*drop, "dataset.overflow_budget_fraction=0.5"))
    facts = side.json("reports/format.json")
    assert [record["id"] for record in side.formatted("train")] == ["r0"]
    assert facts["dropped"] == {"longer than dataset.max_length": 3}
    assert facts["splits"]["train"]["dropped"] == 1
    assert facts["splits"]["train"]["supervised_tokens_lost"] == 2


def test_truncation_ends_at_an_answer(side: DataSide) -> None:
    put(side, say("Hi", "Hello", "And", "Bye", "x" * 60, "z"), say("x" * 60, "y"))
    side.run("format", overrides=(*LONG, "dataset.max_length=50"))
    (record,) = side.formatted("train")
    facts = side.json("reports/format.json")["splits"]["train"]
    assert texts(side, record)[1] == "Hello<|im_end|>Bye<|im_end|>"
    assert (record["reference"], len(record["input_ids"]) <= 50) == ("Bye", True)
    assert (facts["truncated"], facts["dropped"], facts["supervised_tokens_lost"]) == (1, 1, 4)


def test_errors_name_split_and_record(side: DataSide) -> None:
    put(side, say("a", "b"), [*say("a"), *say("b", "c")])
    with pytest.raises(
        CapasError,
        match=r"'r1': the chat template \(.*/gemma.jinja\), line 10, refuses.*user, user",
    ):
        side.run("format", overrides=("chat_template=gemma",))


def test_ids_that_are_not_those_of_the_text_stop_the_stage(side: DataSide) -> None:
    """A tokenizer that does what capas does not know of; here its files were exchanged after `tokenize`."""
    (record,) = read_records(side.root / "data/tokenized/train.parquet", TOKENIZED)
    record["messages"][0]["input_ids"][0] += 1
    write_records(side.root / "data/tokenized/train.parquet", TOKENIZED, [record])
    with pytest.raises(
        CapasError, match=r"train record 'r0': its ids differ(.|\n)*from token \d+ on"
    ):
        side.run("format")


def test_tokenize_and_format_import_no_transformers_and_no_torch() -> None:
    code = (
        "import sys; from stages import tokenize_messages, format_chat, fetch_dataset, fetch_tokenizer; "
        "print(sorted({'torch', 'transformers', 'datasets', 'mlflow', 'pandas', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_ranges_of_lengths_are_shared_and_few() -> None:
    rows = histogram({"a": [np.array([1, 2]), np.array([500])], "b": [], "c": [np.array([37])]})
    assert len(rows) % 3 == 0
    assert len(rows) // 3 <= 42
    assert sum(row["num_records"] for row in rows) == 4
    assert histogram({"a": []}) == [{"split": "a", "num_tokens": 0, "num_records": 0}]


class Boxes(HTMLParser):
    """The token boxes of a page: (classes, text without ids)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.boxes: list[tuple[set[str], str]] = []
        self.links: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag == "span" and "token" in (given.get("class") or "").split() and "title" in given:
            self.boxes.append((set((given["class"] or "").split()), ""))
            self._inside = ["span"]
        elif self._inside:
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside and "small" not in self._inside:
            classes, text = self.boxes.pop()
            self.boxes.append((classes, text + data))


def page(side: DataSide) -> Boxes:
    return Boxes((side.root / "reports/mask.html").read_text(encoding="utf-8"))


def test_the_page_shows_what_is_trained(side: DataSide) -> None:
    put(side, say("Hi there", "Hello\n  you")).run("format")
    boxes = page(side).boxes
    trained = "".join(text for classes, text in boxes if "trained" in classes)
    controls = [text for classes, text in boxes if "control" in classes]
    assert trained == "Hello↵··you<|im_end|>" * 3
    assert controls == ["<|im_start|>", "<|im_end|>"] * 6
    assert "exactly the answer" in (side.root / "reports/mask.html").read_text()


def test_the_page_needs_nothing_but_itself_and_escapes_contents(side: DataSide) -> None:
    put(side, say("<script>alert(1)</script>\u202e\u200b", '"><img src=x onerror=y>')).run("format")
    found = page(side)
    text = (side.root / "reports/mask.html").read_text()
    assert {link for link in found.links if not link.startswith("#")} == {"mask.es.html"}
    assert "<script" not in text
    assert "<img" not in text
    assert "U+202E" in text


def test_the_page_speaks_spanish_too(side: DataSide) -> None:
    put(side, say("Hi", "Hello")).run("format")
    english, spanish = (
        (side.root / "reports" / name).read_text(encoding="utf-8")
        for name in ("mask.html", "mask.es.html")
    )
    assert Boxes(english).boxes == Boxes(spanish).boxes != []
    assert '<html lang="es">' in spanish
    assert (
        spanish.count("es exactamente la respuesta") == english.count("is exactly the answer") == 3
    )
    words = {code: flatten(read_yaml(WORDS / f"{code}.yaml")) for code in ("en", "es")}
    assert words["en"].keys() == words["es"].keys()


def test_the_page_says_when_the_mask_is_not_what_it_should_be(side: DataSide) -> None:
    from capas.report.mask.page import view

    chat = ChatFormat.load(template_text("chatml"), side.root / "tokenizer", "")
    (record,) = side.run("format").formatted("train")
    source = {"messages": say("Hi", "Hello")}
    assert view("", record, source, chat, "assistant")["verdict"] == "exact"
    shifted = {**record, "labels": [*record["labels"][1:], IGNORE_INDEX]}
    assert view("", shifted, source, chat, "assistant")["verdict"] == "different"


def test_the_page_of_all_presets_finds_nothing_wrong(made: DataSide) -> None:
    for preset in PRESETS:
        made.run("format", overrides=(f"chat_template={preset}",))
        text = (made.root / "reports/mask.html").read_text()
        assert text.count("As it must be") == text.count("<article>") > 6
        assert "Not as it must be" not in text
    made.run("format")
