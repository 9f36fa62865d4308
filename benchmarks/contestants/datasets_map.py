"""(b) `datasets.map` over `apply_chat_template` with the mask of assistant tokens, batched, 2 processes.

    python datasets_map.py FOLDER TOKENIZER TEMPLATE

`map` writes its result as Arrow files. To load the records is not counted in `seconds`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import load_dataset
from transformers import AutoTokenizer


def main(folder: Path, tokenizer_dir: Path, template: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = template.read_text()
    file = str(folder / "messages.parquet")
    dataset = load_dataset("parquet", data_files=file, split="train", cache_dir=folder / "map")

    def encode(batch: dict[str, Any]) -> Any:
        return tokenizer.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )

    started = time.perf_counter()
    encoded = dataset.map(encode, batched=True, num_proc=2, remove_columns=["messages"])
    seconds = time.perf_counter() - started

    table = encoded.data
    facts = {
        "seconds": seconds,
        "num_tokens": pc.sum(pc.list_value_length(table["input_ids"])).as_py(),
        "num_supervised_tokens": pc.sum(pc.list_flatten(table["assistant_masks"])).as_py(),
        "files": [file["filename"] for file in encoded.cache_files],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
