"""Loaded by DVC alone (`hydra.plugins_path` in .dvc/config), before `dvc exp run` writes params.yaml.

DVC composes conf/ anew for every experiment. It would drop what somebody wrote into params.yaml by hand, and
say in Hydra's words what does not compose; wrong values would be found by the first stage alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from capas.composition import CONF, PARAMS, checked, edited_by_hand
from capas.errors import CapasError, without_secrets
from capas.searchpath import extend


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
    """As Hydra's own, for values that are valid: every problem is told at once, and nothing was written."""
    root = _root()
    if root is None:
        return _compose_config(self, config_name, overrides, *rest, **more)
    with _dvc_errors():
        return checked(
            lambda known: _compose_config(self, config_name, known, *rest, **more),
            list(overrides),
            root / CONF,
        )


Hydra.compose_config = _checked_config
