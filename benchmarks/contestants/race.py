"""What the trainings of ../train.py have in common: settings, records, a clock, what is printed at the end.

A contestant is started as `python train_NAME.py SETTINGS.json`; the settings hold `model` and `tokenizer`
(folders), `train` and `validation` (Parquet files of input_ids and labels), `out` (a folder to write to),
`pad_token_id`, and the groups `lora` and `trainer` as `peft.LoraConfig` and `TrainingArguments` take them.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


def settings() -> Settings:
    found: Settings = json.loads(Path(sys.argv[1]).read_text())
    return found


def read(file: str) -> list[dict[str, list[int]]]:
    import pyarrow.parquet as pq

    found: list[dict[str, list[int]]] = pq.read_table(file).to_pylist()
    return found


def collator(pad_token_id: int) -> Any:
    """Right padding, and nothing that is not needed."""
    import torch

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        fills = {"input_ids": pad_token_id, "labels": -100}
        batch = {
            name: torch.tensor([e[name] + [fill] * (longest - len(e[name])) for e in examples])
            for name, fill in fills.items()
        }
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        return {**batch, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    return collate


class Clock:
    """When each step ended, and its loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []
        self.losses: list[float] = []

    def end_step(self) -> None:
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())  # of all threads

    def callback(self) -> Any:
        """For `transformers.Trainer`, which has to log every step."""
        from transformers import TrainerCallback

        clock = self

        class Listener(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.end_step()

            def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
                if "loss" in logs:
                    clock.losses.append(logs["loss"])

        return Listener()

    def show(self, package: str) -> None:
        """The facts as JSON. The first step is not counted: it warms up."""
        num_steps = len(self.ends) - 1
        facts = {
            "losses": self.losses,
            "ms_per_step": 1000 * (self.ends[-1] - self.ends[0]) / num_steps,
            "cpu_ms_per_step": 1000 * (self.cpu_ends[-1] - self.cpu_ends[0]) / num_steps,
        }
        print(json.dumps({**facts, "version": f"{package} {version(package)}"}))
