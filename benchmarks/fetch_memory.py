"""Peak memory of fetch, for sets of two sizes: it may grow by a few numbers for each record.

    python benchmarks/fetch_memory.py [50000 1000000]      a few minutes; prints a JSON object

Each size is one run of the stage, in a process and a folder of its own, on a JSONL file of small questions
and answers. The child's peak is what the kernel says of it (ru_maxrss).
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import yaml

ROOT = Path(__file__).resolve().parents[1]
SIZES = (50_000, 1_000_000)


def main(sizes: list[int]) -> None:
    results = {size: measure(size) for size in sizes}
    small, large = min(sizes), max(sizes)
    grown = results[large]["peak_memory_bytes"] - results[small]["peak_memory_bytes"]
    facts = {"bytes_per_further_record": round(grown / max(1, large - small), 1)}
    print(json.dumps({**facts, "sizes": results, **machine.describe("pyarrow", "numpy")}, indent=2))


def measure(size: int) -> dict[str, Any]:
    """One run of the stage; a fork of its own, since the kernel keeps one peak for all children."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = prepare(folder, size)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, json.dumps(run(folder)).encode())
            os._exit(0)
        os.waitpid(child, 0)
        facts = json.loads(os.read(read, 4096))
        source = json.loads((folder / "data/raw/source.json").read_text())
    kept = {split: entry["num_records"] for split, entry in source["splits"].items()}
    return {"file_bytes": num_bytes, **facts, "num_records": kept}


def prepare(folder: Path, size: int) -> int:
    """A workspace that holds what fetch reads, and the records; the size of their file."""
    for name in ("conf", "stages", "capas"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "environment.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    file = folder / "data/own/mine.jsonl"
    file.parent.mkdir(parents=True)
    with file.open("w") as lines:
        for number in range(size):
            row = {"question": f"What is {number} plus one?", "answer": f"It is {number + 1}."}
            lines.write(json.dumps({**row, "id": f"record {number}"}) + "\n")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    own = {"path": "json", "data_files": "data/own/mine.jsonl", "shape": "auto", "num_train": None}
    split = {"test_fraction": 0.01, "validation_fraction": 0.01, "duplicates": "drop"}
    params["dataset"] |= {**own, **split, "leaks": "drop", "leak_budget_fraction": 0.05}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return file.stat().st_size


def run(folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    command = [sys.executable, "stages/fetch_dataset.py"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run(command, cwd=folder, env=environment, check=True, stderr=subprocess.DEVNULL)
    seconds = round(time.perf_counter() - started, 1)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": seconds, "peak_memory_bytes": peak}


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or list(SIZES))
