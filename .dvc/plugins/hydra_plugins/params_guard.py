"""Loaded by DVC alone (`hydra.plugins_path` in .dvc/config), before `dvc exp run` writes params.yaml.

DVC composes conf/ anew for every experiment and would drop what somebody wrote into params.yaml by hand.
"""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from capas.composition import PARAMS, edited_by_hand


class ParamsGuard(SearchPathPlugin):
    """Hydra instantiates it when it looks for plugins; the search path itself stays as it is."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        here = Path.cwd()
        root = next((d for d in (here, *here.parents) if (d / "dvc.yaml").exists()), None)
        if root is None or not (root / PARAMS).exists() or not edited_by_hand(root / PARAMS):
            return
        from dvc.exceptions import DvcException

        raise DvcException(
            "params.yaml was edited by hand; `dvc exp run` would drop the edit. "
            "Record it first: dvc repro compose   (or give the value: dvc exp run -S key=value)"
        )
