"""The table at the end of `make repro`."""

import json
from pathlib import Path

from capas.core import timings

DVC_YAML = "stages:\n  fetch: {cmd: a}\n  train: {cmd: b}\n  publish: {cmd: c}\n"


def write(root: Path, **seconds: float) -> None:
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / timings.FOLDER).mkdir(parents=True)
    for stage, value in seconds.items():
        cost = {"seconds": value, "cpu_seconds": value, "peak_memory_bytes": int(value * 2**20)}
        (root / timings.FOLDER / f"{stage}.json").write_text(json.dumps(cost))


def test_stages_stand_in_the_order_of_the_pipeline_with_a_total(tmp_path: Path) -> None:
    write(tmp_path, train=120.5, fetch=2.0, gone=7.0)
    lines = timings.table(timings.read(tmp_path)).splitlines()
    assert [line.split()[0].strip("-") for line in lines] == [
        "stage",
        "fetch",
        "train",
        "",
        "total",
    ]
    assert lines[-1].split() == ["total", "122.5", "120", "MiB"]
    assert len({len(line) for line in lines}) == 1


def test_the_estimated_memory_stands_beside_the_peak(tmp_path: Path) -> None:
    write(tmp_path, fetch=2.0, train=100.0)
    file = tmp_path / timings.FOLDER / "train.json"
    cost = {**json.loads(file.read_text()), "estimated_memory_bytes": 90 * 2**20}
    file.write_text(json.dumps(cost))
    last = "memory of train: estimated 90 MiB, -10 % of the peak"
    assert timings.table(timings.read(tmp_path)).splitlines()[-1] == last
    file.write_text(json.dumps({**cost, "peak_device_memory_bytes": 75 * 2**20}))
    assert timings.table(timings.read(tmp_path)).endswith("estimated 90 MiB, +20 % of the peak")


def test_without_timings_it_says_so(tmp_path: Path) -> None:
    write(tmp_path)
    assert timings.table(timings.read(tmp_path)) == (
        "No stage has run here yet: reports/timings is empty."
    )
