"""What a training step and a whole training cost: capas beside what else there is, on the embedded model.

    python benchmarks/train.py [--contestants a,b] [--steps N] [--rounds N]       after `dvc repro`

a  capas: its stage `train` as a whole process
b  a loop in plain torch around PEFT's model: the floor
c  `transformers.Trainer` and PEFT, as they are
d  TRL's SFTTrainer
e  LLaMA-Factory
f  TRL's SFTTrainer with its own defaults where it has others than `Trainer`: bfloat16 and checkpointing

All train the same LoRA layers, from the same seed, on the same ids and labels in the same batches, all but f
in fp32, on the base as it is (TRL would turn the layers of a quantized one into bfloat16), with the same
threads and kernels. All have ids and labels from the start, evaluate the validation split before the first
and after the last step, log every step, and save the adapter at the end. Nothing is sent to MLflow.

`ms_per_step`: mean time from the end of a step to the end of the next, never with an evaluation between;
`cpu_ms_per_step`: processor time of all its threads, which a busy machine changes less.
`whole_seconds`: the process from start to end. The contestants take turns, each round with another one
first (`--rounds`); figures are medians, and ratios are taken within a round. `curve_difference`: the largest
difference of a step's loss to capas'; above 1e-4 the exit code is 1, but for f, which takes minutes on most
CPUs and runs where it is asked for. d, e and f get environments of their own in .dvc/tmp/benchmarks, on top
of this one. The table is printed, the figures go to results/train.json.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
from arena import ROOT, make_workspace
from datasets import Dataset, DatasetDict
from environments import environment
from process import ProgramError, measure

from capas.core.params import Params
from capas.core.records import FORMATTED, read_records
from capas.models import hardware
from capas.training.batches import LengthGroupedSampler
from capas.training.lora import OWN

HERE = Path(__file__).resolve().parent / "contestants"
NAMES = {
    "a": "capas",
    "b": "torch",
    "c": "transformers.Trainer",
    "d": "TRL",
    "e": "LLaMA-Factory",
    "f": "TRL, its defaults",
}
SCRIPTS = {
    "a": "capas",
    "b": "torch",
    "c": "trainer",
    "d": "trl",
    "e": "llamafactory",
    "f": "trl",
}
TRL = ["--no-deps", "trl==1.14.2"]  # the loss of 1.15 and 1.16 is a kernel for GPUs alone
PACKAGES = {
    "d": TRL,
    "f": TRL,
    "e": [
        *("--no-deps", "llamafactory==0.9.5", "transformers==5.6.0", "tokenizers==0.22.2"),
        *("peft==0.18.1", "accelerate==1.11.0", "trl==0.24.0", "datasets==4.0.0"),
        "torchaudio==2.11.0",
    ],
}
# PyPI has torchaudio for CUDA alone. It is imported without its libraries, too, and text does not need it.
DROP = "torchaudio/lib/*.so"
DEFAULTS = ("bf16", "gradient_checkpointing")  # of TRL, which Trainer has otherwise
CLOCKS = ("ms_per_step", "cpu_ms_per_step", "whole_seconds", "cpu_seconds")
SPLITS = ("train", "validation")
SAME = (
    *("max_steps", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "seed", "data_seed"),
)
DATA = ("formatted", "models/base", "models/initial_adapter", "models/tokenizer")
MOST_DIFFERENCE = 1e-4  # of a loss

Facts = dict[str, Any]


def main(options: argparse.Namespace) -> None:
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arena = Arena(Path(folder), options.steps)
        rounds = [
            arena.turn(rotated(options.contestants, index)) for index in range(options.rounds)
        ]
    contestants = {key: summary([turn[key] for turn in rounds]) for key in options.contestants}
    for key, facts in contestants.items():
        if "failed" not in contestants["a"] and "failed" not in facts:
            facts["curve_difference"] = difference(rounds[-1]["a"], rounds[-1][key])
    result = {
        "model": "data/models/base, fp32",
        "num_steps": options.steps,
        "num_rounds": options.rounds,
        "contestants": contestants,
        "capas_to": ratios(rounds),
        **machine.describe("torch", "transformers", "peft", "accelerate"),
    }
    show(result)
    file = options.result or Path(__file__).parent / "results/train.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    unequal = [
        key
        for key, facts in contestants.items()
        if key != "f" and facts.get("curve_difference", 0) > MOST_DIFFERENCE
    ]
    if unequal:
        sys.exit(f"the losses of {', '.join(NAMES[key] for key in unequal)} are not those of capas")


class Arena:
    """A temporary folder with a workspace of capas and the settings for all others."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        self.folder, self.workspace = folder, folder / "workspace"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "huggingface")}
        self._make_workspace(num_steps, env)
        params = json.loads((self.workspace / "params.yaml").read_text())
        self.env = {**env, **hardware.environment(Params(params["hardware"]))}
        self.settings = folder / "settings.json"
        settings = self._settings(params)
        self.settings.write_text(json.dumps(settings))
        self.defaults = folder / "defaults.json"
        trainer = {n: v for n, v in settings["trainer"].items() if n not in DEFAULTS}
        self.defaults.write_text(json.dumps({**settings, "trainer": trainer}))

    def turn(self, contestants: list[str]) -> dict[str, Facts]:
        return {key: self.run(key) for key in contestants}

    def run(self, key: str) -> Facts:
        """One contestant, once; `failed` with the error where it cannot."""
        print(f"{NAMES[key]} ...", file=sys.stderr)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        (self.folder / "out").mkdir()
        cwd = self.workspace if key == "a" else self.folder
        try:
            settings = self.defaults if key == "f" else self.settings
            command = [python(key), str(HERE / f"train_{SCRIPTS[key]}.py"), str(settings)]
            return measure(command, cwd, self.env, sampled=False)
        except (ProgramError, subprocess.CalledProcessError) as error:
            return {"failed": str(error)}

    def _make_workspace(self, num_steps: int, env: dict[str, str]) -> None:
        self.workspace.mkdir()
        for name in DATA:
            shutil.copytree(ROOT / "data" / name, self.workspace / "data" / name)
        base = self.workspace / "data/models/base"
        shutil.copytree(base, self.workspace / "data/models/quantized")  # quantization=none
        counts = [
            f"trainer.{name}={num_steps}" for name in ("max_steps", "eval_steps", "save_steps")
        ]
        choices = ["quantization=none", "tracking=none", "trainer.logging_steps=1"]
        make_workspace(self.workspace, [*choices, *counts], env)

    def _settings(self, params: Facts) -> Facts:
        """capas' own params, as its stage hands them on, and the records in the order of its batches."""
        formatted, models = self.workspace / "data/formatted", self.workspace / "data/models"
        with_tokenizer = self.folder / "model_with_tokenizer"
        for name in ("tokenizer", "base"):
            shutil.copytree(models / name, with_tokenizer, dirs_exist_ok=True)
        files = self._write_records(formatted, params["trainer"])
        return {
            "model": str(models / "base"),
            "tokenizer": str(models / "tokenizer"),
            "model_with_tokenizer": str(with_tokenizer),
            **files,
            "out": str(self.folder / "out"),
            "pad_token_id": json.loads((formatted / "chat.json").read_text())["pad_token_id"],
            "lora": {n: v for n, v in params["lora"].items() if n not in OWN},
            "trainer": training_arguments(params["trainer"]),
        }

    def _write_records(self, formatted: Path, trainer: Facts) -> dict[str, str]:
        """As Parquet files, and as `datasets` saves them."""
        splits = {s: list(read_records(formatted / f"{s}.parquet", FORMATTED)) for s in SPLITS}
        lengths = [len(record["input_ids"]) for record in splits["train"]]
        size = trainer["per_device_train_batch_size"]
        order = LengthGroupedSampler(lengths, size, trainer["data_seed"])
        if trainer["max_steps"] > len(lengths) // size:
            raise SystemExit(f"--steps: at most {len(lengths) // size}, one pass over the records")
        splits["train"] = [splits["train"][index] for index in order]
        saved = DatasetDict()
        for split, records in splits.items():
            rows = [{name: r[name] for name in ("input_ids", "labels")} for r in records]
            Dataset.from_list(rows).to_parquet(self.folder / f"{split}.parquet")
            for row in rows:
                row["attention_mask"] = [1] * len(row["input_ids"])
            saved[split] = Dataset.from_list(rows)
        saved.save_to_disk(self.folder / "tokenized")
        files = {split: str(self.folder / f"{split}.parquet") for split in SPLITS}
        return {**files, "tokenized": str(self.folder / "tokenized")}


def rotated(contestants: list[str], by: int) -> list[str]:
    """Who comes first, comes last in the next round: what the machine did before weighs on nobody alone."""
    start = by % len(contestants)
    return contestants[start:] + contestants[:start]


def training_arguments(trainer: Facts) -> Facts:
    """The part of the group that decides what is computed, and what the stage itself adds to it."""
    num_steps = trainer["max_steps"]
    return {
        **{name: trainer[name] for name in SAME},
        "warmup_steps": math.ceil(trainer["warmup_steps"] * num_steps),
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": num_steps,
        "eval_on_start": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def python(key: str) -> str:
    if key not in PACKAGES:
        return sys.executable
    return environment(
        f"train_{SCRIPTS[key]}", PACKAGES[key], parent=True, drop=DROP if key == "e" else ""
    )


def summary(runs: list[Facts]) -> Facts:
    """Medians of one contestant's turns, and each of them."""
    if failed := [facts for facts in runs if "failed" in facts]:
        return failed[0]
    facts: Facts = {"name": runs[-1]["version"]}
    for clock in CLOCKS:
        facts[clock] = round(statistics.median(run[clock] for run in runs), 2)
        facts[f"{clock}_of_each_round"] = [round(run[clock], 2) for run in runs]
    return facts


def difference(ours: Facts, theirs: Facts) -> float:
    """Largest of a step's loss, in nats."""
    pairs = zip(ours["losses"], theirs["losses"], strict=True)
    return max(abs(a - b) for a, b in pairs)


def ratios(rounds: list[dict[str, Facts]]) -> dict[str, dict[str, float]]:
    """capas' figure over that of each of the others: the median over rounds."""
    found: dict[str, dict[str, float]] = {}
    for key in rounds[0].keys() - {"a"}:
        if not any("failed" in turn[k] for turn in rounds for k in ("a", key)):
            found[NAMES[key]] = {
                clock: round(statistics.median(t["a"][clock] / t[key][clock] for t in rounds), 3)
                for clock in CLOCKS
            }
    return dict(sorted(found.items()))


def show(result: Facts) -> None:
    print(f"{result['num_steps']} steps, median of {result['num_rounds']} rounds")
    print("   contestant            ms/step   cpu ms  whole s    cpu s   difference of losses")
    for key, facts in result["contestants"].items():
        if "failed" in facts:
            print(f"{key}  {NAMES[key]:20} failed: {facts['failed']}")
        else:
            clocks = " ".join(f"{facts[clock]:8.2f}" for clock in CLOCKS)
            print(
                f"{key}  {NAMES[key]:20} {clocks}   {facts.get('curve_difference', math.nan):.1e}"
            )
    for name, ratio in result["capas_to"].items():
        print(f"capas / {name:20}", ", ".join(f"{clock} {x:.3f}" for clock, x in ratio.items()))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contestants", type=lambda text: text.split(","), default=list("abcde"))
    parser.add_argument("--steps", type=int, default=188)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", type=Path, help="a file for the figures, other than results/")
    options = parser.parse_args()
    if unknown := set(options.contestants) - NAMES.keys():
        parser.error(f"--contestants: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    options.contestants = sorted({"a", *options.contestants})
    if not (ROOT / "data/formatted").is_dir():
        parser.error("data/formatted is missing: run `dvc repro` first")
    return options


if __name__ == "__main__":
    main(parse_options())
