"""Which parameters differ between results, without those that follow from another one."""

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

Texts = Mapping[str, str]  # {dotted key: value}, as MLflow has them
PRESET = ".preset"
SEEDS = frozenset({"seed", "trainer.seed", "trainer.data_seed"})
_FIRST = ("experiment", "model", "dataset")  # choices that bring others
_REFERENCE = re.compile(r"^(?P<key>\w+): \$\{(?P<other>[\w.]+)\}", re.MULTILINE)


@dataclass(frozen=True)
class Changes:
    """`choices` are groups with another option, `keys` what these do not explain; both in the order to show.

    `explained` are the keys whose values follow from a choice or from another key.
    """

    choices: tuple[str, ...]
    keys: tuple[str, ...]
    explained: tuple[str, ...]

    @property
    def shown(self) -> tuple[str, ...]:
        """Dotted keys: those of the choices first."""
        return (*(group + PRESET for group in self.choices), *self.keys)

    @property
    def only_seed(self) -> bool:
        return bool(self.keys) and not self.choices and SEEDS.issuperset(self.keys)


def texts_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters as text by dotted key, as a run of MLflow has them."""
    return clipped(flatten(values))


def find_changes(sides: Sequence[Texts], conf: Path, partial: bool = False) -> Changes:
    """Find the parameters in which results differ.

    Args:
        sides: parameters of each result.
        conf: the configuration that says what follows from what. Nothing is hidden unless it composes to
            exactly the values of every side.
        partial: a side may lack keys, which then do not count.
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
    """In the order of the last side."""
    for key in dict.fromkeys(key for side in reversed(sides) for key in side):
        lacking = [side for side in sides if key not in side]
        if lacking and (partial or all(_is_filled(key, side) for side in lacking)):
            continue
        if len({side.get(key) for side in sides}) > 1:
            yield key


def _is_filled(key: str, side: Texts) -> bool:
    """Whether a mapping that is empty elsewhere has keys here: they are shown in its place."""
    return any(name.startswith(f"{key}.") for name in side)


def _is_choice(key: str) -> bool:
    return key.endswith(PRESET) and key.count(".") == 1


class _Options:
    """What conf/ composes to with given options, each combination composed once."""

    def __init__(self, conf: Path, compose: Compose) -> None:
        self._conf, self._compose = conf, compose
        self._known: dict[tuple[str, ...], Texts | None] = {}

    def chosen(self, side: Texts) -> dict[str, str]:
        """The options of a side, as far as conf/ still has them."""
        pairs = {k.removesuffix(PRESET): v for k, v in side.items() if _is_choice(k)}
        return {g: o for g, o in pairs.items() if o in options.options_of(self._conf, g)}

    def texts(self, choices: Mapping[str, str]) -> Texts | None:
        """None where they do not compose."""
        words = tuple(f"{group}={option}" for group, option in choices.items())
        if words not in self._known:
            try:
                self._known[words] = texts_of(self._compose(list(words)))
            except CapasError:  # of another version of conf/: then nothing is explained by it
                self._known[words] = None
        return self._known[words]

    def explain(self, key: str, sides: Sequence[Texts]) -> bool:
        """Whether each side has exactly the value that its options give."""
        for side in sides:
            composed = self.texts(self.chosen(side))
            if composed is None or composed.get(key) != side.get(key):
                return False
        return True

    def follows(self, group: str, others: Sequence[str], sides: Sequence[Texts]) -> bool:
        """Whether the options of `others` bring that of `group` on each side."""
        for side in sides:
            chosen = self.chosen(side)
            composed = self.texts({g: chosen[g] for g in others if g in chosen})
            if composed is None or composed.get(group + PRESET) != side.get(group + PRESET):
                return False
        return True


@contextmanager
def _options(conf: Path) -> Iterator[_Options]:
    """Options of a copy of conf/ that overrides nothing."""
    with TemporaryDirectory(prefix="capas-compare-") as folder:
        copy = Path(shutil.copytree(conf, Path(folder) / "conf"))
        (copy / OVERRIDES.name).write_text(NOTHING_OVERRIDDEN, encoding="utf-8")
        with composer(copy) as compose:
            yield _Options(copy, compose)


def _independent(groups: list[str], sides: Sequence[Texts], chosen: _Options) -> list[str]:
    """The choices that no other choice brings, as a model brings its chat template."""
    kept = sorted(groups, key=lambda group: (group not in _FIRST, groups.index(group)))
    for group in reversed(kept[1:]):
        others = [other for other in kept if other != group]
        if chosen.follows(group, others, sides):
            kept = others
    return kept


def _referring(keys: Sequence[str], sides: Sequence[Texts], conf: Path) -> set[str]:
    """Keys that conf/ sets to `${another}`, which differs as well and has the same value on every side."""
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
    """Whether a key has the value of the other one on every side."""
    return all(other in side and side[other] == side.get(key) for side in sides)
