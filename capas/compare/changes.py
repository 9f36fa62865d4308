"""Find the parameters that differ between results, without those that follow from another parameter."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.config import options
from capas.config.composition import NOTHING_OVERRIDDEN, OVERRIDES, Compose, composer
from capas.core.errors import CapasError
from capas.core.params import flatten
from capas.tracking.run_params import clipped

Texts = Mapping[str, str]  # {dotted key: value}, as MLflow stores them
PRESET = ".preset"
SEEDS = frozenset({"seed", "trainer.seed", "trainer.data_seed"})
_FIRST = ("experiment", "model", "dataset")  # choices that select options of other groups
_REFERENCE = re.compile(r"^(?P<key>\w+): \$\{(?P<other>[\w.]+)\}", re.MULTILINE)


@dataclass(frozen=True)
class Changes:
    """Parameters that differ between results, in the order in which they are shown.

    Attributes:
        choices: groups whose chosen option differs.
        keys: keys that differ and do not follow from a choice or from another key.
        explained: keys that differ because they follow from a choice or from another key.
    """

    choices: tuple[str, ...]
    keys: tuple[str, ...]
    explained: tuple[str, ...]

    @property
    def shown(self) -> tuple[str, ...]:
        """The dotted keys to show, those of the choices first."""
        return (*(group + PRESET for group in self.choices), *self.keys)

    @property
    def only_seed(self) -> bool:
        return bool(self.keys) and not self.choices and SEEDS.issuperset(self.keys)


def texts_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters as {dotted key: text}, as an MLflow run stores them."""
    return clipped(flatten(values))


def find_changes(sides: Sequence[Texts], conf: Path, partial: bool = False) -> Changes:
    """Find the parameters in which results differ.

    Args:
        sides: parameters of each result.
        conf: the configuration folder, which defines what follows from what. A key is hidden only if conf/
            composes to exactly its value on every side.
        partial: a side may lack keys, and missing keys do not count as differences.
    """
    differing = list(_differing(sides, partial))
    groups = [key.removesuffix(PRESET) for key in differing if _is_choice(key)]
    keys = [key for key in differing if not _is_choice(key)]
    explained: set[str] = set()
    if groups and conf.is_dir():
        with _options(conf) as chosen:
            explained = {key for key in keys if chosen.explain(key, sides)}
            groups = _independent(groups, sides, chosen)
    if conf.is_dir():
        explained |= _referring(keys, sides, conf)
    left = tuple(key for key in keys if key not in explained)
    return Changes(tuple(groups), left, tuple(key for key in keys if key in explained))


def _differing(sides: Sequence[Texts], partial: bool) -> Iterator[str]:
    """Yield the keys that differ, in the order of the last side."""
    for key in dict.fromkeys(key for side in reversed(sides) for key in side):
        lacking = [side for side in sides if key not in side]
        if lacking and (partial or all(_is_filled(key, side) for side in lacking)):
            continue
        if len({side.get(key) for side in sides}) > 1:
            yield key


def _is_filled(key: str, side: Texts) -> bool:
    """Return whether a mapping that is empty elsewhere has keys here; these are shown instead."""
    return any(name.startswith(f"{key}.") for name in side)


def _is_choice(key: str) -> bool:
    return key.endswith(PRESET) and key.count(".") == 1


class _Options:
    """Compose conf/ with given options, each combination once."""

    def __init__(self, conf: Path, compose: Compose) -> None:
        self._conf, self._compose = conf, compose
        self._known: dict[tuple[str, ...], Texts | None] = {}

    def chosen(self, side: Texts) -> dict[str, str]:
        """Return {group: option} of a side, for the options that conf/ still has."""
        pairs = {k.removesuffix(PRESET): v for k, v in side.items() if _is_choice(k)}
        return {g: o for g, o in pairs.items() if o in options.options_of(self._conf, g)}

    def texts(self, choices: Mapping[str, str]) -> Texts | None:
        """Return the parameters that these options compose to, or None if they do not compose."""
        words = tuple(f"{group}={option}" for group, option in choices.items())
        if words not in self._known:
            try:
                self._known[words] = texts_of(self._compose(list(words)))
            except CapasError:  # options of another version of conf/: they explain nothing
                self._known[words] = None
        return self._known[words]

    def explain(self, key: str, sides: Sequence[Texts]) -> bool:
        """Return whether each side has exactly the value that its options give."""
        for side in sides:
            composed = self.texts(self.chosen(side))
            if composed is None or composed.get(key) != side.get(key):
                return False
        return True

    def follows(self, group: str, others: Sequence[str], sides: Sequence[Texts]) -> bool:
        """Return whether, on each side, the options of `others` select the option of `group`."""
        for side in sides:
            chosen = self.chosen(side)
            composed = self.texts({g: chosen[g] for g in others if g in chosen})
            if composed is None or composed.get(group + PRESET) != side.get(group + PRESET):
                return False
        return True


@contextmanager
def _options(conf: Path) -> Iterator[_Options]:
    """Yield the options of a copy of conf/ without overrides."""
    with TemporaryDirectory(prefix="capas-compare-") as folder:
        copy = Path(shutil.copytree(conf, Path(folder) / "conf"))
        (copy / OVERRIDES.name).write_text(NOTHING_OVERRIDDEN, encoding="utf-8")
        with composer(copy) as compose:
            yield _Options(copy, compose)


def _independent(groups: list[str], sides: Sequence[Texts], chosen: _Options) -> list[str]:
    """Return the choices that no other choice implies; a model, for example, implies its chat template."""
    kept = sorted(groups, key=lambda group: (group not in _FIRST, groups.index(group)))
    for group in reversed(kept[1:]):
        others = [other for other in kept if other != group]
        if chosen.follows(group, others, sides):
            kept = others
    return kept


def _referring(keys: Sequence[str], sides: Sequence[Texts], conf: Path) -> set[str]:
    """Return the keys that conf/ sets to `${another}`, if that key differs too and is equal on every side."""
    found = set()
    for key in keys:
        group, _, name = key.partition(".")
        others = {
            match["other"]
            for file in options.files(conf, group)
            for match in _REFERENCE.finditer(file.read_text(encoding="utf-8"))
            if match["key"] == name
        }
        if any(_agree(key, other, sides) for other in others):
            found.add(key)
    return found


def _agree(key: str, other: str, sides: Sequence[Texts]) -> bool:
    """Return whether two keys have the same value on every side."""
    return all(other in side and side[other] == side.get(key) for side in sides)
