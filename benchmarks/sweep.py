"""What a sweep costs beside the points themselves.

    python benchmarks/sweep.py overhead 4    4 points by `dvc exp run`, and as a sweep, one by one
    python benchmarks/sweep.py points 64     64 points with 2 workers; then the same sweep again
    python benchmarks/sweep.py imports 4     4 points with imports of their own, and with shared ones
    python benchmarks/sweep.py halving 108   9 points of 108 steps: all of them, and by successive halving

The points are the pipeline with `experiment: quick` and 4 steps of training, in temporary clones of this
repository. What is compared has a clone and a cache each, so that neither finds what the other made. Prints a
JSON object.
"""

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import yaml

ROOT = Path(__file__).resolve().parents[1]
SHRUNK = ("experiment=quick", "trainer.max_steps=4", "trainer.warmup_steps=0")
TWO_AT_ONCE = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}


def main(what: str, number: int) -> None:
    measure = {"overhead": overhead, "points": points, "imports": imports, "halving": halving}[what]
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


def imports(folder: Path, number: int) -> dict[str, object]:
    words = f"trainer.learning_rate={','.join(f'{1e-3 * (i + 1):g}' for i in range(number))}"
    found = {}
    for share in ("false", "true"):
        root, before = make(folder / share), cpu_seconds()
        wall = sweep(root, words, f"sweep.share_imports={share}")
        found[share] = {
            "seconds": wall,
            "cpu_seconds": round(cpu_seconds() - before, 1),
            "adapters": sorted(adapters_of(root).values()),
        }
    own, shared = found["false"], found["true"]
    return {
        "points": number,
        "own": {name: own[name] for name in ("seconds", "cpu_seconds")},
        "shared": {name: shared[name] for name in ("seconds", "cpu_seconds")},
        "share_of_seconds": round(shared["seconds"] / own["seconds"], 3),
        "share_of_cpu_seconds": round(shared["cpu_seconds"] / own["cpu_seconds"], 3),
        "same_adapters": own["adapters"] == shared["adapters"],
    }


def cpu_seconds() -> float:
    """Of all processes that this one started, or their child processes, and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def halving(folder: Path, num_steps: int) -> dict[str, object]:
    words = (
        *("trainer.learning_rate=1e-3,4e-3,1.6e-2", "lora.r=4,8,16"),
        *(f"trainer.max_steps={num_steps}", "tracking=none"),
    )
    grid, halved = make(folder / "grid"), make(folder / "halved")
    spent = [sweep(grid, *words), sweep(halved, "sweep=halving", *words)]
    adapters, ended = adapters_of(grid), adapters_of(halved)
    steps = [num_steps * len(adapters), steps_of(halved, num_steps)]
    return {
        "points": len(adapters),
        "steps": dict(zip(("grid", "halving"), steps, strict=True)),
        "share_of_steps": round(steps[1] / steps[0], 3),
        "seconds": dict(zip(("grid", "halving"), spent, strict=True)),
        "share_of_seconds": round(spent[1] / spent[0], 3),
        "trained_to_the_end": len(ended),
        "same_adapters": all(adapters[trial] == md5 for trial, md5 in ended.items()),
        "same_winner": best(grid) == best(halved),
    }


def adapters_of(root: Path) -> dict[str, str]:
    """The md5 of each finished trial's adapter; the experiment that `make` ran is no trial."""
    found = {}
    listed = output(root, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    for reference in filter(re.compile(r"-[0-9a-f]{10}$").search, listed):
        stages = yaml.safe_load(output(root, "git", "show", f"{reference}:dvc.lock"))["stages"]
        outs = {out["path"]: out["md5"] for out in stages["train"]["outs"]}
        found[reference.rpartition("-")[2]] = outs["data/models/adapter"]
    return found


def steps_of(root: Path, num_steps: int) -> int:
    """The steps that all trials trained: to the end, or to their last rung."""
    states = [json.loads(file.read_text()) for file in state_files(root)]
    return sum(s["step"] if s["status"] == "dropped" else num_steps for s in states)


def best(root: Path) -> str:
    """The finished trial with the lowest validation loss."""
    states = [json.loads(file.read_text()) for file in state_files(root)]
    ended = [state for state in states if state["status"] in ("done", "cached")]
    found = min(ended, key=lambda state: state["metrics"]["train.validation_loss"])
    return str(found["identity"])


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
    return [json.loads(file.read_text())["seconds"] for file in state_files(root)]


def state_files(root: Path) -> list[Path]:
    return list((root / ".dvc/tmp/sweep/plans").glob("*/points/*.json"))


def output(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


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
