"""Show a sweep to the user: a live table in a terminal, lines elsewhere, and the ranking at the end."""

import math
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from capas.sweep.names import distinct, name_of, short_keys
from capas.sweep.ranking import Row, columns, num_looked_at
from capas.sweep.rungs import metric_of
from capas.sweep.state import (
    AT_REST,
    CACHED,
    DONE,
    DROPPED,
    ENDED,
    FAILED,
    PAUSED,
    RUNNING,
    WAITING,
    State,
    read_states,
)
from capas.sweep.verdict import verdict
from capas.sweep.wording import say

_SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_SIGNS = 60.0  # at most, without a terminal, until a line says what runs
_MAX_SHOWN = 4  # running trials in a sign of life
_ORDER = (FAILED, RUNNING, WAITING, PAUSED, DONE, CACHED, DROPPED)
_STYLE = {
    FAILED: "red",
    RUNNING: "cyan",
    WAITING: "dim",
    PAUSED: "dim",
    DONE: "green",
    CACHED: "green",
}
_LINES_BESIDE_ROWS, _WIDE = 6, 160


class Screen:
    """A display of the states in `folder`; it reports the end of each trial once.

    Args:
        settings: the group `sweep`.
        expected: number of trials.
        swept: the keys that the sweep varies, by which trials are shown.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        expected: int,
        swept: Collection[str] = (),
    ) -> None:
        width = None if sys.stderr.isatty() else _WIDE
        self.console = Console(file=sys.stderr, highlight=False, width=width)
        self._folder, self._settings, self._expected = folder, settings, expected
        self._swept, self._last_line = swept, time.monotonic()
        self._reported, self._started = dict[str, tuple[str, int]](), set[str]()
        self._stop, self._telling = threading.Event(), threading.Lock()

    @contextmanager
    def shown(self) -> Iterator[None]:
        thread = threading.Thread(target=self._show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def report(self) -> None:
        """Print what has happened since the last look."""
        self._tell(read_states(self._folder))

    def _show(self) -> None:
        if not self.console.is_terminal:
            while not self._stop.wait(_SECONDS_BETWEEN_LOOKS):
                states = read_states(self._folder)
                self._tell(states)
                self._give_sign_of_life(states)
            self._tell(read_states(self._folder))
            return
        with Live(
            console=self.console,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live:
            stopped = False
            while not stopped:
                stopped = self._stop.wait(_SECONDS_BETWEEN_LOOKS)
                states = read_states(self._folder)
                self._tell(states)
                live.update(self._table(states))

    def _tell(self, states: list[State]) -> None:
        with self._telling:
            for state in states:
                known, now = self._reported.get(state.identity), (state.status, state.step)
                if known != now:
                    self._reported[state.identity] = now
                    if now != (DROPPED, known and known[1]):  # the pause was reported
                        self._tell_change(state)

    def _tell_change(self, state: State) -> None:
        if state.status in (RUNNING, DONE, FAILED, PAUSED):
            self._tell_start(state)
        if state.status == FAILED:
            self._print(f"failed  {self._name(state)}", "bold red")
            self._print(_indented(state.reason))
        elif state.status in AT_REST:
            value = number(state.metrics.get(self._metric(state)))
            ended = sum(status in ENDED for status, _ in self._reported.values())
            count = state.status if state.status == PAUSED else f"{ended}/{self._expected}"
            style = "dim" if state.status == PAUSED else "green"
            self._print(f"{count}  {self._name(state)}  {value}  ({self._how(state)})", style)

    def _metric(self, state: State) -> str:
        """Return the metric that is shown: a trial that has not ended has only that of its rung."""
        at_a_rung = state.status in (PAUSED, DROPPED)
        return metric_of(self._settings) if at_a_rung else str(self._settings["objective"])

    def _tell_start(self, state: State) -> None:
        """Print that a trial has started, unless a terminal's table shows it.

        A trial that ended between two looks counts as started too.
        """
        if not self.console.is_terminal and state.identity not in self._started:
            self._started.add(state.identity)
            count = f"{len(self._started)}/{self._expected}"
            self._print(f"started {self._name(state)}  ({count})")

    def _give_sign_of_life(self, states: list[State]) -> None:
        """Print what runs, if nothing was printed for a while."""
        if time.monotonic() - self._last_line < SECONDS_BETWEEN_SIGNS:
            return
        going = [state for state in states if state.status == RUNNING]
        doing = [f"{self._name(state)} ({state.stage})" for state in going[:_MAX_SHOWN]]
        doing += [f"{len(going) - _MAX_SHOWN} more"] if len(going) > _MAX_SHOWN else []
        ended = sum(state.status in ENDED for state in states)
        waiting = sum(state.status == WAITING for state in states)
        counts = f"{ended} of {self._expected} ended, {len(going)} running, {waiting} waiting"
        self._print(": ".join(filter(None, [counts, ", ".join(doing)])))

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text), style=style, soft_wrap=True)
        self._last_line = time.monotonic()

    def _name(self, state: State) -> str:
        """Return the trial's name in this sweep; an earlier sweep may have recorded it under another name."""
        return name_of(state.overrides, state.identity, self._swept)

    def _how(self, state: State) -> str:
        """Return how a trial ended: how long it took, or the experiment in which it was found."""
        if state.status in (PAUSED, DROPPED):
            dropped = "dropped at " if state.status == DROPPED else ""
            return f"{dropped}{state.rung}, {state.seconds:.0f} s"
        if state.status != CACHED:
            return f"{state.seconds:.0f} s"
        return "had it" if state.name == self._name(state) else f"had it as {state.name}"

    def _table(self, states: list[State]) -> Table:
        counts = Counter(state.status for state in states)
        ended = sum(counts[status] for status in ENDED)
        summary = ", ".join(f"{counts[status]} {status}" for status in _ORDER if counts[status])
        summary = summary or "starting"
        table = Table(
            title=f"{ended} of {self._expected} trials ended: {summary}",
            title_justify="left",
            box=None,
            expand=True,  # the columns do not move when their texts change
        )
        objective = self._settings["objective"]
        table.add_column("", min_width=max(map(len, _ORDER)))
        table.add_column("trial", overflow="ellipsis", no_wrap=True, ratio=2)
        table.add_column("does", overflow="ellipsis", no_wrap=True, ratio=3)
        table.add_column(objective, min_width=len(objective))
        room = max(4, self.console.height - _LINES_BESIDE_ROWS)
        for state in sorted(states, key=lambda s: _ORDER.index(s.status))[:room]:
            metric = self._metric(state)
            value = number(state.metrics.get(metric)) if state.status in AT_REST else ""
            doing = " ".join(filter(None, [state.stage, state.line]))
            style = _STYLE[state.status]
            words = " ".join(distinct(state.overrides, self._swept)) or state.name
            cells = (Text(state.status, style=style), Text(words), Text(doing, style="dim"), value)
            table.add_row(*cells)
        return table


def stdout() -> Console:
    """Return a console for standard output; written to a file, its lines are not cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)


def print_ranking(
    rows: Sequence[Row],
    settings: dict[str, Any],
    console: Console,
    lesson: Sequence[str],
    swept: Collection[str] = (),
    dropped: Sequence[Row] = (),
) -> None:
    """Print a row for each combination of values, best first, and how to adopt the winner.

    Args:
        dropped: settings that have not trained to the end.
    """
    table = Table(box=None, title_justify="left")
    shown_beside = columns(rows, settings)
    headings = short_keys(key for key in swept if key not in settings["replicates"])
    single = all(len(row.states) == 1 for row in rows)
    table.add_column("", justify="right")
    table.add_column(settings["objective"], justify="right")
    if not single:
        table.add_column("n", justify="right")
    for name in shown_beside:
        table.add_column(name, justify="right")
    for heading in headings.values():
        table.add_column(Text(heading), justify="right", overflow="fold")
    table.add_column("experiment", overflow="fold")
    for row in [*rows, *dropped]:
        shown = number(row.mean)
        if row.margin is not None:
            shown += f" ± {number(row.margin)}"
        if row.rung:
            step, num_steps = row.rung
            code = settings["language"]
            shown = say(code, "remarks.at_rung", score=shown, step=step, num_steps=num_steps)
        mark = "=" if row.tied or (row is rows[0] and any(other.tied for other in rows)) else ""
        cells = [f"{mark}{row.rank or '–'}", shown]
        cells += [] if single else [str(len(row.states))]
        cells += [number(row.column(name)) for name in shown_beside]
        table.add_row(*cells, *(Text(row.value(key)) for key in headings), Text(row.name))
    console.print(table)
    for words in filter(None, [verdict(rows, settings, settings["language"]), *lesson]):
        console.print(Text(words))
    console.print(Text(f"\n{_adoption(rows, settings['language'])}"))


def _adoption(rows: Sequence[Row], code: str) -> str:
    """Return the command that adopts the first row, or that there is nothing to adopt."""
    command, purpose = adoption(rows, code)
    return f"{command}   # {purpose}" if command else purpose


def adoption(rows: Sequence[Row], code: str) -> tuple[str, str]:
    """Return the command that adopts the first row and its purpose; "" if there is nothing to adopt."""
    if rows[0].is_default and num_looked_at(rows) > 1:
        return "", say(code, "adoption.nothing")
    purpose = "first" if any(row.tied for row in rows) else "winner"
    return f"dvc exp apply {shlex.quote(rows[0].name)}", say(code, f"adoption.{purpose}")


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
