"""Draw the plots of a sweep's page with matplotlib, as `capas.report.plots` draws those of the report.

`words` translates a label; `number` writes a tick in the page's language.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from capas.report.figure import ACCENT, BASE, FAINT, INK, TUNED, drawing
from capas.report.plots import LABELS, WIDTH
from capas.sweep.costs import Costs
from capas.sweep.effects import Effect, is_logarithmic, is_spread
from capas.sweep.parallel import clipped

Words = Callable[[str], str]
Number = Callable[[float], str]
_LETTERS = 22  # of a category
_ROOM = 0.022  # of an axis, for a letter of a tick


def response(effect: Effect, objective: str, number: Number) -> Figure:
    """Draw the score over a key: the trials faint, the mean of each value bold, with its interval."""
    with drawing():
        figure = _numbers(effect, number) if effect.is_number else _strips(effect)
        axes = figure.axes[0]
        scores = [score for _, score in effect.points]
        _scale(axes, "y" if effect.is_number else "x", number, is_spread(scores))
        (axes.set_ylabel if effect.is_number else axes.set_xlabel)(objective)
    return figure


def costs_and_scores(
    costs: Costs, scores: Sequence[float], best: Sequence[int], objective: str, words: Words,
    number: Number,
) -> Figure:  # fmt: skip
    """Draw the score of each setting over its cost; those at `best`, cheapest first, are joined."""
    with drawing():
        figure = Figure(figsize=(WIDTH, 3.0))
        axes = figure.subplots()
        axes.plot(costs.of_rows, scores, "o", ms=6, color=BASE, alpha=0.55, mew=0, gid="settings")
        x, y = [costs.of_rows[i] for i in best], [scores[i] for i in best]
        axes.plot(
            x, y, "D-", ms=6.5, lw=1.2, color=TUNED, drawstyle="steps-post",
            label=words("pareto"), gid="pareto",
        )  # fmt: skip
        _scale(axes, "x", number, is_logarithmic(costs.of_rows) and is_spread(costs.of_rows))
        _scale(axes, "y", number, is_spread(scores))
        axes.set_xlabel(words(costs.measure))
        axes.set_ylabel(objective)
        axes.grid(axis="both")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def losses(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], words: Words, number: Number
) -> Figure:
    """Draw the training loss of each learning rate, lowest first, on a logarithmic axis."""
    colours = (BASE, TUNED, ACCENT, INK, FAINT)
    with drawing():
        figure = Figure(figsize=(WIDTH, 2.8))
        axes = figure.subplots()
        for place, (rate, rows) in enumerate(curves.items()):
            steps, values = [row["step"] for row in rows], [row["loss"] for row in rows]
            style = ("-", "--", ":")[place // len(colours) % 3]
            colour = colours[place % len(colours)]
            axes.plot(steps, values, style, color=colour, lw=1.4, label=rate)
        _scale(axes, "y", number, True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.set_xlabel(words("step"))
        axes.set_ylabel(words("loss"))
        axes.grid(axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(curves)))
    return figure


def _numbers(effect: Effect, number: Number) -> Figure:
    figure = Figure(figsize=(WIDTH - LABELS, 2.6))
    axes = figure.subplots()
    _points(axes, [x for x, _ in effect.points], [y for _, y in effect.points])
    positions = [level.position for level in effect.levels]
    _means(axes, positions, [level.mean for level in effect.levels], "D-")
    _intervals(axes, effect, "y")
    _scale(axes, "x", number, effect.is_log)
    axes.margins(x=0.08)
    if not effect.is_binned:
        _tick_values(axes, effect)
    axes.grid(axis="both")
    return figure


def _tick_values(axes: Any, effect: Effect) -> None:
    """Put the ticks at the values that were tried, unless their texts would touch each other."""
    texts = [level.text for level in effect.levels]
    axes.get_xlim()  # the limits are set when they are asked for
    to_axes = axes.transData - axes.transAxes
    places = [to_axes.transform((level.position, level.mean))[0] for level in effect.levels]
    gaps = [b - a for a, b in pairwise(places)]
    needed = [_ROOM * (len(a) + len(b) + 2) / 2 for a, b in pairwise(texts)]
    if all(gap >= room for gap, room in zip(gaps, needed, strict=True)):
        axes.set_xticks([level.position for level in effect.levels], texts)
        axes.xaxis.set_minor_locator(NullLocator())


def _strips(effect: Effect) -> Figure:
    num_places = len(effect.categories)
    figure = Figure(figsize=(WIDTH - LABELS, 0.7 + 0.3 * num_places))
    axes = figure.subplots()
    _points(axes, [score for _, score in effect.points], [place for place, _ in effect.points])
    positions = [level.position for level in effect.levels]
    _means(axes, [level.mean for level in effect.levels], positions, "D")
    _intervals(axes, effect, "x")
    labels = [clipped(text, _LETTERS) for text in effect.categories]
    axes.set_yticks(range(num_places), labels)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(num_places - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return figure


def _points(axes: Any, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(x, y, "o", ms=5, color=BASE, alpha=0.35, mew=0, gid="trials")


def _means(axes: Any, x: Sequence[float], y: Sequence[float], style: str) -> None:
    axes.plot(x, y, style, ms=6.5, lw=1.4, color=TUNED, gid="means")


def _intervals(axes: Any, effect: Effect, along: str) -> None:
    """Draw the intervals of the means along the axis of the score, if there are seeds."""
    levels = [level for level in effect.levels if level.margin is not None]
    if not levels:
        return
    positions, means = [level.position for level in levels], [level.mean for level in levels]
    x, y = (positions, means) if along == "y" else (means, positions)
    bars = {f"{along}err": [level.margin for level in levels]}
    axes.errorbar(x, y, **bars, fmt="none", ecolor=TUNED, elinewidth=1.6, capsize=3)


def _scale(axes: Any, name: str, number: Number, is_log: bool) -> None:
    """Set an axis to few ticks in the page's language, logarithmic if asked for."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    if is_log:
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        low, high = sorted(axis.get_view_interval())
        decades = high / max(low, 1e-300) > 30
        axis.set_major_locator(LogLocator(subs=(1,) if decades else (1, 2, 5), numticks=6))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(5 if name == "y" else 4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
