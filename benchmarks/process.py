"""A program run to its end: its wall time and the peak memory of it and its children."""

import json
import resource
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil

EVERY_SECONDS = 0.1


class ProgramError(RuntimeError):
    """A program that ended with an error; the last lines that it wrote are the message."""


def measure(command: list[str], cwd: Path, env: dict[str, str], sampled: bool) -> dict[str, Any]:
    """What the program printed as JSON in its last line, with whole_seconds, cpu_seconds and
    peak_memory_bytes of its process and all its children; 0 bytes where memory is not `sampled`.

    Memory is the proportional set size, so that pages which processes share count once. To look at it holds
    a program up (a fifth of the time of one that allocates much): where it is sampled, time is worth less.
    """
    with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        started, cpu = time.perf_counter(), children_cpu_seconds()
        program = psutil.Popen(command, cwd=cwd, env=env, stdout=out, stderr=errors)
        peak = 0
        while (status := wait(program)) is None:
            peak = max(peak, memory(program) if sampled else 0)
        seconds = time.perf_counter() - started
        out.seek(0), errors.seek(0)
        printed = out.read().strip().splitlines()
        if status:
            raise ProgramError("\n".join(errors.read().strip().splitlines()[-3:]))
    facts = json.loads(printed[-1]) if printed else {}
    clocks = {"whole_seconds": seconds, "cpu_seconds": children_cpu_seconds() - cpu}
    return {**facts, **clocks, "peak_memory_bytes": peak}


def wait(program: psutil.Popen) -> int | None:
    try:
        return program.wait(EVERY_SECONDS)
    except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
        return None


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory(program: psutil.Popen) -> int:
    """Of the program and all its children, in bytes; 0 for one that has just ended."""
    total = 0
    try:
        for process in [program, *program.children(recursive=True)]:
            info = process.memory_full_info()
            total += getattr(info, "pss", info.uss)  # pss: on Linux alone
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
    return total
