"""The four families on real records: ids against `apply_chat_template`, what is trained, what is refused.

    python benchmarks/families.py [--every N]

Every data set of the kit (no part of the repository) goes through the checks of fetch and, tokenized, through
the columns of format, with each family's real tokenizer and capas' own template. `equal` counts the records
whose ids are those of `tokenizer.apply_chat_template(..., tokenize=True)` with the official template; `text`
those that hold the text of a control token, which is meant to stay text. Gemma gets system messages folded.
"""

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pyarrow as pa

from capas.chat.batch import Batch
from capas.chat.columns import ColumnEncoder
from capas.chat.format import ChatFormat
from capas.chat.plain import PlainEncoder
from capas.chat.template import place_system
from capas.chat.tokenizer import TokenizerFiles
from capas.core.errors import CapasError
from capas.core.records import TOKENIZED
from capas.dataset.conversation import check_record
from capas.dataset.flaws import WAYS_OUT, Flaw, Flaws
from capas.dataset.shapes import convert

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT.parent / "shared/kit"
FAMILIES = {"llama3": "llama3", "qwen2.5": "qwen", "mistral-v3": "mistral", "gemma2": "gemma"}
FILES = (
    "instructions_52k",
    "gsm8k_train_2k",
    "gsm8k_test",
    "multiturn_3k",
    "oasst_threads",
    "xquad_es",
)
AT_ONCE = 2000

Record = dict[str, Any]


def rows(name: str, every: int) -> Iterator[Any]:
    file = next((KIT / "data").glob(f"{name}.jsonl*"))
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        yield from (json.loads(line) for number, line in enumerate(lines) if number % every == 0)


def records(name: str, every: int, refused: Counter[str]) -> list[Record]:
    flaws = Flaws(dict.fromkeys(WAYS_OUT, "drop") | {"consecutive_roles": "keep"}, 1.0)
    found = []
    for row in rows(name, every):
        try:
            found.append(check_record(convert(row, "auto", {}), flaws))
        except Flaw as flaw:
            refused[f"fetch: {flaw.kind}"] += 1
    return found


def batches(found: list[Record], encoder: PlainEncoder) -> Iterator[Batch]:
    for start in range(0, len(found), AT_ONCE):
        part = found[start : start + AT_ONCE]
        values = encoder.encode([m["content"] for record in part for m in record["messages"]])
        place = iter(range(len(values)))
        told = [
            {
                **r,
                "id": str(i),
                "messages": [{**m, "input_ids": values.row(next(place))} for m in r["messages"]],
            }
            for i, r in enumerate(part)
        ]
        yield Batch(pa.RecordBatch.from_pylist(told, schema=TOKENIZED))


def compare(family: str, name: str, every: int) -> dict[str, Any]:
    from transformers import AutoTokenizer

    folder = KIT / "tok" / family
    refused: Counter[str] = Counter()
    found = records(name, every, refused)
    reference = AutoTokenizer.from_pretrained(folder)
    system = "fold" if family == "gemma2" else "template"
    template = (ROOT / f"conf/chat_template/{FAMILIES[family]}.jinja").read_text(encoding="utf-8")
    chat = ChatFormat.load(template, folder, "", system)
    counts: Counter[str] = Counter(records=len(found))
    for batch in batches(found, PlainEncoder(TokenizerFiles(folder))):
        columns = ColumnEncoder(chat, "assistant").encode(batch)
        place = {row: place for place, row in enumerate(columns.rows.tolist())}
        for row in range(batch.num_rows):
            messages = batch.messages(row)
            try:
                ids, trained = one(chat, columns, place.get(row), messages)
            except CapasError as refusal:
                refused[f"format: {reason(refusal)}"] += 1
                continue
            counts["tokens"] += len(ids)
            counts["trained"] += trained
            if any(chat.holds_control(m["content"]) for m in messages):
                counts["text"] += 1
                continue
            told = place_system(
                [{"role": m["role"], "content": m["content"]} for m in messages], system
            )
            expected = reference.apply_chat_template(told, tokenize=True, return_dict=False)
            counts["equal" if expected == ids else "different"] += 1
    return {"family": family, "file": name, **counts, "refused": dict(sorted(refused.items()))}


def one(chat: ChatFormat, columns: Any, place: int | None, messages: Any) -> tuple[list[int], int]:
    if place is not None:
        return columns.ids.row(place).tolist(), int(columns.trained.row(place).sum())
    encoded = chat.encode(messages)
    return encoded.input_ids, int(np.sum(np.array(encoded.labels) != -100))


def reason(refusal: CapasError) -> str:
    return str(refusal).split("): ")[-1].split("\n")[0][:60]


def main(options: argparse.Namespace) -> None:
    table = [compare(family, name, options.every) for family in FAMILIES for name in FILES]
    for row in table:
        refused = "; ".join(f"{count} {why}" for why, count in row["refused"].items())
        figures = " ".join(
            f"{row.get(k, 0):>9,}"
            for k in ("records", "equal", "different", "text", "tokens", "trained")
        )
        print(f"{row['family']:<10} {row['file']:<17} {figures}  {refused}")
    result = {
        "every": options.every,
        "table": table,
        **machine.describe("tokenizers", "transformers", "fastokens"),
    }
    (Path(__file__).parent / "results/families.json").write_text(
        json.dumps(result, indent=2) + "\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every n-th record")
    if not KIT.is_dir():
        raise SystemExit(f"the kit of real tokenizers and records is not there: {KIT}")
    main(parser.parse_args())
