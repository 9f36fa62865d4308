"""Draw matplotlib figures as inline SVG: the same bytes every time, coloured by the page's style sheet.

A figure is drawn in placeholder colours that are replaced by CSS variables, so that one drawing is
readable in light and in dark mode. Text stays text: it takes the page's font and can be searched.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib.figure import Figure

# Placeholder -> variable of capas/report/style.css. All differ, and matplotlib uses none of them by itself.
COLOURS = {
    "#010101": "--ink",
    "#020202": "--faint",
    "#030303": "--rule",
    "#040404": "--base",
    "#050505": "--tuned",
    "#060606": "--panel",
    "#070707": "--accent",
}
INK, FAINT, RULE, BASE, TUNED, PANEL, ACCENT = COLOURS
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "capas",
    "text.parse_math": False,  # a model may write dollar signs
    "font.family": "DejaVu Sans",  # ships with matplotlib, so the layout is the same everywhere
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Set matplotlib to the page's style; glyphs that its font lacks are drawn by the browser."""
    with (
        mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "backend": "svg"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an <svg> element for an HTML page; `name` makes its ids unique in the page."""
    buffer = io.StringIO()
    with drawing():
        figure.savefig(
            buffer, format="svg", bbox_inches="tight", pad_inches=0.04, metadata={"Date": None}
        )
    svg = buffer.getvalue()
    svg = re.sub(r"<(metadata|style).*?</\1>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#(?!to-)', rf"\1#{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", svg)
    for placeholder, variable in COLOURS.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return _accessible(svg, description)


def _accessible(svg: str, description: str) -> str:
    """Make an SVG take the size of its container, and describe it to those who cannot see it."""
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2]
    opening = (
        f'<svg viewBox="0 0 {width} {height}" style="--width: {float(width):.0f}px" role="img" '
        f'aria-label="{escape(description)}" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'xmlns="http://www.w3.org/2000/svg">'
    )
    return opening + svg[svg.index(">") + 1 :].strip()
