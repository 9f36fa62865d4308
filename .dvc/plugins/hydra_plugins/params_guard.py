"""Loaded by DVC alone (`hydra.plugins_path` in .dvc/config), before `dvc exp run` writes params.yaml.

DVC composes conf/ anew for every experiment. It would drop what somebody wrote into params.yaml by hand, and
say in Hydra's words what does not compose; wrong values would be found by the first stage alone. And it would
leave the workspace as a failed experiment left it.
"""

import atexit
import sys
from functools import wraps
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from capas import experiment, unfinished
from capas.composition import CONF, PARAMS, checked, edited_by_hand
from capas.errors import CapasError, without_secrets


class ParamsGuard(SearchPathPlugin):
    """Hydra instantiates it when it looks for plugins; the search path itself stays as it is."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        root = _root()
        if root is None or not (root / PARAMS).exists() or not edited_by_hand(root / PARAMS):
            return
        from dvc.exceptions import DvcException

        raise DvcException(
            "params.yaml was edited by hand; `dvc exp run` would drop the edit. "
            "Record it first: dvc repro compose   (or give the value: dvc exp run -S key=value)"
        )


def _root() -> Path | None:
    here = Path.cwd()
    return next((d for d in (here, *here.parents) if (d / "dvc.yaml").exists()), None)


_compose_config = Hydra.compose_config


@wraps(_compose_config)
def _checked_config(self: Hydra, config_name: Any, overrides: Any, *rest: Any, **more: Any) -> Any:
    """As Hydra's own, for values that are valid: every problem is told at once, and nothing was written."""
    root = _root()
    if root is None:
        return _compose_config(self, config_name, overrides, *rest, **more)
    try:
        experiment.begin(root, sys.argv)
        atexit.register(experiment.at_exit, root)
        _guard_experiments()
        return checked(
            lambda known: _compose_config(self, config_name, known, *rest, **more),
            list(overrides),
            root / CONF,
        )
    except CapasError as error:
        from dvc.exceptions import DvcException

        raise DvcException(without_secrets(str(error))) from None


def _guard_experiments() -> None:
    """Tell `capas.experiment` how far an experiment has come."""
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
        experiment.end_elsewhere(Path(queue.repo.root_dir))
        return in_folder(queue, *args, **kwargs)

    WorkspaceQueue._reproduce_entry, TempDirQueue._reproduce_entry = guarded, elsewhere


Hydra.compose_config = _checked_config
