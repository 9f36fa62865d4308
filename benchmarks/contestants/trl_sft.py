"""(c) What TRL's SFTTrainer does to a data set before it trains: ids and labels, 2 processes.

    python trl_sft.py FOLDER TOKENIZER TEMPLATE

`seconds` are those of its `_prepare_dataset` alone: the model is a tiny random one, and to make the trainer
around it is not counted.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import trl
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer


class TimedTrainer(SFTTrainer):
    seconds = 0.0

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        return prepared


def main(folder: Path, tokenizer_dir: Path, template: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = template.read_text()
    file = str(folder / "messages.parquet")
    dataset = load_dataset("parquet", data_files=file, split="train", cache_dir=folder / "trl")
    config = SFTConfig(
        output_dir=str(folder / "trl/trainer"),
        assistant_only_loss=True,
        max_length=None,
        dataset_num_proc=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = TimedTrainer(
        model=tiny_model(len(tokenizer)),
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    table = trainer.train_dataset.data
    labels = pc.list_flatten(table["labels"])
    facts = {
        "seconds": trainer.seconds,
        "num_tokens": pc.sum(pc.list_value_length(table["input_ids"])).as_py(),
        "num_supervised_tokens": pc.sum(pc.not_equal(labels, -100)).as_py(),
        "version": f"trl {trl.__version__}",
    }
    print(json.dumps(facts))


def tiny_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
