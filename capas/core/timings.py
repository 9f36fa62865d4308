"""Print a table of the time and memory of each stage: `python -m capas.core.timings`.

Time and memory differ between runs, so DVC does not track them: every stage writes them to reports/timings/
when it really runs. A stage that DVC restored keeps those of its last run on this machine.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from capas.core.dag import read_yaml, recorded_key
from capas.core.files import read_json

FOLDER = Path("reports/timings")
# Measures of a stage; only train has the last two, and the very last only on a GPU.
MEASURES = (
    *("seconds", "peak_memory_bytes"),
    *("estimated_memory_bytes", "peak_device_memory_bytes"),
)


def read(root: Path) -> dict[str, dict[str, Any]]:
    """Return {stage: {key, seconds, cpu_seconds, peak_memory_bytes, ...}}, in the order of dvc.yaml.

    Raises:
        CapasError: a file of reports/timings is damaged.
    """
    files = {file.stem: file for file in (root / FOLDER).glob("*.json")}
    stages = read_yaml(root / "dvc.yaml")["stages"]
    return {name: read_json(files[name]) for name in stages if name in files}


def matching(timings: Mapping[str, Any], lock: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the timings of stages that ran here with the inputs in dvc.lock.

    If DVC restored a stage, its file may belong to other inputs.
    """
    return {
        name: cost
        for name, cost in timings.items()
        if name in lock and cost.get("key") == recorded_key(lock[name])
    }


def table(timings: dict[str, dict[str, Any]]) -> str:
    """Return a text table with aligned columns, one line for each stage and one for the total."""
    if not timings:
        return f"No stage has run here yet: {FOLDER} is empty."
    rows = [(name, t["seconds"], t["peak_memory_bytes"]) for name, t in timings.items()]
    rows.append(("total", sum(row[1] for row in rows), max(row[2] for row in rows)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'stage':{width}}  {'seconds':>8}  {'peak memory':>11}"]
    lines += [f"{n:{width}}  {s:8.1f}  {m / 2**20:7,.0f} MiB" for n, s, m in rows]
    return "\n".join([*lines[:-1], "-" * len(lines[0]), lines[-1], *_estimates(timings)])


def _estimates(timings: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each estimate of memory, compared with the measured peak (on a GPU, the device's)."""
    for name, cost in timings.items():
        if foreseen := cost.get("estimated_memory_bytes"):
            peak = cost.get("peak_device_memory_bytes", cost["peak_memory_bytes"])
            error = 100 * (foreseen / peak - 1)
            yield f"memory of {name}: estimated {foreseen / 2**20:,.0f} MiB, {error:+.0f} % of the peak"


if __name__ == "__main__":
    sys.stdout.write(table(read(Path.cwd())) + "\n")
