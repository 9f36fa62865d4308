"""Loaded by DVC alone (`hydra.plugins_path` in .dvc/config), before `dvc exp run` writes params.yaml.

DVC composes conf/ anew for every experiment. By itself it would drop an edit of params.yaml, repeat Hydra's
words for what does not compose, leave wrong values to the first stage, queue the valid ones of several
values before it refuses a wrong one, and leave the workspace as a failed experiment left it.
"""

import atexit
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from capas.config.composition import CONF, PARAMS, edited_by_hand, with_new_keys
from capas.config.hydra_overrides import check, check_points
from capas.config.problems import Problem, refused
from capas.config.requirements import lacking, read_by
from capas.config.searchpath import extend
from capas.core.errors import CapasError, without_secrets
from capas.workspace import experiment_recovery, unfinished


class ParamsGuard(SearchPathPlugin):
    """Hydra instantiates it when it looks for plugins. The search path gets the own options, conf/own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        root = _root()
        with _dvc_errors():
            extend(search_path)
        if root is None:
            return
        from dvc.exceptions import DvcException

        if root != Path.cwd():
            raise DvcException(
                "`dvc exp run` writes params.yaml into the folder in which it is started, and no stage would "
                f"see the values: start it in {root}"
            )
        if not (root / PARAMS).exists() or not edited_by_hand(root / PARAMS):
            return
        raise DvcException(
            "params.yaml was edited by hand; `dvc exp run` would drop the edit. "
            "Record it first: dvc repro compose   (or give the value: dvc exp run -S key=value)"
        )


def _root() -> Path | None:
    here = Path.cwd()
    return next((d for d in (here, *here.parents) if (d / "dvc.yaml").exists()), None)


@contextmanager
def _dvc_errors() -> Iterator[None]:
    """Turn an error of capas into one that DVC shows without a traceback."""
    try:
        yield
    except CapasError as error:
        from dvc.exceptions import DvcException

        raise DvcException(without_secrets(str(error))) from None


_compose_config = Hydra.compose_config


@wraps(_compose_config)
def _checked_config(self: Hydra, config_name: Any, overrides: Any, *rest: Any, **more: Any) -> Any:
    """Compose as Hydra does, once all values of the command are valid; nothing was written before."""
    root = _root()
    if root is None:
        return _compose_config(self, config_name, overrides, *rest, **more)
    asked = _asked()
    given = asked.get("path_overrides", {}).get(str(PARAMS), overrides)
    with _dvc_errors():
        _check_command(
            root,
            tuple(given),
            targets=tuple(asked.get("targets") or ()),
            waits=bool(asked.get("queue")),
            runs=bool(asked) and not asked["kwargs"].get("dry"),
        )
        experiment_recovery.begin(root, sys.argv)
    atexit.register(experiment_recovery.at_exit, root)
    _guard_experiments()
    known = with_new_keys(list(overrides), root / CONF)
    return _compose_config(self, config_name, known, *rest, **more)


def _asked() -> dict[str, Any]:
    """Return the arguments of `dvc exp run`; none where something else composes.

    It calls Hydra once for each combination of values and hands over that one alone.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "dvc.repo.experiments.run":
            return frame.f_locals
    return {}


@cache
def _check_command(
    root: Path, overrides: tuple[str, ...], targets: tuple[str, ...], waits: bool, runs: bool
) -> None:
    """Check every combination, once a process.

    Args:
        waits: for the queue, whose workers may be on another machine: what this one lacks is a warning.
        runs: on this machine.

    Raises:
        CapasError: all problems at once.
    """
    reads = read_by(root, targets) if runs else ()
    if not waits:
        if problems := check(overrides, root / CONF, reads=reads):
            raise refused(problems)
        return
    checked = check_points(overrides, root / CONF, several=True)
    if checked.problems:
        raise refused(checked.problems, "nothing was queued")
    missing = dict[Problem, None].fromkeys(
        problem for point in checked.points for problem in lacking(point.values, reads)
    )
    if missing:
        from dvc.ui import ui

        lines = "\n".join(f"  {problem}" for problem in missing)
        ui.warn(f"this machine lacks what was queued; it runs where a worker has it:\n{lines}")


def _guard_experiments() -> None:
    """Tell `capas.workspace.experiment_recovery` how far an experiment has come."""
    from dvc.repo.experiments.queue.tempdir import TempDirQueue
    from dvc.repo.experiments.queue.workspace import WorkspaceQueue

    if hasattr(WorkspaceQueue._reproduce_entry, "__wrapped__"):
        return
    in_workspace, in_folder = WorkspaceQueue._reproduce_entry, TempDirQueue._reproduce_entry

    @wraps(in_workspace)
    def guarded(queue: Any, *args: Any, **kwargs: Any) -> Any:
        root = Path(queue.repo.root_dir)
        unfinished.mark_running(root)
        result = in_workspace(queue, *args, **kwargs)
        unfinished.drop(root)  # it succeeded: the workspace is this experiment now
        return result

    @wraps(in_folder)
    def elsewhere(queue: Any, *args: Any, **kwargs: Any) -> Any:
        experiment_recovery.end_elsewhere(Path(queue.repo.root_dir))
        return in_folder(queue, *args, **kwargs)

    WorkspaceQueue._reproduce_entry, TempDirQueue._reproduce_entry = guarded, elsewhere


Hydra.compose_config = _checked_config
