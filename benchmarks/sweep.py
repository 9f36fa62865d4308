"""What a sweep costs beside the points themselves.

    python benchmarks/sweep.py overhead 4    4 points by `dvc exp run`, and as a sweep, one by one
    python benchmarks/sweep.py points 64     64 points with 2 workers; then the same sweep again

The points are the pipeline with `experiment: quick` and 4 steps of training, in temporary clones of this
repository. `dvc exp run` and the sweep have a clone and a cache each, so that neither finds what the other
made. Prints a JSON object.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parents[1]
SHRUNK = ("experiment=quick", "trainer.max_steps=4", "trainer.warmup_steps=0")
TWO_AT_ONCE = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}


def main(what: str, number: int) -> None:
    measure = {"overhead": overhead, "points": points}[what]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), number)
    print(json.dumps({**found, **machine.describe("dvc", "hydra-core", "mlflow")}, indent=2))


def overhead(folder: Path, number: int) -> dict[str, object]:
    bare, swept = make(folder / "bare"), make(folder / "swept")
    rates = [f"{1e-3 * (i + 1):g}" for i in range(number)]
    each = []
    for rate in rates:
        run(bare, "git", "checkout", "-q", ".")
        run(bare, "dvc", "checkout", "-q", "--force")
        each.append(seconds(bare, "dvc", "exp", "run", "-S", f"trainer.learning_rate={rate}"))
    words = (f"trainer.learning_rate={','.join(rates)}",)
    together = sweep(swept, *words)
    started = points_started(swept)
    return {
        "dvc_exp_run_seconds": each,
        "sweep_seconds": together,
        "seconds_of_each_point_of_the_sweep": started,
        "overhead_seconds_a_point": round(together / number - statistics.fmean(each), 2),
        "overhead_without_start_and_end": round(
            statistics.fmean(started) - statistics.fmean(each), 2
        ),
        "again_seconds_a_point": round(sweep(swept, *words) / number, 2),
    }


def points(folder: Path, number: int) -> dict[str, object]:
    root = make(folder / "many")
    rates = ",".join(f"{1e-3 * (i + 1):g}" for i in range(number // 4))
    words = (f"trainer.learning_rate={rates}", "lora.r=4,8,16,32", *TWO_AT_ONCE)
    first = sweep(root, *words)
    cost = statistics.fmean(points_started(root))
    return {
        "points": len(points_started(root)),
        "seconds": first,
        "seconds_of_a_point": round(cost, 1),
        "again_seconds": sweep(root, *words),
        "left_in_workspaces_bytes": sum(
            f.stat().st_size for f in (root / ".dvc/tmp/sweep/work").rglob("*") if f.is_file()
        ),
    }


def make(root: Path) -> Path:
    """A clone whose shrunk pipeline has run and is committed."""
    run(ROOT, "git", "clone", "-q", str(ROOT), str(root))
    for name in ("user.name=benchmark", "user.email=benchmark@example.org"):
        run(root, "git", "config", *name.split("="))
    sets = [word for override in SHRUNK for word in ("-S", override)]
    run(root, "dvc", "exp", "run", *sets)
    run(root, "git", "commit", "-qam", "shrunk")
    return root


def sweep(root: Path, *words: str) -> float:
    return seconds(root, sys.executable, "stages/sweep.py", "-m", *words)


def points_started(root: Path) -> list[float]:
    files = (root / ".dvc/tmp/sweep/plans").glob("*/points/*.json")
    return [json.loads(file.read_text())["seconds"] for file in files]


def seconds(root: Path, *command: str) -> float:
    started = time.perf_counter()
    run(root, *command)
    return round(time.perf_counter() - started, 2)


def run(root: Path, *command: str) -> None:
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(root)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    subprocess.run(command, cwd=root, env=env, stdout=sys.stderr, check=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
