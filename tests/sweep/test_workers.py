"""Work in several processes: the same results in the same order, and no process that stays behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from conftest import REPOSITORY

from capas.core.errors import CapasError
from capas.core.workers import CHUNKS_ALONE, in_order

MANY = 3 * CHUNKS_ALONE
T = TypeVar("T")


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def square_of_few(number: int) -> int:
    if number == CHUNKS_ALONE + 3:
        raise CapasError(f"{number} is one too many")
    return number


class UntransportableError(Exception):
    def __init__(self, text: str, more: str) -> None:
        super().__init__(text)


def defective(number: int) -> int:
    if number >= CHUNKS_ALONE:
        raise UntransportableError("a defect of ours", "")
    return number


def killed(number: int) -> int:
    if number >= CHUNKS_ALONE:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def breaking_off(end: int) -> Iterator[int]:
    yield from range(end)
    raise CapasError("the file ends here")


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, CHUNKS_ALONE, CHUNKS_ALONE + 1, MANY])
def test_results_come_in_order(num_workers: int, count: int) -> None:
    found = list(in_order(square, range(count), num_workers))
    assert [result for result, _ in found] == [n * n for n in range(count)]
    others = {process for _, process in found} - {os.getpid()}
    assert bool(others) == (num_workers > 1 and count > CHUNKS_ALONE)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_comes_after_the_results_before_it(num_workers: int) -> None:
    found = []
    with pytest.raises(CapasError, match=f"{CHUNKS_ALONE + 3} is one too many"):
        for number in in_order(square_of_few, breaking_off(CHUNKS_ALONE + 5), num_workers):
            found.append(number)
    assert found == list(range(CHUNKS_ALONE + 3))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_was_read_before_the_reader_broke_off_is_done(num_workers: int) -> None:
    found = []
    with pytest.raises(CapasError, match="the file ends here"):
        for result, _ in in_order(square, breaking_off(CHUNKS_ALONE + 2), num_workers):
            found.append(result)
    assert found == [n * n for n in range(CHUNKS_ALONE + 2)]


def test_few_chunks_wait() -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(MANY):
            read.append(number)
            yield number

    for place, _ in enumerate(in_order(square, numbers(), 2)):
        assert len(read) <= place + 2 + 2 * 2


def test_any_exception_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"UntransportableError: a defect of ours"):
        list(in_order(defective, range(MANY), 2))


def test_a_killed_process_is_named() -> None:
    with pytest.raises(CapasError, match="one of 2 processes was killed, possibly out of memory"):
        list(in_order(killed, range(MANY), 2))


def test_without_their_parent_processes_end(tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(
        "import sys, time\n"
        "from capas.core.workers import CHUNKS_ALONE, in_order\n"
        "def slow(n):\n"
        "    time.sleep(60 if n >= CHUNKS_ALONE else 0)\n"
        "if __name__ == '__main__':\n"
        "    list(in_order(slow, range(2 * CHUNKS_ALONE), 2))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, str(program)], env=environment)
    try:
        workers = wait_for(lambda: [c for c in children(parent.pid) if "spawn_main" in command(c)])
        assert len(workers) >= 1
    finally:
        parent.kill()
        parent.wait()
    assert wait_for(lambda: not any(alive(worker) for worker in workers))


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(found: Callable[[], T], seconds: float = 60.0) -> T:
    """Its first true value, or the last."""
    end = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < end:
        time.sleep(0.1)
    return value
