"""Encode every message's content as plain text, once, whatever template comes around it later.

Reads   data/raw, data/models/tokenizer
Writes  data/tokenized: the same records; each message also has the ids of its content
Params  none: the template decides nothing here, so another one does not tokenize again

The travelling record, after::

    {"role": "assistant", "content": "{\\"name\\": \\"set_timer\\", ...", "input_ids": [61, 334, ...]}

The text of a control token in a content (<|im_end|>) is encoded like any other text.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

from tokenizers import Tokenizer

from capas.chat.tokenizer import TokenizerFiles, encode_plain
from capas.params import Params
from capas.records import RAW, SPLITS, TOKENIZED, Record, read_records, write_records
from capas.stage import Stage, log, run

RECORDS_AT_ONCE = 1000


def main(params: Params, stage: Stage) -> None:
    tokenizer = TokenizerFiles(stage.dep("data/models/tokenizer")).build()
    raw, folder = stage.dep("data/raw"), stage.out("data/tokenized")
    folder.mkdir()
    for split in SPLITS:
        records = read_records(raw / f"{split}.parquet", RAW)
        num_records = write_records(
            folder / f"{split}.parquet", TOKENIZED, tokenize(records, tokenizer)
        )
        log.info("%s: %d records", split, num_records)


def tokenize(records: Iterator[Record], tokenizer: Tokenizer) -> Iterator[Record]:
    """The records with input_ids in every message; contents go to the tokenizer many at a time."""
    while batch := list(islice(records, RECORDS_AT_ONCE)):
        contents = [message["content"] for record in batch for message in record["messages"]]
        ids = iter(encode_plain(tokenizer, contents))
        for record in batch:
            yield {**record, "messages": add_ids(record["messages"], ids)}


def add_ids(messages: Sequence[Record], ids: Iterator[list[int]]) -> list[Record]:
    return [{**message, "input_ids": next(ids)} for message in messages]


if __name__ == "__main__":
    run("tokenize", main)
