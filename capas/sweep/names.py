"""Name the trials of a sweep after the keys that it varies, and leave out what all trials share."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from capas.config.hydra_overrides import choices_of, key_of

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9.=_-]+")
_EXPONENT = re.compile(r"[eE]\+?(-?)0*(\d)")
_MAX_NAME = 60


def swept_values(words: Iterable[str], conf: Path) -> dict[str, tuple[str, ...]]:
    """Return the values of each key that has several: `lora.r=8,16` -> {'lora.r': ('8', '16')}.

    An interval, which only a search can use, has its two ends.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        values = tuple(dict.fromkeys(text.partition("=")[2] for text in choices_of(word, conf)))
        if len(values) > 1:
            found[key_of(word)] = values
    return found


def name_of(overrides: Sequence[str], identity: str, swept: Collection[str] = ()) -> str:
    """Return a name that DVC, git and a shell accept: `learning_rate=1e-4-r=8-0123456789`."""
    words = "-".join(distinct(overrides, swept))
    plain = _NOT_IN_A_NAME.sub("-", words).replace("..", ".")
    return "-".join([plain[:_MAX_NAME].strip("-.") or "point", identity])


def distinct(overrides: Sequence[str], swept: Collection[str]) -> list[str]:
    """Return the swept values of a trial, in short words; without swept keys, all its overrides."""
    chosen = [word for word in overrides if key_of(word) in swept] or overrides
    headings = short_keys([key_of(word) for word in chosen])
    return [f"{headings[key_of(word)]}={_short(word.partition('=')[2])}" for word in chosen]


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return keys without their group: {'lora.r': 'r'}; a key whose last part is not unique stays whole."""
    leaves = {key: key.rpartition(".")[2] for key in keys}
    count = Counter(leaves.values())
    return {key: leaf if count[leaf] == 1 else key for key, leaf in leaves.items()}


def _short(value: str) -> str:
    """Return a float with at most 3 significant digits and no plus sign; other values as they are."""
    try:
        number = float(value)
    except ValueError:
        return value
    if value.lstrip("+-").isdigit():
        return value
    rounded = f"{number:.3g}"
    shown = value if float(rounded) == number else rounded
    return _EXPONENT.sub(r"e\1\2", shown)
