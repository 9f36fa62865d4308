"""Real tokens a second of packed, padded and length-grouped batches: one pass over the same records.

    python benchmarks/packing.py [--records 160]      a few minutes; prints a JSON object

Real instruction records (the kit's, no part of the repository) in the token lengths of a real tokenizer; a
random Llama of 5 M parameters with LoRA on all linear layers. Batches have about equally many real tokens:
16 records, or 4 rows of 512 tokens. Turns are interleaved, and ratios are taken within a turn.
"""

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import machine
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from capas.training import packing
from capas.training.batches import Collator, Example, LengthGroupedSampler

KIT = Path(__file__).resolve().parents[2] / "shared/kit"
VOCABULARY, LONGEST = 4096, 512
RECORDS, ROWS, CAPACITY = 16, 4, 512  # of a batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--records", type=int, default=160)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    if not KIT.is_dir():
        raise SystemExit(f"the kit of real tokenizers and records is not there: {KIT}")
    examples = read(options.records)
    model, num_tokens = make_model(), sum(len(example["input_ids"]) for example in examples)
    collator = Collator(0)
    isolation = packing.check_isolation(model, examples, packing.pack(examples, CAPACITY), collator)
    ways = {
        name: list(batches(name, examples, collator)) for name in ("padded", "grouped", "packed")
    }
    turns = [{n: one_pass(model, found) for n, found in ways.items()} for _ in range(options.turns)]
    result = {
        "num_records": len(examples),
        "num_tokens": num_tokens,
        "isolation_difference": isolation,
        "ways": {
            name: {
                "num_steps": len(found),
                "filled_fraction": round(num_tokens / sum(b["labels"].numel() for b in found), 4),
                "tokens_per_second": round(num_tokens / statistics.median(t[name] for t in turns)),
            }
            for name, found in ways.items()
        },
        "packed_to": {
            name: round(statistics.median(t[name] / t["packed"] for t in turns), 3)
            for name in ("padded", "grouped")
        },
    }
    print(json.dumps({**result, **machine.describe("torch", "transformers", "peft")}, indent=2))


def read(num_records: int) -> list[Example]:
    """Evenly over the file; nothing but the answer carries loss in training, and everything does here."""
    tokenizer = Tokenizer.from_file(str(KIT / "tok/llama3/tokenizer.json"))
    with gzip.open(KIT / "data/instructions_52k.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = rows[:: len(rows) // num_records][:num_records]
    texts = [
        "\n\n".join(str(row.get(k) or "") for k in ("instruction", "input", "output"))
        for row in rows
    ]
    ids = [found.ids[:LONGEST] for found in tokenizer.encode_batch_fast(texts)]
    tensors = [torch.tensor(one) % VOCABULARY for one in ids]
    return [{"input_ids": t, "labels": t.clone(), "id": f"{i}"} for i, t in enumerate(tensors)]


def make_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    )


def batches(
    way: str, examples: list[Example], collator: Collator
) -> Iterator[dict[str, torch.Tensor]]:
    """All records once: in random order, grouped by length, or packed in random order."""
    generator = torch.Generator().manual_seed(0)
    rows = packing.pack(examples, CAPACITY) if way == "packed" else examples
    size = ROWS if way == "packed" else RECORDS
    order: Iterable[int] = torch.randperm(len(rows), generator=generator).tolist()
    if way == "grouped":
        order = LengthGroupedSampler([len(row["input_ids"]) for row in rows], size, 0)
    chosen = [rows[i] for i in order]
    for start in range(0, len(chosen), size):
        yield collator(chosen[start : start + size])


def one_pass(model: Any, found: list[dict[str, torch.Tensor]]) -> float:
    """Seconds of forward, backward and optimizer."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    model.train()
    start = time.perf_counter()
    for batch in found:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
