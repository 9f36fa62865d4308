"""Encode every message's content as plain text, once, for any template that is put around it later.

Reads   data/raw, data/models/tokenizer
Writes  data/tokenized: the same records; each message also has the token ids of its content
Params  chat_template.allowed_tokens; nothing else of a template, so a new template does not rerun the stage

The travelling record, after::

    {"role": "assistant", "content": "{\\"name\\": \\"set_timer\\", ...", "input_ids": [61, 334, ...]}

The text of a control token in a content (<|im_end|>) is encoded like any other text.
"""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from capas.chat.plain import PlainEncoder
from capas.chat.tokenizer import TokenizerFiles
from capas.core.params import Params
from capas.core.progress import counted
from capas.core.records import RAW, SPLITS, TOKENIZED, read_batches, write_tables
from capas.core.stage import Stage, log, run

BYTES_AT_ONCE = 2**21  # memory use is a few times this, for splits of any size
_MESSAGES = TOKENIZED.field("messages").type
_MESSAGE = _MESSAGES.value_type


def main(params: Params, stage: Stage) -> None:
    files = TokenizerFiles(stage.dep("data/models/tokenizer"), params.chat_template.allowed_tokens)
    encoder = PlainEncoder(files)
    raw, folder = stage.dep("data/raw"), stage.out("data/tokenized")
    folder.mkdir()
    for split in SPLITS:
        batches = together(read_batches(raw / f"{split}.parquet", RAW))
        tokenized = (tokenize(batch, encoder) for batch in batches)
        file = folder / f"{split}.parquet"
        num_records = write_tables(file, TOKENIZED, counted(tokenized, f"{split} records"))
        log.info("%s: %d records", split, num_records)


def together(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the same records in few large batches, because each call of the tokenizer has a cost."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(p.nbytes for p in pending) >= BYTES_AT_ONCE:
            yield pa.concat_batches(pending)
            pending = []
    if pending:
        yield pa.concat_batches(pending)


def tokenize(batch: pa.RecordBatch, encoder: PlainEncoder) -> pa.Table:
    """Return the records with input_ids in every message."""
    messages = batch.column("messages")
    flat = messages.flatten()
    ids = encoder.encode(flat.field("content").to_pylist())
    columns = {name: flat.field(name) for name in ("role", "content", "extra", "train")}
    columns["input_ids"] = ids.to_arrow(_MESSAGE.field("input_ids").type)
    spoken = pa.StructArray.from_arrays(list(columns.values()), fields=list(_MESSAGE))
    offsets = pc.subtract(messages.offsets, messages.offsets[0])
    with_ids = pa.ListArray.from_arrays(offsets, spoken, type=_MESSAGES)
    others = {name: batch.column(name) for name in ("id", "tools", "metadata")}
    return pa.Table.from_arrays(
        [others["id"], with_ids, others["tools"], others["metadata"]], schema=TOKENIZED
    )


if __name__ == "__main__":
    run("tokenize", main)
