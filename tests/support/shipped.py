"""The shipped configuration, composed by Hydra once a process for the same overrides."""

from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path

from capas.config.composition import Values, composer, dump

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(overrides: Iterable[str] = ()) -> Values:
    """The values, as on Hydra's command line; a copy that the caller may change."""
    return deepcopy(_composed(tuple(overrides)))


def composed_text(overrides: Iterable[str] = ()) -> str:
    """params.yaml with these overrides."""
    return _text(tuple(overrides))


@cache
def _composed(overrides: tuple[str, ...]) -> Values:
    with composer(CONF) as compose:
        return compose(list(overrides))


@cache
def _text(overrides: tuple[str, ...]) -> str:
    return dump(_composed(overrides))
