"""Draw the DAG of dvc.yaml: which stage needs which stage's output."""

from collections.abc import Mapping
from graphlib import TopologicalSorter
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from capas.core.dag import StageSpec
from capas.report.figure import ACCENT, FAINT, INK, PANEL, drawing

_BOX = (118, 34)  # width and height, in points
_GAP = (22, 30)
_PASSES = 8  # iterations of the layout; it settles earlier
Point = tuple[float, float]


def edges(specs: Mapping[str, StageSpec]) -> list[tuple[str, str]]:
    """Return (maker, user) for every pair of stages, without dependencies that a longer path implies."""
    makers = {out: name for name, spec in specs.items() for out in spec.outs}
    needs = {
        name: {makers[path] for path in (*spec.deps, *spec.params) if path in makers}
        for name, spec in specs.items()
    }
    return [
        (maker, user)
        for user in specs
        for maker in specs
        if maker in needs[user]
        and not any(maker in _ancestors(other, needs) for other in needs[user] - {maker})
    ]


def _ancestors(stage: str, needs: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        for maker in needs[waiting.pop()] - found:
            found.add(maker)
            waiting.append(maker)
    return found


def positions(stages: list[str], links: list[tuple[str, str]]) -> dict[str, Point]:
    """Return the centres of the stages in points: row under row, each near the stages it is linked with."""
    row_of = _rows(stages, links)
    near = {s: [m for m, u in links if u == s] + [u for m, u in links if m == s] for s in stages}
    x = dict.fromkeys(stages, 0.0)
    for _ in range(_PASSES):
        for row in range(max(row_of.values()) + 1):
            members = [s for s in stages if row_of[s] == row]
            wanted = {s: sum(x[n] for n in near[s]) / max(1, len(near[s])) for s in members}
            members.sort(key=lambda s: round(wanted[s], 6))  # stable: ties stand as in dvc.yaml
            x |= _spread(members, wanted)
    return {s: (x[s], -row_of[s] * (_BOX[1] + _GAP[1])) for s in stages}


def _rows(stages: list[str], links: list[tuple[str, str]]) -> dict[str, int]:
    """Return each stage's row: stages without inputs, their users, then the rest just above its users."""
    makers = {stage: [m for m, u in links if u == stage] for stage in stages}
    users = {stage: [u for m, u in links if m == stage] for stage in stages}
    order = list(TopologicalSorter(makers).static_order())
    row: dict[str, int] = {}
    for stage in order:
        row[stage] = 1 + max((row[maker] for maker in makers[stage]), default=-1)
    for stage in reversed(order):
        if row[stage] > 1 and users[stage]:
            row[stage] = min(row[user] for user in users[stage]) - 1
    return row


def _spread(members: list[str], wanted: dict[str, float]) -> dict[str, float]:
    """Return the wanted places, moved apart so that no boxes touch, around their common middle."""
    step = _BOX[0] + _GAP[0]
    x: dict[str, float] = {}
    for before, stage in zip([None, *members], members, strict=False):
        x[stage] = max(wanted[stage], x[before] + step) if before else wanted[stage]
    moved = (sum(x.values()) - sum(wanted.values())) / len(members)
    return {stage: place - moved for stage, place in x.items()}


def draw(specs: Mapping[str, StageSpec], highlighted: str = "train") -> Figure:
    """Draw boxes and arrows, top to bottom."""
    links = edges(specs)
    centres = positions(list(specs), links)
    with drawing():
        figure = Figure()
        axes = figure.add_axes((0, 0, 1, 1))
        for name, (x, y) in centres.items():
            _draw_box(axes, name, x, y, ACCENT if name == highlighted else FAINT)
        for maker, user in links:
            _draw_arrow(axes, centres[maker], centres[user])
        _fit(figure, axes, list(centres.values()))
    return figure


def _draw_box(axes: Any, name: str, x: float, y: float, colour: str) -> None:
    width, height = _BOX
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=7"
    box = FancyBboxPatch(corner, width, height, boxstyle=style, fc=PANEL, ec=colour, lw=1.2)
    axes.add_patch(box)
    axes.text(x, y, name, ha="center", va="center", color=INK, url=f"#to-stage-{name}", fontsize=11)


def _draw_arrow(axes: Any, maker: Point, user: Point) -> None:
    half = _BOX[1] / 2
    arrow = {"arrowstyle": "-|>", "color": FAINT, "lw": 1, "shrinkA": 0, "shrinkB": 1}
    ends = {"xytext": (maker[0], maker[1] - half), "xy": (user[0], user[1] + half)}
    axes.annotate("", **ends, arrowprops=arrow)


def _fit(figure: Figure, axes: Any, centres: list[tuple[float, float]]) -> None:
    """Scale the axes so that one unit is one point."""
    xs, ys = [x for x, _ in centres], [y for _, y in centres]
    width, height = max(xs) - min(xs) + _BOX[0] + 8, max(ys) - min(ys) + _BOX[1] + 8
    axes.set_xlim(min(xs) - _BOX[0] / 2 - 4, min(xs) - _BOX[0] / 2 - 4 + width)
    axes.set_ylim(min(ys) - _BOX[1] / 2 - 4, min(ys) - _BOX[1] / 2 - 4 + height)
    axes.axis("off")
    figure.set_size_inches(width / 72, height / 72)
