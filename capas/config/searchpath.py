"""Hydra's search path with conf/own behind conf/. `capas.config.options.register` registers it."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from capas.config.options import OWN, check

_PROVIDER = "own options"


def extend(search_path: ConfigSearchPath) -> None:
    """Add the folder `own` of the primary configuration's folder, where there is one.

    Raises:
        CapasError: as `capas.config.options.check`.
    """
    entries = search_path.get_path()
    main = next(
        (Path(e.path) for e in entries if e.provider == "main" and "://" not in e.path), None
    )
    if main is None or not (main / OWN).is_dir() or any(e.provider == _PROVIDER for e in entries):
        return
    check(main)
    search_path.append(_PROVIDER, str(main / OWN))


class OwnOptions(SearchPathPlugin):
    """Plugin of Hydra; it is asked for every search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        extend(search_path)
