"""Show tokens to a learner: how text is cut, what is trained, what padding costs, neighbours."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from capas.core.records import IGNORE_INDEX
from capas.report.mask.pieces import Piece, cut
from capas.report.neighbours import Embedding

Row = dict[str, Any]
Word = tuple[int, str]  # a token id and its text
NUM_LOOKED_AT = 1000  # records: enough for frequencies, without reading a whole large dataset
NUM_WORDS = 6  # words in the table of neighbours
MAX_VOCABULARY, MAX_SENTENCE = 1024, 200  # the second tokenizer's tokens; its sentence's characters
MIN_NEIGHBOUR_COUNT = 2  # uses in the data: rarer tokens tell nothing as neighbours


def first_records(file: Path, num_records: int = NUM_LOOKED_AT) -> list[Row]:
    with pq.ParquetFile(file) as table:
        batch = next(table.iter_batches(batch_size=num_records), None)
    return batch.to_pylist() if batch is not None else []


def describe(tokenizer: Tokenizer, tokenizer_json: Row, records: Sequence[Row]) -> dict[str, Any]:
    """Return facts about the tokenizer, and how it cuts the first answer of the training split."""
    reference = records[0]["reference"]
    ids = tokenizer.encode(reference, add_special_tokens=False).ids
    pieces = cut(tokenizer, ids)
    return {
        "algorithm": tokenizer_json["model"].get("type") or "BPE",
        "byte_level": "ByteLevel" in json.dumps(tokenizer_json.get("pre_tokenizer")),
        "vocab_size": tokenizer.get_vocab_size(),
        "control": [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special],
        "reference": reference,
        "pieces": pieces,
        "num_tokens": len(ids),
        "characters_per_token": len(reference) / max(1, len(ids)),
    }


def sentences(
    tokenizer: Tokenizer, records: Sequence[Row], languages: Iterable[str]
) -> dict[str, Row]:
    """Return one request of the data cut by the model's tokenizer, and by one in SentencePiece's style.

    The second tokenizer is trained here on the same texts, with the vocabulary size of the model or
    `MAX_VOCABULARY`: merges of characters (BPE), a space being the character ▁, and an unseen character
    being `<unk>`.

    Args:
        records: records of data/raw.
        languages: the languages of the requests, if the records record theirs.
    """
    other = Tokenizer(models.BPE(unk_token="<unk>"))
    other.pre_tokenizer, other.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    size = min(MAX_VOCABULARY, tokenizer.get_vocab_size())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False)
    other.train_from_iterator((m["content"] for r in records for m in r["messages"]), trainer)
    found = {}
    for language in languages:
        text = _request(records, language)[:MAX_SENTENCE]
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        found[language] = {
            "own": [piece.text for piece in cut(tokenizer, ids)],
            "own_count": len(ids),
            "sentencepiece": other.encode(text).tokens,
            "sentencepiece_size": other.get_vocab_size(),
        }
    return found


def _request(records: Sequence[Row], language: str) -> str:
    """Return the first request in this language, or else the request of the first record."""
    spoken = (r for r in records if json.loads(r["metadata"] or "{}").get("language") == language)
    messages = next(spoken, records[0])["messages"]
    request = next((m["content"] for m in messages if m["role"] == "user"), "")
    return str(request or messages[-1]["content"])


def example(tokenizer: Tokenizer, encoded: Row) -> Row:
    """Return a conversation that is the same in every run, as this run's template formats it."""
    return _mask(tokenizer, {"id": "example", **encoded})


def masks(tokenizer: Tokenizer, records: Sequence[Row], num_records: int = 3) -> list[Row]:
    """Return what is trained, token by token, for the first records and the first with several turns."""
    chosen = list(records[:num_records])
    longer = next((r for r in records if _num_turns(r) > 1), None)
    if longer is not None and longer not in chosen:
        chosen[-1] = longer
    return [_mask(tokenizer, record) for record in chosen]


def _num_turns(record: Row) -> int:
    """Return the number of runs of supervised tokens."""
    trained = [label != IGNORE_INDEX for label in record["labels"]]
    return sum(now and not before for before, now in zip([False, *trained], trained, strict=False))


def _mask(tokenizer: Tokenizer, record: Row) -> Row:
    labels = record["labels"]
    pieces = cut(tokenizer, record["input_ids"])
    shown = [_shown(piece, labels[piece.positions[-1]] != IGNORE_INDEX) for piece in pieces]
    return {
        "id": record["id"],
        "pieces": shown,
        "num_tokens": len(labels),
        "num_supervised": sum(label != IGNORE_INDEX for label in labels),
        "num_control": sum(piece.control for piece in pieces),
    }


def _shown(piece: Piece, trained: bool) -> Row:
    return {"text": piece.text, "ids": piece.ids, "trained": trained, "control": piece.control}


def padding(records: Sequence[Row], batch_size: int) -> dict[str, Any]:
    """Return the cost of padding the first `batch_size` records to the longest of them."""
    lengths = [len(record["input_ids"]) for record in records[:batch_size]]
    positions = max(lengths) * len(lengths)
    return {
        "num_records": len(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "num_pads": positions - sum(lengths),
        "fraction": 1 - sum(lengths) / positions,
    }


def embedding(folder: Path, tokenizer: Tokenizer, records: Sequence[Row]) -> Row | None:
    """Return the nearest neighbours of the training split's most frequent words, among its words.

    `closest` is the nearest pair of them: (neighbour, cosine, word).

    Only words of one token count, because a piece of a word tells little. Words that most records have are
    left out too: those belong to the system message.
    """
    table = Embedding.find(folder)
    if table is None:
        return None
    in_records = [Counter(_words(tokenizer, record)) for record in records]
    counts = sum(in_records, Counter[Word]())
    spread = Counter(word for found in in_records for word in found)
    common = [word for word, n in counts.most_common() if n >= MIN_NEIGHBOUR_COUNT]
    words = dict(common)
    candidates = [word for word in common if spread[word] <= len(records) / 2]
    shown: list[Row] = [
        {
            "token": text,
            "count": counts[i, text],
            "neighbours": [
                (words[n], cosine) for n, cosine in table.neighbours(i, _others(words, text), 4)
            ],
        }
        for i, text in _different(candidates)[:NUM_WORDS]
        if len(words) > 1
    ]
    pairs = [(*word["neighbours"][0], word["token"]) for word in shown]
    rows, width = table.shape
    return {
        "rows": rows,
        "width": width,
        "num_parameters": rows * width,
        "words": shown,
        "closest": max(pairs, key=lambda pair: pair[1], default=None),
    }


def _others(words: Mapping[int, str], text: str) -> list[int]:
    """Return the tokens of other words: `minutes` is not a neighbour of `Minutes`."""
    return [i for i, other in words.items() if other.lower() != text.lower()]


def _words(tokenizer: Tokenizer, record: Row) -> Iterator[Word]:
    """Yield tokens that are whole words of three letters or more; roles, after control tokens, are not."""
    pieces = cut(tokenizer, record["input_ids"])
    for before, piece, following in zip(pieces, pieces[1:], pieces[2:], strict=False):
        word = piece.text.removeprefix(" ")
        begins = word != piece.text or not (before.control or before.text[-1:].isalpha())
        whole = begins and not following.text[:1].isalpha()
        if whole and len(word) >= 3 and word.isalpha() and len(piece.ids) == 1:
            yield piece.ids[0], word


def _different(words: Sequence[Word]) -> list[Word]:
    """Return one token for every word, ignoring case."""
    first: dict[str, Word] = {}
    for token_id, text in words:
        first.setdefault(text.lower(), (token_id, text))
    return list(first.values())
