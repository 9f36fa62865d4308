"""Add conf/own to Hydra's search path, after conf/. `register` registers the plugin."""

from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from capas.config.options import OWN, check

_PROVIDER = "own options"


def extend(search_path: ConfigSearchPath) -> None:
    """Add the folder `own` in the primary configuration's folder, if there is one.

    Raises:
        CapasError: see `capas.config.options.check`.
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
    """A Hydra plugin, which Hydra calls for every search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        extend(search_path)


def initialize(conf: Path) -> Any:
    """Return Hydra's context manager for composing `conf`, including its own options.

    Raises:
        CapasError: see `options.check`.
    """
    from hydra import initialize_config_dir

    register()
    return initialize_config_dir(str(conf.resolve()), version_base="1.3")


def register() -> None:
    """Make every search path of Hydra in this process include the own options."""
    from hydra.core.plugins import Plugins

    Plugins.instance().register(OwnOptions)
