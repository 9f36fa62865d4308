"""(d) torchtune's SFTDataset with its Llama 3 tokenizer: it prepares records as they are asked for.

    python torchtune_sft.py FOLDER TOKENIZER

So all are asked for once, by a DataLoader with 2 workers. Nothing is written. Its format is its own: an end
of text after each record, and the header of an answer is trained as well, so that the counts differ.
"""

import base64
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from torch.utils.data import DataLoader
from torchtune.datasets import chat_dataset
from torchtune.models.llama3 import llama3_tokenizer

IGNORED = -100


def main(folder: Path, tokenizer_dir: Path) -> None:
    tokenizer = llama3_tokenizer(str(write_tiktoken(tokenizer_dir, folder)))
    dataset = chat_dataset(
        tokenizer,
        source="parquet",
        data_files=str(folder / "messages.parquet"),
        cache_dir=str(folder / "torchtune"),
        split="train",
        conversation_column="messages",
        conversation_style="openai",
        train_on_input=False,
    )
    num_tokens = num_supervised = 0
    started = time.perf_counter()
    for batch in DataLoader(dataset, batch_size=32, num_workers=2, collate_fn=list):
        for sample in batch:
            num_tokens += len(sample["tokens"])
            num_supervised += len(sample["labels"]) - list(sample["labels"]).count(IGNORED)
    facts = {
        "seconds": time.perf_counter() - started,
        "num_tokens": num_tokens,
        "num_supervised_tokens": num_supervised,
        "version": f"torchtune {version('torchtune')}",
    }
    print(json.dumps(facts))


def write_tiktoken(tokenizer_dir: Path, folder: Path) -> Path:
    """The vocabulary in the form that Meta publishes: base64 of the bytes and the rank, which is the id."""
    spec = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    byte_of = {char: bytes([byte]) for byte, char in byte_level().items()}
    lines = [
        base64.b64encode(b"".join(byte_of[char] for char in token)).decode() + f" {rank}"
        for token, rank in spec["model"]["vocab"].items()
    ]
    file = folder / "tokenizer.model"
    file.write_text("\n".join(lines) + "\n")
    return file


def byte_level() -> dict[int, str]:
    """GPT-2's printable character of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert set(table.values()) == set(ByteLevel.alphabet())
    return table


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
