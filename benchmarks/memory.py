"""The memory that a training is estimated to need, against the most that its process really had.

    python benchmarks/memory.py                 about twenty minutes, 1 GB of disk; prints a JSON object
    python benchmarks/memory.py --device cuda   on an NVIDIA GPU, a minute or two
    python benchmarks/memory.py NAME ...        only those runs

Random models go through the stage `train` as DVC runs it, two steps and two evaluations each, in a process
of its own. `error_fraction`: estimate over measured peak, less 1. `error_fraction_without_process`: the same
without what Python and its libraries take before the model is loaded, which is measured and not estimated.
On a GPU the peak is that of tensors.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import machine

from capas.config.composition import composer, dump
from capas.core.records import FORMATTED, write_records

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000}
MODELS: dict[str, dict[str, Any]] = {  # config.json; empty: data/embedded
    "embedded": {},
    "llama_60m": {"model_type": "llama", **SMALL, **HEADS},
    "llama_130m": {"model_type": "llama", **LARGE, **HEADS},
    "gemma2_45m": {"model_type": "gemma2", **SMALL, **HEADS, "head_dim": 64},
}
CHECKPOINTED = "trainer.gradient_checkpointing=true"


class Run(NamedTuple):
    model: str
    quantization: str
    dtype: str
    num_records: int  # in a batch, of training and of evaluation
    num_tokens: int  # of every record
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        turned = [o.rpartition(".")[2].replace("=true", "") for o in self.overrides]
        sizes = f"{self.num_records}x{self.num_tokens}"
        return "-".join([self.model, self.quantization, self.dtype, sizes, *turned])


RUNS = (
    Run("embedded", "nf4", "float32", 16, 256),
    Run("embedded", "none", "float32", 64, 256),
    Run("llama_60m", "none", "float32", 4, 256),
    Run("llama_60m", "none", "float32", 4, 256, (CHECKPOINTED,)),
    Run("llama_60m", "none", "float32", 1, 1024),
    Run("llama_60m", "none", "float32", 4, 256, ("lora=none",)),
    Run("llama_60m", "nf4", "float32", 4, 256),
    Run("llama_60m", "nf4", "bfloat16", 4, 256),
    Run("llama_60m", "int8", "float32", 4, 256),
    Run("llama_60m", "none", "float32", 4, 256, ("trainer.bf16=true",)),
    Run("llama_130m", "none", "float32", 2, 256),
    Run("llama_130m", "nf4", "float32", 4, 256, (CHECKPOINTED,)),
    Run("gemma2_45m", "none", "float32", 4, 256, ("model.attn_implementation=eager",)),
)
MIXED = "trainer.bf16=true"
GPU_RUNS = (
    Run("llama_130m", "none", "float32", 8, 512),
    Run("llama_130m", "none", "bfloat16", 8, 512, (MIXED,)),
    Run("llama_130m", "nf4", "bfloat16", 8, 512, (MIXED,)),
    Run("llama_130m", "nf4", "bfloat16", 8, 512, (MIXED, CHECKPOINTED)),
    Run("llama_130m", "int8", "bfloat16", 8, 512, (MIXED,)),
    Run("gemma2_45m", "nf4", "bfloat16", 4, 512, (MIXED, "model.attn_implementation=eager")),
)
MAKE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
config, dtype, quantization, folder = json.loads(sys.argv[1]), *sys.argv[2:]
plain = Path(folder) / "plain"
if config:
    kind = AutoConfig.for_model(**config)
    AutoModelForCausalLM.from_config(kind).to(getattr(torch, dtype)).save_pretrained(plain)
else:
    plain = Path("data/embedded")
how = json.loads(quantization)
quantize = how["load_in_4bit"] or how["load_in_8bit"]
how = {"quantization_config": BitsAndBytesConfig(**how)} if quantize else {}
model = AutoModelForCausalLM.from_pretrained(plain, dtype=getattr(torch, dtype), **how)
model.save_pretrained(Path(folder) / "data/models/quantized")
"""
TRAIN = """
import json, logging, resource, sys
from pathlib import Path
from capas.core.dag import StageSpec, read_yaml
from capas.core.params import Params, select
from capas.core.stage import Stage
from stages import train_lora
logging.basicConfig(stream=sys.stderr, level=logging.INFO)
root = Path.cwd()
spec = StageSpec.read("train", root)
stage = Stage(spec, root, aside=root / "aside")
train_lora.main(Params(select(read_yaml(root / "params.yaml"), spec.keys)), stage)
kib = 1024 if sys.platform != "darwin" else 1
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
print(json.dumps({**stage.costs, "peak_memory_bytes": peak}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    runs = GPU_RUNS if options.device == "cuda" else RUNS
    chosen = [run for run in runs if not options.names or run.name in options.names]
    if len(chosen) < len(options.names):
        parser.error(f"there are: {', '.join(run.name for run in runs)}")
    rows = []
    for run in chosen:
        rows.append(measure(run, options.device))
        print(f"{run.name}: {100 * rows[-1]['error_fraction']:+.1f} %", file=sys.stderr)
    facts = {"runs": rows, **machine.describe("torch", "transformers", "peft", "bitsandbytes")}
    print(json.dumps(facts, indent=2))


def measure(run: Run, device: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        values = write_workspace(run, root, device)
        quantization = {k: v for k, v in values["quantization"].items() if k != "preset"}
        config = json.dumps(MODELS[run.model])
        call(MAKE, config, run.dtype, json.dumps(quantization), folder, cwd=ROOT)
        costs = json.loads(call(TRAIN, cwd=root))
    peak = costs["peak_device_memory_bytes" if device == "cuda" else "peak_memory_bytes"]
    estimated = costs["estimated_memory_bytes"]
    process = costs["estimated_memory_parts"]["process"]
    return {
        "name": run.name,
        **costs,
        "error_fraction": round(estimated / peak - 1, 3),
        "error_fraction_without_process": round((estimated - process) / (peak - process) - 1, 3),
    }


def write_workspace(run: Run, root: Path, device: str) -> dict[str, Any]:
    """All that the stage reads but the model; returns params.yaml."""
    for name in ("dvc.yaml", "code.yaml", "environment.yaml", "capas", "stages"):
        (root / name).symlink_to(ROOT / name)
    overrides = [f"quantization={run.quantization}", f"model.dtype={run.dtype}", "tracking=none"]
    overrides += ["hardware=gpu"] if device == "cuda" else []
    overrides += [f"trainer.per_device_{part}_batch_size={run.num_records}" for part in PARTS]
    overrides += [
        "trainer.max_steps=2",
        "trainer.eval_steps=2",
        "trainer.logging_steps=1",
        *run.overrides,
    ]
    with composer(ROOT / "conf") as compose:
        values = compose(overrides)
    (root / "params.yaml").write_text(dump(values))
    (root / "data/formatted").mkdir(parents=True)
    for name in ("tokenizer", "initial_adapter"):
        (root / "data/models" / name).mkdir(parents=True)
    origin = {"adapter_name_or_path": None, "adapter_revision": None}
    (root / "data/models/initial_adapter/origin.json").write_text(json.dumps(origin))
    chat = {"bos_token_id": None, "pad_token_id": 0, "stop_token_ids": [2]}
    (root / "data/formatted/chat.json").write_text(json.dumps(chat))
    (root / "data/formatted/chat_template.jinja").write_text("{# none #}")
    vocabulary = MODELS[run.model].get("vocab_size", 1024)
    for split, count in (("train", 2 * run.num_records), ("validation", run.num_records)):
        records = [record(f"{split}-{i}", run.num_tokens, vocabulary) for i in range(count)]
        write_records(root / f"data/formatted/{split}.parquet", FORMATTED, records)
    names = ("initial_adapter", "quantized", "tokenizer")
    outs = ["data/formatted", *(f"data/models/{name}" for name in names)]
    lines = "".join(f"    - {{path: {out}, md5: {'0' * 32}}}\n" for out in outs)
    (root / "dvc.lock").write_text(f"stages:\n  earlier:\n    outs:\n{lines}")
    return values


PARTS = ("train", "eval")


def record(name: str, num_tokens: int, vocabulary: int) -> dict[str, Any]:
    """Random ids, of which the second half is supervised."""
    ids = random.Random(name).choices(range(3, vocabulary), k=num_tokens)
    half = num_tokens // 2
    return {
        "id": name,
        "input_ids": ids,
        "labels": [-100] * half + ids[half:],
        "prompt_ids": ids[:half],
        "reference": "",
        "metadata": "{}",
    }


def call(code: str, *arguments: str, cwd: Path) -> str:
    """The last line that the program prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


if __name__ == "__main__":
    main()
