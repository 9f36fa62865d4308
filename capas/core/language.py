"""Write the report's texts, from one YAML file per language, with numbers in that language's format.

A text may include the run's numbers as Jinja expressions over the facts of the run:
`Trained on {{ splits.train.num_records|num }} records.` Facts are escaped; texts are not, because they are
the project's own.
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

NARROW_SPACE = "\u202f"  # no-break
# Per language: the separator of thousands, the decimal mark, and the space before %.
_MARKS = {
    "en": (",", ".", ""),
    "es": (NARROW_SPACE, ",", NARROW_SPACE),
}


@dataclass(frozen=True)
class Numbers:
    """The format of numbers in a language: English 12,345.6 and 77.4%, Spanish 12 345,6 and 77,4 %."""

    code: str

    def num(self, value: float | None) -> str:
        """Return an integer with separated thousands; Spanish does not separate four digits (RAE)."""
        if value is None:
            return "–"
        plain = self.code == "es" and abs(value) < 10_000
        return f"{value:.0f}" if plain else f"{value:,.0f}".replace(",", _MARKS[self.code][0])

    def dec(self, value: float | None, digits: int = 2) -> str:
        """Return a number with fixed decimals, or in scientific notation if these would all be zero."""
        if value is None:
            return "–"
        text = f"{value:.{digits}f}"
        return self._written(f"{value:.1e}" if value and float(text) == 0 else text)

    def _written(self, text: str) -> str:
        return text.replace(".", _MARKS[self.code][1]).replace("-", "−")

    def sig(self, value: float | None) -> str:
        """Return a number with three significant digits: 267, 4.85, 0.200, 0.000211."""
        return "–" if value is None else self._written(f"{value:#.3g}".rstrip("."))

    def general(self, value: float) -> str:
        """Return a number in its shortest form: 0.004, 1.5, 2e-05."""
        return self._written(f"{value:g}")

    def pct(self, fraction: float | None, digits: int = 1) -> str:
        if fraction is None:
            return "–"
        return (
            self._written(f"{100 * fraction:.{0 if fraction in (0, 1) else digits}f}")
            + self.percent
        )

    def points(self, fraction: float, digits: int = 1) -> str:
        """Return a difference of two fractions in percentage points, with its sign."""
        return ("+" if fraction > 0 else "") + self.dec(100 * fraction, digits)

    def score(self, value: float | None, is_share: bool) -> str:
        """Return the score of a metric: a percentage, or a plain number if it is not a fraction."""
        return self.pct(value) if is_share else self.dec(value, 3)

    def gain(self, value: float, is_share: bool) -> str:
        """Return a difference of two scores, with its sign."""
        return self.points(value) if is_share else ("+" if value > 0 else "") + self.dec(value, 3)

    def size(self, num_bytes: float) -> str:
        """Return a number of bytes in decimal units (1 kB = 1000 B), as on disks and downloads."""
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
        """Return the text under a dotted key, with its expressions filled in.

        Raises:
            CapasError: the language's file has no such text.
        """
        if key not in self._texts:
            raise CapasError(f"{self._file} has no text '{key}'")
        return Markup(self._compiled(key).render(**more).strip())

    def _compiled(self, key: str) -> Template:
        """Return the compiled template of a text, cached because loops use one text for many rows."""
        if key not in self._templates:
            self._templates[key] = self._environment.from_string(self._texts[key])
        return self._templates[key]

    def metric(self, name: str) -> Markup:
        """Return the name of a metric in the language, or the plain name for the user's own function."""
        key = f"metrics.{name}.name"
        return self.say(key) if self.has(key) else escape(name)

    def render(self, template: str, **more: Any) -> str:
        """Return a rendered template of the folder."""
        return self._environment.get_template(template).render(**more)
