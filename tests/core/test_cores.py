"""How many threads compute: physical cores, within affinity, a container's quota and what a sweep leaves."""

import os
from pathlib import Path

import pytest

from capas.core import cores


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight CPUs without a quota, whatever machine this is."""
    monkeypatch.delenv(cores.MAX_THREADS, raising=False)
    monkeypatch.setattr(cores, "_allowed", lambda: list(range(8)))
    monkeypatch.setattr(cores, "quota", lambda: 100)


def write_topology(folder: Path, threads_per_core: int) -> Path:
    for cpu in range(8):
        first = cpu - cpu % threads_per_core
        file = folder / f"cpu{cpu}/topology/thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{first}-{first + threads_per_core - 1}\n")
    return folder


@pytest.mark.parametrize(("threads_per_core", "expected"), [(1, 8), (2, 4)])
def test_two_threads_of_a_core_count_once(
    tmp_path: Path, threads_per_core: int, expected: int
) -> None:
    assert cores.physical_cores(write_topology(tmp_path, threads_per_core)) == expected


def test_a_job_that_has_part_of_the_machine_counts_its_own_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: [0, 1, 2, 3])
    assert cores.physical_cores(write_topology(tmp_path, 2)) == 2
    monkeypatch.setenv(cores.MAX_THREADS, "1")
    assert cores.physical_cores(tmp_path) == cores.usable_cores() == 1


def test_without_a_topology_each_cpu_counts(tmp_path: Path) -> None:
    assert cores.physical_cores(tmp_path) == 8


def test_the_quota_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "quota", lambda: 3)
    assert cores.usable_cores() == cores.physical_cores(write_topology(tmp_path, 2)) == 3
    monkeypatch.setattr(cores, "quota", lambda: 1)
    assert cores.usable_cores() == 1


def test_the_real_affinity_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("only Linux has it")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores.usable_cores() == cores.physical_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.undo()
    file = tmp_path / "self"
    file.write_text("0::/job/step\n4:cpu,cpuacct:/job\n2:memory:/other\n")
    return file


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("max 100000", "max 100000", 2**16),
        ("200000 100000", "max 100000", 2),
        ("max 100000", "150000 100000", 2),
    ],
)
def test_a_quota_of_version_2_is_the_smallest_around(
    tmp_path: Path, own: Path, outer: str, inner: str, expected: int
) -> None:
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "job/cpu.max").write_text(outer + "\n")
    (tmp_path / "job/step/cpu.max").write_text(inner + "\n")
    assert cores.quota(tmp_path, own) == expected


@pytest.mark.parametrize(("limit", "expected"), [("-1", 2**16), ("400000", 4), ("50000", 1)])
def test_a_quota_of_version_1(tmp_path: Path, own: Path, limit: str, expected: int) -> None:
    group = tmp_path / "cpu/job"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(limit + "\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.quota(tmp_path, own) == expected
