"""The same records for every contestant: as messages, as rendered text, and as what `fetch` leaves behind.

    python prepare.py FILE FOLDER --tokenizer DIR [--template FILE] [--records N] [--repeat N]

Writes FOLDER/messages.parquet and FOLDER/texts.parquet, where a template is given, and
FOLDER/workspace/data/raw. A record is `messages` or instruction/input/output; those without an instruction or
an output are left out. Of the records one each becomes the validation and the test split, which must not be
empty. `--repeat` takes the file so many times over, with a number put to the end of each content.
"""

import argparse
import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capas.core.records import RAW, write_records

Messages = list[dict[str, str]]


def main(options: argparse.Namespace) -> None:
    def conversations() -> Iterator[Messages]:
        return islice(numbered(options.file, options.repeat), options.records)

    num_records = sum(1 for _ in conversations())
    raw = options.folder / "workspace/data/raw"
    raw.mkdir(parents=True, exist_ok=True)
    records = map(raw_record, range(num_records), conversations())
    for split, size in (("train", num_records - 2), ("validation", 1), ("test", 1)):
        write_records(raw / f"{split}.parquet", RAW, islice(records, size))
    if options.template:
        table = pa.table({"messages": list(conversations())})
        pq.write_table(table, options.folder / "messages.parquet")
        texts = rendered(conversations(), options.tokenizer, options.template)
        pq.write_table(pa.table({"text": texts}), options.folder / "texts.parquet")
    print(json.dumps({"num_records": num_records}))


def numbered(file: Path, repeat: int) -> Iterator[Messages]:
    for turn in range(repeat):
        for index, messages in enumerate(read(file)):
            if repeat == 1:
                yield messages
            else:
                end = f" [{turn}.{index}]"
                yield [{**message, "content": message["content"] + end} for message in messages]


def read(file: Path) -> Iterator[Messages]:
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        for line in lines:
            row = json.loads(line)
            if "messages" in row:
                yield [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
            elif row["instruction"] and row["output"]:
                asked = "\n\n".join(filter(None, (row["instruction"], row["input"])))
                yield [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": row["output"]},
                ]


def raw_record(index: int, messages: Messages) -> dict[str, Any]:
    stored = [{**message, "extra": "", "train": True} for message in messages]
    return {"id": str(index), "messages": stored, "tools": "", "metadata": "{}"}


def rendered(conversations: Iterator[Messages], tokenizer: Path, template: Path) -> list[str]:
    from transformers import AutoTokenizer

    chat = AutoTokenizer.from_pretrained(tokenizer)
    text: list[str] = chat.apply_chat_template(
        list(conversations), chat_template=template.read_text(), tokenize=False
    )
    return text


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--template", type=Path)
    parser.add_argument("--records", type=int)
    parser.add_argument("--repeat", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_options())
