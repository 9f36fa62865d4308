"""Draw the report's plots with matplotlib. Each function takes plain rows and returns a Figure.

`words` translates a label; `number` writes a tick in the page's language.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from capas.report.figure import ACCENT, BASE, FAINT, INK, TUNED, drawing

Row = Mapping[str, Any]
Words = Callable[[str], str]
Number = Callable[[float], str]
UNCHANGED = "unchanged"  # in reports/next_token.csv: no decoding setting applied
WIDTH = 5.2  # inches: on a phone, the figure's text is as large as the text around it
LABELS = 1.3  # inches that long labels take of the width
NUM_COLUMNS = 3  # settings side by side
MAX_TOKENS = 48  # tokens of an answer whose losses are drawn
MARKERS = {"base": "o", "nearest": "s", "tuned": "D"}  # models differ in shape and in colour
COLOURS = {"base": BASE, "nearest": ACCENT, "tuned": TUNED}


def loss_curves(
    history: Sequence[Row], validation: Sequence[Row], words: Words, number: Number
) -> Figure:
    """Draw the loss on supervised tokens over optimizer steps, on a logarithmic axis."""
    with drawing():
        figure, axes = _axes(WIDTH, 2.8)
        steps, losses = [row["step"] for row in history], [row["loss"] for row in history]
        axes.plot(steps, losses, color=BASE, label=words("train"), lw=1.4)
        if validation:
            at = [row["step"] for row in validation]
            seen = [row["loss"] for row in validation]
            axes.plot(at, seen, color=TUNED, marker="D", ms=4.5, label=words("validation"))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        _label(axes, words("step"), words("loss"), number)
        axes.legend(loc="upper right")
    return figure


def answer_scores(
    validation: Sequence[Row], train: Row, metric: str, words: Words, number: Number
) -> Figure:
    """Draw the score of generated answers to validation records, with the step whose weights were saved."""
    with drawing():
        figure, axes = _axes(WIDTH, 2.2)
        scores = [row[train["answers"]["metric"]] for row in validation]
        axes.plot([row["step"] for row in validation], scores, color=TUNED, marker="D", ms=4.5)
        axes.axvline(train["kept_step"], color=ACCENT, lw=1.2, ls="--", label=words("kept_step"))
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        _label(axes, words("step"), metric, number)
        axes.legend(loc="lower right")
    return figure


def learning_rate(history: Sequence[Row], words: Words, number: Number) -> Figure:
    """Draw the learning rate, and beneath it the norm of the gradient."""
    with drawing():
        figure = Figure(figsize=(WIDTH, 3.0))
        axes = figure.subplots(2, 1, sharex=True)
        steps = [row["step"] for row in history]
        for part, key, colour in zip(
            axes, ("learning_rate", "grad_norm"), (ACCENT, INK), strict=True
        ):
            part.plot(steps, [row[key] for row in history], color=colour, lw=1.4)
            part.set_ylim(bottom=0)
            part.grid(axis="y")
            part.set_title(words(key), loc="left", color=FAINT, fontsize=9)
            part.yaxis.set_major_locator(MaxNLocator(3))
            part.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes[1].set_xlabel(words("step"))
        axes[1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        figure.subplots_adjust(hspace=0.35)
    return figure


def shares(rows: Sequence[Row], words: Words, percent: str) -> Figure:
    """Draw a share with its interval for every part of the test split: base, copied answers, tuned.

    Rows: {label, base: (share, low, high), nearest: likewise if answers were copied, tuned: likewise}.
    """
    models = [model for model in MARKERS if model in rows[0]]
    with drawing():
        figure, axes = _axes(WIDTH - LABELS, 0.55 + 0.24 * (len(models) * len(rows)))
        for number, model in enumerate(models):
            shift = 0.2 - 0.4 * number / (len(models) - 1)
            y = [len(rows) - i + shift for i in range(len(rows))]
            values = [row[model][0] for row in rows]
            below = [row[model][0] - row[model][1] for row in rows]
            above = [row[model][2] - row[model][0] for row in rows]
            axes.errorbar(
                values, y, xerr=[below, above], fmt=MARKERS[model], ms=6.5, color=COLOURS[model],
                elinewidth=1.6, capsize=3, label=words(model),
            )  # fmt: skip
        axes.set_yticks([len(rows) - i for i in range(len(rows))], [row["label"] for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=10)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(0.4, len(rows) + 0.6)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=percent))
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(models))
    return figure


def calibration(curves: Mapping[str, Sequence[Row]], words: Words, percent: str) -> Figure:
    """Draw the accuracy over the mean confidence of each bin; perfect calibration is the diagonal.

    Rows: {confidence, accuracy, ...}, for base and tuned.
    """
    with drawing():
        figure, axes = _axes(WIDTH - LABELS, WIDTH - LABELS)
        axes.plot([0, 1], [0, 1], color=FAINT, lw=1, ls="--", label=words("calibrated"))
        for model, rows in curves.items():
            axes.plot(
                [row["confidence"] for row in rows], [row["accuracy"] for row in rows],
                marker=MARKERS[model], ms=5, color=COLOURS[model], lw=1.4, label=words(model),
            )  # fmt: skip
        for axis, key in ((axes.xaxis, "confidence"), (axes.yaxis, "accuracy")):
            axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=percent))
            axis.set_label_text(words(key))
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(axis="both")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def layer_errors(rows: Sequence[Row], words: Words, number: Number) -> Figure:
    """Draw the relative error of every quantized layer: one line of points for each kind of layer."""
    parts: dict[str, list[float]] = {}
    for row in rows:
        parts.setdefault(_kind_of_layer(row["layer"]), []).append(row["relative_error"])
    with drawing():
        figure, axes = _axes(WIDTH - LABELS, 0.7 + 0.3 * len(parts))
        for y, errors in enumerate(reversed(parts.values())):
            axes.plot(errors, [y] * len(errors), "o", ms=7, color=ACCENT, alpha=0.65, mew=0)
        axes.set_yticks(range(len(parts)), list(reversed(parts)))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.margins(y=0.12)
        axes.set_xlim(0, 1.06 * max(row["relative_error"] for row in rows))
        axes.grid(axis="both")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.set_xlabel(words("relative_error"))
    return figure


def levels(found: Mapping[str, Any], words: Words, percent: str) -> Figure:
    """Draw one layer's weights, divided by the largest of their block: before, and at the 4-bit levels.

    Args:
        found: the result of `capas.report.levels.four_bit_levels`.
    """
    with drawing():
        figure = Figure(figsize=(WIDTH, 3.0))
        above, below = figure.subplots(2, 1, sharex=True)
        edges = found["edges"]
        above.stairs(found["before"], edges, fill=True, color=BASE)
        below.vlines(found["levels"], 0, found["after"], color=TUNED, lw=2)
        below.plot(found["levels"], found["after"], MARKERS["tuned"], ms=5, color=TUNED)
        for axes, key in ((above, "weights_before"), (below, "weights_after")):
            axes.set_title(words(key), loc="left", color=FAINT, fontsize=9)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=percent))
        below.set_xlabel(words("relative_weight"))
        figure.subplots_adjust(hspace=0.35)
    return figure


def answer_loss(rows: Sequence[Row], words: Words, number: Number) -> Figure:
    """Draw the loss of each token of one answer, base beside tuned.

    Rows: {token, base, tuned}, the losses in nats.
    """
    shown = rows[:MAX_TOKENS]
    with drawing():
        figure, axes = _axes(WIDTH, 2.8)
        places = range(len(shown))
        for model, shift in (("base", -0.2), ("tuned", 0.2)):
            heights = [row[model] for row in shown]
            axes.bar(
                [x + shift for x in places], heights, 0.4, color=COLOURS[model], label=words(model)
            )
        axes.set_xticks(places, [visible(row["token"]) for row in shown], rotation=90)
        axes.tick_params(axis="x", length=0, labelcolor=INK, labelsize=7)
        axes.set_xlim(-0.8, len(shown) - 0.2)
        axes.set_ylabel(words("loss"))
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    return figure


def lengths(rows: Sequence[Row], words: Words, number: Number) -> Figure:
    """Draw how many records have how many tokens, one small histogram for every split."""
    splits = {split: list(group) for split, group in groupby(rows, key=lambda row: row["split"])}
    edges = sorted({row["num_tokens"] for row in rows})
    width = min((b - a for a, b in pairwise(edges)), default=1)
    with drawing():
        figure = Figure(figsize=(WIDTH, 1.6))
        for axes, (split, bins) in zip(
            figure.subplots(1, len(splits), sharex=True, squeeze=False)[0],
            splits.items(),
            strict=True,
        ):
            counts = [row["num_records"] for row in bins]
            axes.bar(
                [r["num_tokens"] for r in bins], counts, width=width, align="edge", color=ACCENT
            )
            axes.set_title(words(split), loc="left", color=FAINT, fontsize=9)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            _label(axes, words("tokens"), "", number, num_ticks=3)
        figure.subplots_adjust(wspace=0.45)
    return figure


def next_token(rows: Sequence[Row], words: Words, percent: str) -> Figure:
    """Draw the probabilities of the next token: a column for each setting, a row for each model."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = list(batched(settings, NUM_COLUMNS))
    with drawing():
        figure = Figure(figsize=(WIDTH, 1.9 * len(models) * len(lines)))
        grid = figure.subplots(len(models) * len(lines), NUM_COLUMNS, sharex=True, squeeze=False)
        for number, (chunk, model) in enumerate(itertools.product(lines, models)):
            for i, axes in enumerate(grid[number]):
                if i >= len(chunk):
                    axes.axis("off")
                    continue
                chosen = [r for r in rows if r["setting"] == chunk[i] and r["model"] == model]
                _probabilities(axes, chosen, COLOURS[model], percent, labelled=i == 0)
                if model == models[0]:
                    title = words(chunk[i]) if chunk[i] == UNCHANGED else chunk[i]
                    axes.set_title(title, loc="left", fontsize=9)
            grid[number][0].set_ylabel(words(model), color=INK)
        figure.subplots_adjust(wspace=0.12, hspace=0.35)
    return figure


def batched(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield `items` in groups of `size`, the last one possibly smaller (itertools.batched, Python 3.12)."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _probabilities(axes: Any, rows: list[Row], colour: str, percent: str, labelled: bool) -> None:
    y = range(len(rows), 0, -1)
    axes.barh(y, [row["probability"] for row in rows], color=colour, height=0.7)
    axes.set_yticks(y, [visible(row["token"]) for row in rows] if labelled else [""] * len(rows))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["", f"50{percent}", ""])
    axes.grid(axis="x")


def visible(token: str) -> str:
    """Return a token with visible spaces and line breaks."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "∅"


def _kind_of_layer(name: str) -> str:
    """Return the kind of a layer, 'mlp.up_proj' for 'model.layers.3.mlp.up_proj'.

    A model of any depth then fits in one plot.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _label(axes: Any, x: str, y: str, number: Number, num_ticks: int = 6) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, integer=True))
