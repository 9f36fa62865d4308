"""Keep the libraries of a worker's stages in memory between stages and trials.

Importing torch, transformers and peft takes longer than many a short trial computes. A process imports them
once (`library_server.py`), and the stages that compute on the CPU are forks of it: `python` in their
environment is a script that asks it for one (`library_client.py`). A fork is what a new interpreter would be
after the same imports: nothing was computed before, and no module of capas was loaded.
"""

import atexit
import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from capas.core.cores import MAX_THREADS
from capas.core.params import Params
from capas.models import hardware
from capas.sweep.plan import Plan

SCRIPTS = ("evaluate_model.py", "quantize_model.py", "sample_outputs.py", "train_lora.py")
LIBRARIES = ("torch", "transformers.modeling_utils", "transformers.trainer", "peft", "datasets")
_HERE = Path(__file__).parent


class Libraries:
    """The process that holds the libraries of this worker; it ends with the worker."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._variables: dict[str, str] = {}
        self._folder = Path()

    def share(self, plan: Plan, values: dict[str, Any], variables: dict[str, str]) -> list[str]:
        """Return the folder of a `python` whose stages share the libraries; it goes first in PATH.

        The list is empty where forks cannot be used: on another system than Linux, on a GPU, and if several
        processes train together.

        Args:
            values: the trial's params.
            variables: the environment variables of its place on this machine.
        """
        chosen = values["hardware"]
        if sys.platform != "linux" or chosen["device"] != "cpu" or chosen["num_processes"] > 1:
            return []
        wanted = loaded_with(Params(chosen), variables)
        if wanted != self._variables or not self._is_there():
            self.end()
            self._start(plan, wanted)
        runs = os.access(self._folder / "python", os.X_OK)  # not where files cannot be executed
        return [str(self._folder)] if runs else []

    def _is_there(self) -> bool:
        runs = self._server is not None and self._server.poll() is None
        return runs and self._folder.exists()  # `--clean` may have removed it

    def end(self) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()  # its guard then ends it, and it removes the folder
            self._server.wait()
            self._server = None

    def _start(self, plan: Plan, variables: dict[str, str]) -> None:
        self._folder = Path(mkdtemp(prefix="libraries-", dir=plan.folder))  # for this user alone
        client = self._folder / "python"
        words = [
            sys.executable,
            "-IS",
            _HERE / "library_client.py",
            self._folder,
            ",".join(SCRIPTS),
        ]
        client.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        client.chmod(0o700)
        server = [sys.executable, str(_HERE / "library_server.py"), str(self._folder), *LIBRARIES]
        with (plan.folder / "logs/libraries.log").open("a") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "capas.core.guard", *server],
                cwd=plan.home,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._variables = variables
        assert self._server.stdout is not None
        self._server.stdout.readline()  # it listens, or has ended; then the stages import by themselves


def loaded_with(chosen: Params, variables: dict[str, str]) -> dict[str, str]:
    """Return the environment variables that libraries read when a stage of a trial loads them.

    Args:
        chosen: the group `hardware`.
        variables: the environment variables of the trial's place on this machine.
    """
    found = hardware.environment(chosen)
    limit = variables.get(MAX_THREADS, found["OMP_NUM_THREADS"])
    threads = str(min(int(found["OMP_NUM_THREADS"]), int(limit)))
    return {**found, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


shared = Libraries()
atexit.register(shared.end)
