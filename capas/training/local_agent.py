"""Run `accelerate launch` on one machine: `python -m capas.training.local_agent OPTION ... SCRIPT`.

On SIGTERM accelerate itself kills all processes that have not ended after 30 seconds, and on an error it
prints a page of text. This agent passes signals on to the processes, which end once they have saved.
"""

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from capas.core.files import read_json
from capas.core.workers import end_with
from capas.training.launch import FOLDER, GIVEN, SIGNALS, is_first

_SECONDS_BETWEEN_LOOKS = 0.2


def main(argv: list[str]) -> int:
    """Launch the processes; return the exit code of the first that failed, or 0."""
    logging.disable(logging.ERROR)
    end_with(os.getppid())
    outcome: list[list[Any]] = []
    thread = threading.Thread(target=_launch, args=(argv, outcome), daemon=True)
    for number in SIGNALS:
        signal.signal(number, _pass_on)
    thread.start()
    while thread.is_alive():
        thread.join(_SECONDS_BETWEEN_LOOKS)
    if not outcome:  # accelerate itself failed and printed why
        return 1
    if not (failures := outcome[0]):
        return 0
    folder = Path(os.environ[FOLDER])
    if is_first(folder):
        name = read_json(folder / GIVEN)["name"]
        sys.stderr.write(f"{name}: {_reason(failures[0])}\n")
    return max(1, failures[0].exitcode)


def _launch(argv: list[str], outcome: list[list[Any]]) -> None:
    """Run accelerate, then add a list of the processes that failed to `outcome`, the first failure first.

    In a thread other than the main one accelerate leaves signals alone.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    rank = os.environ.get("SLURM_NODEID", "0")
    try:
        launch_command(launch_command_parser().parse_args(["--machine_rank", rank, *argv]))
        outcome.append([])
    except ChildFailedError as error:
        outcome.append(sorted(error.failures.values(), key=lambda failure: failure.timestamp))


def _pass_on(number: int, frame: Any) -> None:
    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    if not children:  # not started yet
        os._exit(1)


def _reason(failure: Any) -> str:
    rank, code = failure.local_rank, failure.exitcode
    if code >= 0:
        return f"process {rank} exited with code {code} and printed no error"
    memory = " (possibly out of memory)" if code == -signal.SIGKILL else ""
    return f"process {rank} was killed by {signal.Signals(-code).name}{memory}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
