"""Contents as plain text, once, whatever the template."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CONTROL_TOKENS, say, stored
from dataside import DataSide
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from capas.chat.plain import PlainEncoder
from capas.chat.tokenizer import TokenizerFiles, encode_plain
from capas.core.errors import CapasError
from capas.core.records import RAW, TOKENIZED, read_records, write_records


@pytest.fixture
def side(tmp_path: Path, tiny_tokenizer_dir: Path) -> DataSide:
    return DataSide(tmp_path, tiny_tokenizer_dir).run("fetch", "fetch_tokenizer", "tokenize")


def test_every_record_comes_back_with_ids(side: DataSide) -> None:
    tokenizer = TokenizerFiles(side.root / "tokenizer").build()
    for split in ("train", "validation", "test"):
        raw, tokenized = (
            list(read_records(side.root / f"data/{folder}/{split}.parquet", schema))
            for folder, schema in (("raw", RAW), ("tokenized", TOKENIZED))
        )
        assert len(raw) > 0
        for record in tokenized:
            for message in record["messages"]:
                assert message.pop("input_ids") == encode_plain(tokenizer, [message["content"]])[0]
        assert tokenized == raw


def test_the_ids_of_a_content_are_its_text(side: DataSide) -> None:
    tokenizer = TokenizerFiles(side.root / "tokenizer").build()
    for record in read_records(side.root / "data/tokenized/test.parquet", TOKENIZED):
        for message in record["messages"]:
            assert tokenizer.decode(message["input_ids"]) == message["content"]


@pytest.mark.parametrize("text", CONTROL_TOKENS)
def test_the_text_of_a_control_token_stays_text(text: str, tiny_tokenizer_dir: Path) -> None:
    files = TokenizerFiles(tiny_tokenizer_dir)
    (ids,) = encode_plain(files.build(), [f"a{text}b"])
    assert not set(ids) & set(files.added)
    assert files.build().decode(ids) == f"a{text}b"
    assert files.id_of_text(text) in files.encode_parsing([f"a{text}b"])[0]


def test_both_backends_give_the_same_bytes(side: DataSide, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (side.root / "data/tokenized/train.parquet").read_bytes()
    backends = [PlainEncoder(TokenizerFiles(side.root / "tokenizer")).backend]
    monkeypatch.setitem(sys.modules, "fastokens", None)  # as where it is not installed
    backends.append(PlainEncoder(TokenizerFiles(side.root / "tokenizer")).backend)
    side.run("tokenize")
    assert (side.root / "data/tokenized/train.parquet").read_bytes() == before
    assert backends == ["fastokens", "tokenizers"]


def test_one_difference_between_the_backends_stops_the_stage(tiny_tokenizer_dir: Path) -> None:
    encoder = PlainEncoder(TokenizerFiles(tiny_tokenizer_dir))

    class Wrong:
        def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
            return np.array([7], np.uint32).tobytes(), np.array([0, 1], np.uint64).tobytes()

    encoder._fast = Wrong()
    with pytest.raises(CapasError, match="fastokens and tokenizers encode 'Hola' differently"):
        encoder.encode(["Hola"])


@pytest.mark.parametrize("words", [[], ["<think>"]])
@pytest.mark.parametrize("scheme", ["first", "never", "always"])
def test_sentencepiece_blanks_are_the_same_in_both_backends(
    scheme: str, words: list[str], tmp_path: Path
) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    texts = ["set a timer", "a timer for a day", "pon un temporizador"]
    trainer = trainers.BpeTrainer(
        vocab_size=90,
        special_tokens=["<unk>"],
        initial_alphabet=["<", ">", "h", "k"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(words)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")

    encoder = PlainEncoder(TokenizerFiles(tmp_path))
    starts = ["", " ", "  ", "▁", "▁ ", "\n", "\u00a0", "a", " a", "é", "<unk>", "<think>"]
    mixed = [start + text for start in starts for text in (*starts, *texts)]
    assert encoder.backend == ("fastokens" if scheme != "always" and not words else "tokenizers")
    found = encoder.encode(mixed)
    assert [list(found.row(i)) for i in range(len(mixed))] == encode_plain(encoder._sure, mixed)


def test_a_vocabulary_without_some_characters_is_left_to_tokenizers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    tokenizer.train_from_iterator(["set a timer for a day"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert PlainEncoder(TokenizerFiles(tmp_path)).backend == "tokenizers"


def test_keys_in_any_order_are_the_same_tokenizer(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    spec = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    spec["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
                       "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "sorted")
    (tmp_path / "sorted/tokenizer.json").write_text(json.dumps(spec, sort_keys=True))
    found = PlainEncoder(TokenizerFiles(tmp_path / "sorted")).encode(["Hola"])
    expected = PlainEncoder(TokenizerFiles(tiny_tokenizer_dir)).encode(["Hola"])
    assert found.row(0).tolist() == expected.row(0).tolist()


def test_an_old_metaspace_can_be_asked(tiny_tokenizer_dir: Path) -> None:
    files = TokenizerFiles(tiny_tokenizer_dir)
    files._spec["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "add_prefix_space": True
    }  # fmt: skip
    assert not files.adds_first_blank


def test_no_padding_and_no_truncation_of_the_file_is_taken_over(tiny_tokenizer_dir: Path) -> None:
    files = TokenizerFiles(tiny_tokenizer_dir)
    files._spec["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
                              "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    files._spec["truncation"] = truncation
    assert len(encode_plain(files.build(), ["Set a timer for 12 minutes."])[0]) in range(3, 50)


def test_empty_contents_and_empty_splits(side: DataSide) -> None:
    raw = side.root / "data/raw"
    write_records(raw / "test.parquet", RAW, [])
    record = stored({"id": "a", "messages": say("", "b"), "metadata": "{}"})
    write_records(raw / "validation.parquet", RAW, [record])
    side.run("tokenize")
    (found,) = read_records(side.root / "data/tokenized/validation.parquet", TOKENIZED)
    assert found["messages"][0]["input_ids"] == []
    assert list(read_records(side.root / "data/tokenized/test.parquet", TOKENIZED)) == []
