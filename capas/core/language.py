"""The report's words: one YAML file per language, numbers written as that language writes them.

A text may hold the run's own numbers, as Jinja expressions over the facts of the run:
`Trained on {{ splits.train.num_records|num }} records.` Facts are escaped, texts are not: they are ours.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from capas.core.dag import read_yaml
from capas.core.errors import CapasError
from capas.core.params import flatten

NARROW_SPACE = "\u202f"  # does not break a line
_MARKS = {
    "en": (",", ".", ""),
    "es": (NARROW_SPACE, ",", NARROW_SPACE),
}  # thousands, decimal, before %


@dataclass(frozen=True)
class Numbers:
    """Numbers as text: English 12,345.6 and 77.4%, Spanish 12 345,6 and 77,4 %."""

    code: str

    def num(self, value: float | None) -> str:
        """An integer with its thousands apart; Spanish leaves four digits together (RAE)."""
        if value is None:
            return "–"
        plain = self.code == "es" and abs(value) < 10_000
        return f"{value:.0f}" if plain else f"{value:,.0f}".replace(",", _MARKS[self.code][0])

    def dec(self, value: float | None, digits: int = 2) -> str:
        """With a fixed number of decimals; scientific where these would show nothing but zeros."""
        if value is None:
            return "–"
        text = f"{value:.{digits}f}"
        return self._written(f"{value:.1e}" if value and float(text) == 0 else text)

    def _written(self, text: str) -> str:
        return text.replace(".", _MARKS[self.code][1]).replace("-", "−")

    def sig(self, value: float | None) -> str:
        """Three significant digits: 267, 4.85, 0.200, 0.000211."""
        return "–" if value is None else self._written(f"{value:#.3g}".rstrip("."))

    def general(self, value: float) -> str:
        """As short as it can be written: 0.004, 1.5, 2e-05."""
        return self._written(f"{value:g}")

    def pct(self, fraction: float | None, digits: int = 1) -> str:
        if fraction is None:
            return "–"
        return (
            self._written(f"{100 * fraction:.{0 if fraction in (0, 1) else digits}f}")
            + self.percent
        )

    def points(self, fraction: float, digits: int = 1) -> str:
        """A difference of two shares, with its sign."""
        return ("+" if fraction > 0 else "") + self.dec(100 * fraction, digits)

    def score(self, value: float | None, is_share: bool) -> str:
        """Of a metric: a percentage, or a plain number where it may lie beyond 0 and 1."""
        return self.pct(value) if is_share else self.dec(value, 3)

    def gain(self, value: float, is_share: bool) -> str:
        """A difference of two scores, with its sign."""
        return self.points(value) if is_share else ("+" if value > 0 else "") + self.dec(value, 3)

    def size(self, num_bytes: float) -> str:
        """Bytes in powers of ten, as disks and downloads are sold."""
        for unit, digits in (("B", 0), ("kB", 0), ("MB", 1)):
            if num_bytes < 1000:
                return f"{self.dec(num_bytes, digits)}{NARROW_SPACE}{unit}"
            num_bytes /= 1000
        return f"{self.dec(num_bytes, 2)}{NARROW_SPACE}GB"

    @property
    def percent(self) -> str:
        return _MARKS[self.code][2] + "%"


class Language:
    """The texts of `folder/CODE.yaml`, filled with facts: `language.say("concepts.token.text")`."""

    def __init__(self, folder: Path, code: str, facts: Mapping[str, Any]) -> None:
        self.code, self.numbers, self._file = code, Numbers(code), folder / f"{code}.yaml"
        self._texts = flatten(read_yaml(self._file))
        self._templates: dict[str, Template] = {}
        self._environment = Environment(
            loader=FileSystemLoader(folder),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        for name in ("num", "dec", "sig", "general", "pct", "points", "score", "gain", "size"):
            self._environment.filters[name] = getattr(self.numbers, name)
        self._environment.filters["json"] = partial(json.dumps, ensure_ascii=False)
        self._environment.globals.update(
            facts, say=self.say, has_text=self.has, metric=self.metric, lang=code
        )

    def has(self, key: str) -> bool:
        return key in self._texts

    def say(self, key: str, **more: Any) -> Markup:
        """The text under a dotted key, its expressions filled in.

        Raises:
            CapasError: the language's file has no such text.
        """
        if key not in self._texts:
            raise CapasError(f"{self._file} has no text '{key}'")
        return Markup(self._compiled(key).render(**more).strip())

    def _compiled(self, key: str) -> Template:
        """Loops say the same text for many rows."""
        if key not in self._templates:
            self._templates[key] = self._environment.from_string(self._texts[key])
        return self._templates[key]

    def metric(self, name: str) -> Markup:
        """What a metric is called; a function of the user's own by its name."""
        key = f"metrics.{name}.name"
        return self.say(key) if self.has(key) else escape(name)

    def render(self, template: str, **more: Any) -> str:
        """A template of the folder."""
        return self._environment.get_template(template).render(**more)
