"""How far the default result depends on the seed of training: the whole pipeline, once for each seed.

    python benchmarks/seeds.py 0 1 2      minutes a seed; prints a JSON object

Each seed is a `dvc exp run -S seed=N` in a folder of its own that shares DVC's cache: the workspace is left
as it is, and only train and what follows it run. Scores are those of the test split. The experiments stay,
named benchmark-seed-N: `dvc exp remove` drops them.
"""

import csv
import io
import json
import statistics
import subprocess
import sys
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("exact_match", "valid_json", "stop_rate", "loss")


def main(seeds: list[str]) -> None:
    for seed in seeds:
        subprocess.run(["dvc", "exp", "remove", "-q", name(seed)], cwd=ROOT, check=False)
        run("dvc", "exp", "run", "--temp", "-n", name(seed), "-S", f"seed={seed}")
    results = {seed: scores(seed) for seed in seeds}
    kinds = next(iter(results.values()))
    mean = {
        kind: round(statistics.fmean(result[kind] for result in results.values()), 4)
        for kind in kinds
    }
    print(
        json.dumps({"mean": mean, "seeds": results, **machine.describe("torch", "peft")}, indent=2)
    )


def name(seed: str) -> str:
    return f"benchmark-seed-{seed}"


def scores(seed: str) -> dict[str, float]:
    """Exact match of each kind of test record, and the scores of all of them."""
    commit = run("git", "for-each-ref", "--format=%(objectname)", f"refs/exps/**/{name(seed)}")
    rows = csv.DictReader(io.StringIO(run("git", "show", f"{commit}:reports/before_after.csv")))
    kinds = {f"exact_match {r['kind']}": float(r["score"]) for r in rows if is_tuned(r)}
    tuned = json.loads(run("git", "show", f"{commit}:reports/metrics/tuned.json"))
    return kinds | {score: tuned[score] for score in SCORES}


def is_tuned(row: dict[str, str]) -> bool:
    return row["model"] == "tuned" and row["kind"] != "all"


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main(sys.argv[1:] or ["0", "1", "2"])
