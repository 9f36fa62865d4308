"""Peak memory of fetch, for sets of two sizes: it may grow by a few numbers for each record.

    python benchmarks/fetch_memory.py [50000 1000000]      a few minutes; prints a JSON object

Each size is one run of the stage, in a process and a folder of its own, on a JSONL file of small questions
and answers. Memory is that of the process and of all that it starts, sampled.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import yaml
from process import measure

ROOT = Path(__file__).resolve().parents[1]
SIZES = (50_000, 1_000_000)


def main(sizes: list[int]) -> None:
    results = {size: fetch(size) for size in sizes}
    small, large = min(sizes), max(sizes)
    grown = results[large]["peak_memory_bytes"] - results[small]["peak_memory_bytes"]
    facts = {"bytes_per_further_record": round(grown / max(1, large - small), 1)}
    print(json.dumps({**facts, "sizes": results, **machine.describe("pyarrow", "numpy")}, indent=2))


def fetch(size: int) -> dict[str, Any]:
    """One run of the stage."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = prepare(folder, size)
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        facts = measure(
            [sys.executable, "stages/fetch_dataset.py"], folder, environment, sampled=True
        )
        source = json.loads((folder / "data/raw/source.json").read_text())
    kept = {split: entry["num_records"] for split, entry in source["splits"].items()}
    return {"file_bytes": num_bytes, **facts, "num_records": kept}


def prepare(folder: Path, size: int) -> int:
    """A workspace that holds what fetch reads, and the records; the size of their file."""
    for name in ("conf", "stages", "capas"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "code.yaml", "environment.yaml", "params.yaml"):
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


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or list(SIZES))
