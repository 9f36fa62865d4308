"""What the same bytes on every x86 CPU cost: portable kernels beside the fastest of this CPU.

    python benchmarks/kernels.py [--steps 100] [--turns 2]      minutes; prints a JSON object

Matrix products of 1,024 x 1,024 floats on one thread, and steps of the shipped training (debug runs
of stages/train_lora.py after `dvc repro`): CPU milliseconds of a step, start-up taken off by a
shorter run. Turns are interleaved, the best of each counts; ratios are taken within one run.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parents[1]
SETS = ("portable", "native")
FEW = 20  # steps of the shorter run
PRODUCT = """
import sys, time
from capas.models import kernels
print(kernels.show(sys.argv[1]).splitlines()[-1])
import torch
torch.set_num_threads(1)
x = torch.randn(1024, 1024)
best = float("inf")
for _ in range(20):
    started = time.perf_counter()
    x @ x
    best = min(best, time.perf_counter() - started)
print(2 * 1024**3 / best / 1e9)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {
        name: {"gflops": [], "step_cpu_ms": []} for name in SETS
    }
    said = {}
    for _ in range(options.turns):
        for name in SETS:
            said[name], gflops = product(name)
            found[name]["gflops"].append(gflops)
            found[name]["step_cpu_ms"].append(step_cpu_ms(name, options.steps))
    best = {
        name: {
            "in_use": said[name],
            "gflops_per_core": round(max(values["gflops"]), 1),
            "step_cpu_ms": round(min(values["step_cpu_ms"]), 1),
        }
        for name, values in found.items()
    }
    portable, native = (best[name] for name in SETS)
    ratios = {
        "products": round(native["gflops_per_core"] / portable["gflops_per_core"], 2),
        "training": round(portable["step_cpu_ms"] / native["step_cpu_ms"], 2),
    }
    facts = {"portable_takes_times": ratios, **best, **machine.describe("torch")}
    print(json.dumps(facts, indent=2))


def product(name: str) -> tuple[str, float]:
    """What computes, and GFLOP/s of a matrix product."""
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT, name],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    said, gflops = done.stdout.splitlines()
    return said, float(gflops)


def step_cpu_ms(name: str, steps: int) -> float:
    """CPU milliseconds of a training step, both threads together."""
    few, many = (train_cpu_seconds(name, n) for n in (FEW, FEW + steps))
    return 1000 * (many - few) / steps


def train_cpu_seconds(name: str, steps: int) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    overrides = [f"hardware.instruction_set={name}", f"trainer.max_steps={steps}"]
    command = [sys.executable, "stages/train_lora.py", *overrides, "trainer.eval_steps=100000"]
    subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
