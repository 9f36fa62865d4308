"""Run the pipeline for many values: a Hydra multirun of DVC experiments, each in its own workspace.

    python stages/sweep.py -m trainer.learning_rate=1e-3,4e-3 lora.r=8,16        all combinations
    python stages/sweep.py -m lora.r=8,16 hydra/launcher=joblib hydra.launcher.n_jobs=2      two at once
    python stages/sweep.py -m trainer.learning_rate=1e-3,4e-3 seed=1,2,3     mean and interval of three seeds
    python stages/sweep.py -m lora.r=8,16 sweep.objective=train.train_loss       rank by another metric
    python stages/sweep.py -m chat_template=llama3,chatml experiment=quick      choices; an overlay
    python stages/sweep.py -m 'model=glob(qwen*)'        all choices of a group that match a pattern
    python stages/sweep.py -m sweep=learning_rate        a predefined sweep: see conf/sweep/
    python stages/sweep.py -m sweep=templates            train with each chat template, ask each model in each
    python stages/sweep.py -m sweep=halving lora.r=4,8,16,32      train all a little, the best to the end
    python stages/sweep.py -m sweep=optuna 'trainer.learning_rate=tag(log,interval(1e-4,3e-2))'
    python stages/sweep.py -m hydra/launcher=slurm ...   one job per trial: see conf/hydra/launcher/
    python stages/sweep.py --list                        list sweeps, experiments and disk use
    python stages/sweep.py --clean                       remove workspaces and logs; experiments are kept

Reads   the workspace at the start, including uncommitted changes; conf/sweep.yaml, conf/sweep/
Writes  a DVC experiment per trial (`dvc exp show`), an MLflow run with the trials as child runs;
        reports/sweep.html and reports/sweep.es.html: verdict, ranking, response to each parameter, cost, next
        steps; git ignores them, and the next sweep replaces them
        sweep=templates: also reports/templates.md and reports/templates.csv, which git ignores

A finished trial is not run again: the same command continues a stopped sweep and retries failed trials. The
workspace does not change until `dvc exp apply NAME` adopts a trial.
"""

import argparse
import logging
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from capas.core.errors import exit_on_user_error
from capas.sweep.flags import refuse_hydra_flags


def main() -> int:
    refuse_hydra_flags(sys.argv[1:])
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
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "-m", "--multirun", action="store_true", help="run all combinations of the values"
    )
    ways.add_argument("--list", action="store_true", help="list sweeps, experiments and disk use")
    ways.add_argument(
        "--clean", action="store_true", help="remove the workspaces and logs of sweeps"
    )
    parser.add_argument(
        "words", nargs="*", metavar="override", help="Hydra override, e.g. lora.r=8,16"
    )
    return parser.parse_intermixed_args()


def stop(number: int, frame: Any) -> None:
    """Raise KeyboardInterrupt, as Ctrl-C does: a scheduler that takes the machine back sends SIGTERM."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    logging.basicConfig(format="sweep: %(message)s")
    logging.getLogger("capas").setLevel(logging.INFO)
    # The sweep itself reports failed trials better than Hydra's plugins do.
    logging.getLogger("hydra_plugins").setLevel(logging.CRITICAL)
    command = shlex.join(["stages/sweep.py", *sys.argv[1:]])
    with exit_on_user_error("sweep"):
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            sys.stderr.write(
                f"sweep: stopped; finished trials are kept. To continue: python {command}\n"
            )
            sys.exit(130)
