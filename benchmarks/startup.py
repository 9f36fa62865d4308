"""What capas costs beside DVC: a no-op `dvc repro`, and the imports of every stage.

    python benchmarks/startup.py            after `dvc repro`; about two minutes; prints a JSON object

`no_op_ratio`: seconds of a `dvc repro` that runs nothing, here, over the same DAG with empty stages (same
names and edges, one small text file an output, `true` for a command), the two in turn in one run.
`import_seconds`: what the interpreter spends on imports in a run of a stage, lazy ones included.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 7


def main() -> None:
    with TemporaryDirectory() as folder:
        empty = empty_pipeline(Path(folder))
        pairs = [(no_op(ROOT), no_op(empty)) for _ in range(ROUNDS + 1)][1:]  # the first warms up
    ours, theirs = zip(*pairs, strict=True)
    facts = {
        "no_op_seconds": round(statistics.median(ours), 2),
        "no_op_seconds_empty_stages": round(statistics.median(theirs), 2),
        "no_op_ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "import_seconds": {name: imports(cmd) for name, cmd in commands().items()},
        "machine": {"cpu": cpu(), "num_cpus": os.cpu_count()},
        "versions": {p: version(p) for p in ("dvc", "torch", "transformers", "mlflow")},
        "python": platform.python_version(),
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
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    made: dict[str, str] = {}
    small = {}
    for name, entry in stages.items():
        outs = [o if isinstance(o, str) else next(iter(o)) for o in entry.get("outs", [])]
        made |= dict.fromkeys(outs, f"{name}.txt")
        deps = sorted({made[dep] for dep in entry.get("deps", []) if dep in made})
        small[name] = {"cmd": f"echo {name} > {name}.txt", "deps": deps, "outs": [f"{name}.txt"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": small}))
    for command in (
        "git init -q",
        "dvc init -q",
        "dvc config core.analytics false",
        "dvc repro -q",
    ):
        subprocess.run(command.split(), cwd=root, check=True, capture_output=True)
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


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
