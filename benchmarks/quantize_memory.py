"""What quantizing a model needs in memory, against the size of its weights.

    python benchmarks/quantize_memory.py           some minutes, 4 GB of disk; prints a JSON object

A random Llama in shards of 200 MB goes through the stage `quantize` as DVC runs it, for each method and
dtype, beside a tiny one, whose peak is what Python and its imports take. `ratio`: peak of the process less
that, over the bytes of the weights. `anonymous_ratio`: the same without pages of mapped files, which the
system takes back when it needs them: this is what the machine must have.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine

from capas.config.composition import composer, dump

ROOT = Path(__file__).resolve().parents[1]
RUNS = (  # quantization, dtype of the weights on disk, model.dtype
    ("nf4", "bfloat16", "bfloat16"),
    ("nf4", "float32", "float32"),
    ("nf4", "float32", "bfloat16"),
    ("int8", "bfloat16", "bfloat16"),
    ("none", "bfloat16", "bfloat16"),
    ("none", "float32", "bfloat16"),
)
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000}


def main() -> None:
    rows = []
    with TemporaryDirectory() as folder:
        for stored in ("bfloat16", "float32"):
            large, small = (Path(folder) / f"{stored}-{name}" for name in ("large", "small"))
            write_model(large, stored, LARGE)
            write_model(small, stored, SMALL)
            for run in (r for r in RUNS if r[1] == stored):
                rows.append(measure(*run, large, small))
            shutil.rmtree(large)
    facts = {"runs": rows, **machine.describe("torch", "transformers", "bitsandbytes")}
    print(json.dumps(facts, indent=2))


def write_model(folder: Path, dtype: str, sizes: dict[str, int]) -> None:
    """In a process of its own, so that this one stays small."""
    code = (
        "import sys, json, torch; from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes, dtype, folder = json.loads(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]\n"
        "model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)\n"
        "model.save_pretrained(folder, max_shard_size='200MB')"
    )
    arguments = [json.dumps({**sizes, **HEADS}), dtype, str(folder)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def measure(method: str, stored: str, dtype: str, large: Path, small: Path) -> dict[str, Any]:
    num_bytes = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    (peak, anonymous, seconds), (floor, floor_anonymous, _) = (
        run_stage(method, dtype, model) for model in (large, small)
    )
    return {
        "quantization": method,
        "stored_dtype": stored,
        "dtype": dtype,
        "weight_bytes": num_bytes,
        "num_shards": len(list(large.glob("*.safetensors"))),
        "peak_bytes": peak,
        "peak_bytes_of_a_tiny_model": floor,
        "ratio": round((peak - floor) / num_bytes, 2),
        "anonymous_ratio": round((anonymous - floor_anonymous) / num_bytes, 2),
        "seconds": round(seconds, 1),
    }


def run_stage(method: str, dtype: str, model: Path) -> tuple[int, int, float]:
    """Peak bytes of the stage's process, of its anonymous pages, and seconds."""
    with TemporaryDirectory(dir=model.parent) as folder:
        root = Path(folder)
        for name in ("dvc.yaml", "code.yaml", "environment.yaml", "capas", "stages"):
            (root / name).symlink_to(ROOT / name)
        with composer(ROOT / "conf") as compose:
            values = compose([f"quantization={method}", f"model.dtype={dtype}"])
        (root / "params.yaml").write_text(dump(values))
        (root / "data/models").mkdir(parents=True)
        (root / "data/models/base").symlink_to(model)
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "stages/quantize_model.py"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        peak, anonymous = watch(process)
        assert process.returncode == 0, process.communicate()[1]
        return peak, anonymous, time.perf_counter() - started


def watch(process: "subprocess.Popen[str]") -> tuple[int, int]:
    """The largest VmHWM and RssAnon, read every 5 ms (Linux)."""
    status, most = Path(f"/proc/{process.pid}/status"), {"VmHWM": 0, "RssAnon": 0}
    while process.poll() is None:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        for name in most:
            if name in lines:  # not of a process that has just ended
                most[name] = max(most[name], 1024 * int(lines[name].split()[0]))
        time.sleep(0.005)
    return most["VmHWM"], most["RssAnon"]


if __name__ == "__main__":
    main()
