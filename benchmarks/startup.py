"""What capas costs beside DVC: a no-op `dvc repro`, and the imports of every stage.

    python benchmarks/startup.py            after `dvc repro`; some minutes; prints a JSON object

`no_op_ratio`: seconds of a `dvc repro` that runs nothing, here, over the same DAG with empty stages: the same
dvc.yaml, where every dep and out is a line of text and no command does anything else than to write it.
`no_op_ratio_edges_alone`: the same over a dvc.yaml without params and deps of code, which DVC reads faster.
The three take turns in one run. `import_seconds`: what the interpreter spends on imports in a run of a stage,
lazy ones included; it runs them all, so that their outputs are written anew, with the same bytes.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 7


def main() -> None:
    with TemporaryDirectory() as same, TemporaryDirectory() as edges:
        roots = [ROOT, empty_pipeline(Path(same)), edges_alone(Path(edges))]
        rounds = [[no_op(root) for root in roots] for _ in range(ROUNDS + 1)][1:]  # one warms up
    medians = [round(statistics.median(seconds), 2) for seconds in zip(*rounds, strict=True)]
    facts = {
        "no_op_seconds": medians[0],
        "no_op_seconds_empty_stages": medians[1],
        "no_op_seconds_edges_alone": medians[2],
        "no_op_ratio": round(statistics.median(ours / same for ours, same, _ in rounds), 3),
        "no_op_ratio_edges_alone": round(statistics.median(a / b for a, _, b in rounds), 3),
        "import_seconds": {name: imports(cmd) for name, cmd in commands().items()},
        **machine.describe("dvc", "torch", "transformers", "mlflow"),
    }
    print(json.dumps(facts, indent=2))


def commands() -> dict[str, str]:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: entry["cmd"] for name, entry in stages.items()}


def no_op(root: Path) -> float:
    started = time.perf_counter()
    done = subprocess.run(["dvc", "repro"], cwd=root, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    assert "Running stage" not in done.stdout, f"not a no-op in {root}:\n{done.stdout}"
    return seconds


def empty_pipeline(root: Path) -> Path:
    """All that dvc.yaml declares, each file of one line."""
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    made = {out for entry in pipeline["stages"].values() for out in outs(entry)}
    for name in ("params.yaml", "code.yaml", "environment.yaml"):
        shutil.copy(ROOT / name, root / name)
    for entry in pipeline["stages"].values():
        for dep in set(entry.get("deps", [])) - made - {"dvc.yaml"}:
            write(root / dep, dep)
        written = [out for out in outs(entry) if not (root / out).exists()]
        entry["cmd"] = [f"mkdir -p {Path(out).parent}; echo {out} > {out}" for out in written]
        entry["cmd"] = entry["cmd"] or "true"
    return repro(root, pipeline)


def edges_alone(root: Path) -> Path:
    """The stages and what they take from one another; a file each."""
    made: dict[str, str] = {}
    small = {}
    for name, entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        made |= dict.fromkeys(outs(entry), f"{name}.txt")
        deps = sorted({made[dep] for dep in entry.get("deps", []) if dep in made})
        small[name] = {"cmd": f"echo {name} > {name}.txt", "deps": deps, "outs": [f"{name}.txt"]}
    return repro(root, {"stages": small})


def outs(entry: dict[str, Any]) -> list[str]:
    found = [out for kind in ("outs", "metrics", "plots") for out in entry.get(kind, [])]
    return [out if isinstance(out, str) else next(iter(out)) for out in found]


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def repro(root: Path, pipeline: dict[str, Any]) -> Path:
    (root / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    commands = ("git init -q", "dvc init -q", "dvc config core.analytics false", "dvc repro -q")
    for command in commands:
        subprocess.run(command.split(), cwd=root, check=True, stdout=subprocess.DEVNULL)
    return root


def imports(cmd: str) -> float:
    """The sum of the self times that `-X importtime` reports, in seconds."""
    arguments = cmd.removeprefix("python ").split()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = re.findall(r"^import time:\s+(\d+) \|", done.stderr, re.MULTILINE)
    return round(sum(map(int, lines)) / 1e6, 2)


if __name__ == "__main__":
    main()
