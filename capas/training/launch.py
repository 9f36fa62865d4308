"""Train one model in several processes, started by `accelerate launch` on one machine or on several.

    hardware.num_processes   on all machines together, each with its own GPU, or with num_threads of the CPU
    hardware.num_machines    more than one: the nodes of a SLURM job that all see the repository, as in
                             sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --wrap='dvc repro'

The stage's own process computes nothing. As in any stage it holds the lock, checks the inputs and moves the
outputs into place. It starts an agent on each machine, which starts the processes there:

    stages/train_lora.py -> python -m capas.training.local_agent -> stages/train_lora.py, LOCAL_RANK 0
                                                                 -> stages/train_lora.py, LOCAL_RANK 1

All of them read their input from a folder that an environment variable names. SIGTERM and Ctrl-C travel down
this chain; one message and the exit code travel up.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capas.core import stage as stages
from capas.core.cores import usable_cores
from capas.core.dag import StageSpec
from capas.core.errors import CapasError, exit_on_user_error
from capas.core.files import read_json
from capas.core.params import Params
from capas.core.peak_memory import peak_memory_bytes
from capas.core.stage import Stage
from capas.models.hardware import num_threads

log = logging.getLogger("capas")
FOLDER = "CAPAS_LAUNCH"
GIVEN, _COSTS, _FAILED = "given.json", "costs.json", "failed"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_OF_GRACE = (
    3.0  # a process that fails because another was killed lets the agent report that first
)
_FIRST_PORT, _NUM_PORTS = 20_000, 20_000
Main = Callable[[Params, Stage], None]


def run(name: str, main: Main) -> None:
    """Run a stage like `capas.core.stage.run`, but in hardware.num_processes processes."""
    if FOLDER in os.environ:
        _work(name, main, Path(os.environ[FOLDER]))
    else:
        stages.run(name, lambda params, stage: _in_processes(main, params, stage))


def is_main() -> bool:
    """Return whether this process writes outputs: it is the only one, or the first on all machines."""
    return FOLDER not in os.environ or os.environ["RANK"] == "0"


def _in_processes(main: Main, params: Params, stage: Stage) -> None:
    if params.hardware.num_processes == 1:
        main(params, stage)
        return
    command = agents(params.hardware, Path(sys.argv[0]), os.environ)
    _warn_of_threads(params.hardware)
    stage.checkpoints()
    for path in stage.spec.outs:
        stage.out(path)
    (stage.root / ".dvc/tmp").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="launch-", dir=stage.root / ".dvc/tmp") as folder:
        aside = str(stage.aside) if stage.aside else None
        given = {"name": stage.name, "params": params.without(), "aside": aside}
        Path(folder, GIVEN).write_text(json.dumps(given))
        # DDP would advise against `find_unused_parameters` (capas/training/arguments.py) in every run.
        log_level = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        if code := _follow(command, {**log_level, **os.environ, FOLDER: folder}):
            sys.exit(code)
        stage.costs |= read_json(Path(folder, _COSTS))


def agents(hardware: Params, script: Path, environ: Mapping[str, str]) -> list[str]:
    """Return the command that starts an agent on each machine; its end is for `accelerate launch`.

    Raises:
        CapasError: there are several machines, but no SLURM job that has them.
    """
    options = {
        "num_processes": hardware.num_processes,
        "num_machines": hardware.num_machines,
        "num_cpu_threads_per_process": num_threads(hardware, _here(hardware)),
        "gpu_ids": "all",
        "mixed_precision": "no",  # the trainer group sets it
        "dynamo_backend": "no",
        "main_process_port": 0,  # any free port
    }
    before: list[str] = []
    if hardware.num_machines > 1:
        before = _srun(hardware.num_machines, environ)
        options |= {"main_process_ip": _first_host(environ["SLURM_JOB_NODELIST"])}
        options |= {"main_process_port": _FIRST_PORT + int(environ["SLURM_JOB_ID"]) % _NUM_PORTS}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # --multi_gpu on CPUs, too: `--cpu` would leave starting the processes to MPI.
    return [
        *before,
        sys.executable,
        "-m",
        "capas.training.local_agent",
        "--multi_gpu",
        *words,
        str(script),
    ]


def _srun(num_machines: int, environ: Mapping[str, str]) -> list[str]:
    there = int(environ.get("SLURM_JOB_NUM_NODES", "0"))
    if there < num_machines:
        found = f"a SLURM job with {there}" if there else "no SLURM job"
        raise CapasError(
            f"hardware.num_machines={num_machines}, but this process runs in {found}. Submit the "
            f"pipeline: sbatch --nodes={num_machines} --ntasks-per-node=1 --gpus-per-node=... "
            "--wrap='dvc repro'; or set hardware.num_machines=1"
        )
    cores = environ.get("SLURM_CPUS_PER_TASK")  # srun does not inherit it
    return [
        *("srun", f"--nodes={num_machines}", f"--ntasks={num_machines}", "--ntasks-per-node=1"),
        *([f"--cpus-per-task={cores}"] if cores else []),
    ]


def _first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list: gpu3 for `gpu[3-4]`."""
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def _warn_of_threads(hardware: Params) -> None:
    here = _here(hardware)
    threads = num_threads(hardware, here)
    if here * threads > usable_cores():
        log.warning(

                "%d processes with hardware.num_threads=%d each, on %d cores: fewer threads would "
                "be faster",
            here, threads, usable_cores(),
        )  # fmt: skip


def _here(hardware: Params) -> int:
    """Return the number of processes on each machine."""
    return int(hardware.num_processes // hardware.num_machines)


def _follow(command: list[str], env: dict[str, str]) -> int:
    """Run the command and return its exit code.

    SIGTERM and Ctrl-C reach its processes once, and the command decides what follows.
    """
    held = {number: signal.getsignal(number) for number in SIGNALS}
    child = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: child.send_signal(number))
        return child.wait()
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def _work(name: str, main: Main, folder: Path) -> None:
    """Run `main` as one of the processes."""
    logging.basicConfig(format=f"{name}: %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO if is_main() else logging.ERROR)
    threading.Thread(target=_watch, args=(os.getppid(), folder / _FAILED), daemon=True).start()
    given, root = read_json(folder / GIVEN), Path.cwd()
    aside = given["aside"] and Path(given["aside"])
    stage = Stage(StageSpec.read(name, root), root, aside)
    with exit_on_user_error(name), _first_to_fail(folder):
        main(Params(given["params"]), stage)
        if is_main():
            costs = {"peak_memory_bytes": peak_memory_bytes(), **stage.costs}
            (folder / _COSTS).write_text(json.dumps(costs))


def _watch(parent: int, failed: Path) -> None:
    """End this process when its parent is gone or another process failed.

    Otherwise it would wait for the lost process for ever, and ignore signals.
    """
    while os.getppid() == parent and not failed.exists():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    time.sleep(2 * _SECONDS_BETWEEN_LOOKS)  # the process that failed prints its reason meanwhile
    os._exit(1)


@contextmanager
def _first_to_fail(folder: Path) -> Iterator[None]:
    """Let only the first failing process print its reason; the others fail because of it."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        elif not isinstance(error, CapasError):
            time.sleep(_SECONDS_OF_GRACE)
        if not is_first(folder):
            os._exit(1)
        raise


def is_first(folder: Path) -> bool:
    """Return whether no failure was recorded before, and record one."""
    try:
        (folder / _FAILED).touch(exist_ok=False)
    except OSError:  # the file exists, or the training has ended and its folder is gone
        return False
    return True


def broadcast_from_main(value: Any) -> Any:
    """Return the `value` of rank 0 in every process. Collective: every process must call it."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
