"""Run the pipeline for many values: Hydra multirun over DVC experiments, each in a workspace of its own.

    python stages/sweep.py -m trainer.learning_rate=1e-3,4e-3 lora.r=8,16        all combinations
    python stages/sweep.py -m lora.r=8,16 hydra/launcher=joblib hydra.launcher.n_jobs=2      two at once
    python stages/sweep.py -m trainer.learning_rate=1e-3,4e-3 seed=1,2,3     mean and interval of three seeds
    python stages/sweep.py -m chat_template=llama3,chatml experiment=quick      choices; an overlay
    python stages/sweep.py -m 'model=glob(qwen*)'        all choices of a group with such a name
    python stages/sweep.py -m sweep=learning_rate        a sweep that is ready: see conf/sweep/
    python stages/sweep.py -m sweep=templates            train with each chat template, ask each model in each
    python stages/sweep.py -m sweep=optuna 'trainer.learning_rate=tag(log,interval(1e-4,3e-2))'
    python stages/sweep.py -m hydra/launcher=slurm ...   a job for each point: see conf/hydra/launcher/
    python stages/sweep.py --list                        sweeps, their experiments, and what they take on disk
    python stages/sweep.py --clean                       remove their workspaces and logs, not the experiments

Reads   the workspace as it is when it starts, with what is not committed; conf/sweep.yaml, conf/sweep/
Writes  an experiment of DVC for each point (`dvc exp show`), a run in MLflow with their trainings as children
        sweep=templates: also reports/templates.md and reports/templates.csv, which git ignores

A point that is an experiment already is not run again: the same command continues what was stopped, and
retries what failed. The workspace stays as it is, until `dvc exp apply NAME` adopts a point.
"""

import argparse
import logging
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from capas.errors import told


def main() -> int:
    options = parse_options()
    from capas.sweep.driver import clean, run, show

    if options.list:
        show(Path.cwd())
    elif options.clean:
        clean(Path.cwd())
    else:
        return run(Path.cwd(), options.words, options.multirun)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("-m", "--multirun", action="store_true", help="run all combinations")
    ways.add_argument("--list", action="store_true", help="sweeps, experiments, disk use")
    ways.add_argument("--clean", action="store_true", help="remove workspaces and logs")
    parser.add_argument("words", nargs="*", metavar="override", help="of Hydra: lora.r=8,16")
    return parser.parse_intermixed_args()


def stop(number: int, frame: Any) -> None:
    """End as Ctrl-C does: a scheduler that takes the machine back sends SIGTERM."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    logging.basicConfig(format="sweep: %(message)s")
    logging.getLogger("capas").setLevel(logging.INFO)
    # What Hydra's plugins say of a failed point is told better below the point.
    logging.getLogger("hydra_plugins").setLevel(logging.CRITICAL)
    command = shlex.join(["stages/sweep.py", *sys.argv[1:]])
    with told("sweep"):
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            sys.stderr.write(
                f"sweep: stopped; finished points are kept. To go on: python {command}\n"
            )
            sys.exit(130)
