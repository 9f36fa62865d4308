"""What each stage cost, as a table: `python -m capas.core.timings`.

Seconds and memory differ from run to run, so they are no output of DVC: every stage leaves them in
reports/timings/ when it really runs. A stage that DVC restored keeps those of its last run here.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from capas.core.dag import read_yaml, recorded_key

FOLDER = Path("reports/timings")
# What may be known of a stage; the last two only of train, the very last only on a GPU.
MEASURES = (
    *("seconds", "peak_memory_bytes"),
    *("estimated_memory_bytes", "peak_device_memory_bytes"),
)


def read(root: Path) -> dict[str, dict[str, Any]]:
    """stage -> {key, seconds, cpu_seconds, peak_memory_bytes, ...}, in the order of dvc.yaml."""
    files = {file.stem: file for file in (root / FOLDER).glob("*.json")}
    stages = read_yaml(root / "dvc.yaml")["stages"]
    return {name: json.loads(files[name].read_text()) for name in stages if name in files}


def matching(timings: Mapping[str, Any], lock: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return those of stages that ran here with what dvc.lock records.

    Where DVC restored a stage, its file is of other inputs.
    """
    return {
        name: cost
        for name, cost in timings.items()
        if name in lock and cost.get("key") == recorded_key(lock[name])
    }


def table(timings: dict[str, dict[str, Any]]) -> str:
    """Aligned columns, a line for each stage and one for the whole."""
    if not timings:
        return f"No stage has run here yet: {FOLDER} is empty."
    rows = [(name, t["seconds"], t["peak_memory_bytes"]) for name, t in timings.items()]
    rows.append(("total", sum(row[1] for row in rows), max(row[2] for row in rows)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'stage':{width}}  {'seconds':>8}  {'peak memory':>11}"]
    lines += [f"{n:{width}}  {s:8.1f}  {m / 2**20:7,.0f} MiB" for n, s, m in rows]
    return "\n".join([*lines[:-1], "-" * len(lines[0]), lines[-1], *_estimates(timings)])


def _estimates(timings: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What was foreseen beside what was measured; on a GPU its memory counts, not the process's."""
    for name, cost in timings.items():
        if foreseen := cost.get("estimated_memory_bytes"):
            peak = cost.get("peak_device_memory_bytes", cost["peak_memory_bytes"])
            error = 100 * (foreseen / peak - 1)
            yield f"memory of {name}: estimated {foreseen / 2**20:,.0f} MiB, {error:+.0f} % of the peak"


if __name__ == "__main__":
    sys.stdout.write(table(read(Path.cwd())) + "\n")
