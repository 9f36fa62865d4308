"""Run a sweep, from its command to its ranking."""

import contextlib
import io
import logging
import math
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from capas.config.composition import CONF
from capas.config.hydra_overrides import Point
from capas.config.problems import refused
from capas.config.requirements import lacking, read_by
from capas.config.searchpath import register
from capas.core.errors import CapasError
from capas.core.locks import BusyError, exclusive, is_held
from capas.core.worktree import git
from capas.sweep import costs, crossing, page, parent
from capas.sweep.crosstable import CSV, TEXT, CrossTable
from capas.sweep.display import Screen, print_ranking, stdout
from capas.sweep.halving import Halving
from capas.sweep.lesson import histories, lesson
from capas.sweep.outlook import cached, earlier, in_words, seconds_of_all
from capas.sweep.plan import AT_ONCE, DRIVER, FOLDER, VARIABLE, Plan, check_home
from capas.sweep.point import num_workers
from capas.sweep.ranking import Row, dropped_rows, rank, split
from capas.sweep.records import read_scores
from capas.sweep.remarks import halved, remarks
from capas.sweep.rungs import share_of_steps
from capas.sweep.state import AT_REST, FAILED, STOPPED, State, read_states
from capas.sweep.task import NAME, Task, defaults, prepare, runs_here
from capas.sweep.verdict import verdict
from capas.sweep.wording import LANGUAGES
from capas.workspace.clone import cache_of

log = logging.getLogger("capas")
_STARTS = 3
_LOST = (
    "its process was killed, possibly out of memory. To run fewer at once: hydra.launcher.n_jobs=1"
)


def run(home: Path, words: list[str], multirun: bool) -> int:
    """Run a sweep and return the exit code: 0, or 1 if a trial failed.

    Raises:
        CapasError: the command is wrong, in which case nothing was written, or the same sweep is running.
    """
    check_home(home)
    task = prepare(home, words, multirun)
    what = [word for word in words if not word.startswith(("hydra.launcher", "hydra/launcher"))]
    plan = Plan.make(home, what, task.swept)
    try:
        with exclusive(plan.lock(f"sweep-{plan.key}"), seconds=0) as lock:
            lock.write(str(os.getpid()))
            lock.flush()
            return _run(plan, task, multirun)
    except BusyError as busy:
        raise CapasError(
            f"this sweep is already running (pid {busy.text}). Wait for it or stop it"
        ) from None


def _run(plan: Plan, task: Task, multirun: bool) -> int:
    before = earlier(plan.home)
    done = [] if task.searches else cached(plan, task.points)
    left = [point for point in task.points if point not in done]
    _check_machine(plan.home, task, left)
    for warning in task.warnings:
        log.warning("%s", warning)
    log.info("%s", _outlook(plan, task, left, before))
    plan.write()
    for file in (plan.points).iterdir():
        file.unlink()  # states of the last start; finished trials are kept as experiments
    settings = task.settings
    screen = Screen(plan.points, settings, task.expected, plan.swept)
    with parent.tracked(plan, task.tracking):
        with screen.shown():
            stderr = _launch_all(plan, task, screen, multirun)
        states = read_states(plan.points)
        result, refusal = _result(states, plan, task)
        parent.finish(plan, _for_mlflow(result, refusal, plan, task.tracking["enabled"]))
    if stderr and not result.failed:
        screen.console.print(stderr, markup=False)
    _show_result(result, plan, screen)
    if result.failed:
        screen.console.print(
            f"\n{len(result.failed)} of {len(states)} trials failed, see above and {plan.folder / 'logs'}. "
            "The same command runs only these again.",
            markup=False,
        )
    if refusal:
        screen.console.print(f"\nsweep: {refusal}", markup=False)
    return 1 if result.failed or refusal or not result.rows else 0


def _result(states: list[State], plan: Plan, task: Task) -> tuple[page.Result, str]:
    """Return what the trials show, and the reason if a table over chat templates could not be made."""
    failed = [state for state in states if state.status == FAILED]
    records = read_scores(plan, states, task.settings["objective"])
    rows = rank(states, task.settings, defaults(task), records)
    crossed, refusal = _cross(rows, plan, task.settings) if not failed else (None, "")
    result = page.Result(
        rows=rows,
        settings=task.settings,
        swept=task.swept,
        words=plan.words,
        dropped=dropped_rows(states, task.settings),
        failed=failed,
        searches=task.searches,
        known_costs=costs.of_trials(rows, plan),
        lessons=lesson(rows, task.settings, plan),
        curves=histories(rows, plan),
        crossed=crossed,
    )
    return result, refusal


def _for_mlflow(result: page.Result, refusal: str, plan: Plan, is_tracked: bool) -> dict[str, Any]:
    """Return the result for the run in MLflow, with the names of its pages in the sweep's folder."""
    notes = halved(result.rows, result.dropped)
    notes += remarks(result.rows, result.settings, result.swept)
    failed, rows = bool(result.failed or refusal), list(result.rows)
    found = summary(rows, result.settings, failed, result.lessons, result.crossed, notes)
    if rows and is_tracked:
        found["pages"] = page.write(plan.folder, page.render(result))
    return found


def _show_result(result: page.Result, plan: Plan, screen: Screen) -> None:
    """Print the ranking and what it shows, write the page into reports/, and say where all of it is."""
    settings, rows, address = result.settings, result.rows, parent.address(plan)
    code = settings["language"]
    if rows:
        words = [*result.lessons[code], *halved(rows, result.dropped, code)]
        words += remarks(rows, settings, result.swept, code)
        print_ranking(rows, settings, stdout(), words, plan.swept, result.dropped)
    if result.crossed:
        text = f"\n{result.crossed.text(code)}\n({TEXT}, {CSV})"
        stdout().print(text, markup=False, soft_wrap=True)
    if address:
        screen.console.print(f"the trials in MLflow: {address}", markup=False, soft_wrap=True)
    if rows:
        page.write(plan.home / "reports", page.render(replace(result, address=address or "")))
        screen.console.print(f"the page of this sweep: {page.PAGES[code]}", markup=False)


def _cross(rows: list[Row], plan: Plan, settings: dict[str, Any]) -> tuple[CrossTable | None, str]:
    """Return the table of models asked in each other's format, or the reason why it could not be computed."""
    if not settings[crossing.SETTING] or not rows:
        return None, ""
    try:
        crossed = crossing.cross(rows, plan)
    except CapasError as error:
        return None, str(error)
    crossed.write(plan.home)
    return crossed, ""


def _check_machine(home: Path, task: Task, points: list[Point]) -> None:
    """Check that this machine has what the trials need; if a cluster runs them, only warn.

    Raises:
        CapasError: the trials run here, and this machine lacks something.
    """
    reads = read_by(home)
    missing = list(dict.fromkeys(p for point in points for p in lacking(point.values, reads)))
    if missing and runs_here(task.launcher):
        raise refused(missing, "no trial was run")
    for problem in missing:
        log.warning("this machine lacks it, but the launcher's machine may have it: %s", problem)


def _outlook(plan: Plan, task: Task, left: list[Point], before: list[State]) -> str:
    """Return one line on what the sweep is about to do."""
    at_once = min(num_workers(task.launcher), task.at_once)
    if not task.searches:
        found = seconds_of_all(plan, left, before, task.base, at_once)
        share, words = _share_of_steps(task), ""
        if share < 1:
            words = f"; successive halving, at most {share:.0%} of the steps of all"
            found = found and (share * found[0], found[1])
        return in_words(len(task.points), len(task.points) - len(left), found, at_once) + words
    one = seconds_of_all(plan, task.points, before, task.base, 1)
    whole = (one[0] * math.ceil(task.expected / at_once), one[1]) if one else None
    return f"a search: {in_words(task.expected, 0, whole, at_once)}"


def _share_of_steps(task: Task) -> float:
    """Return the most that the sweep trains, as a part of the steps of all its trials."""
    if not task.halves:
        return 1.0
    replicates = task.settings["replicates"]
    count = len({split(point.overrides, replicates)[0] for point in task.points})
    return float(share_of_steps(count, task.settings, bool(defaults(task))))


def summary(
    rows: list[Row],
    settings: dict[str, Any],
    failed: bool,
    lessons: Mapping[str, Sequence[str]],
    crossed: CrossTable | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the status, metrics and tags for the parent run in MLflow."""
    if not rows:
        return {"status": "FAILED"}
    objective = settings["objective"]
    lines = [f"| {row.rank} | {row.mean:.6g} | {row.name} |" for row in rows]
    table = "\n".join([f"| | {objective} | experiment |", "|---|---|---|", *lines])
    words = [verdict(rows, settings), *(" ".join(lesson) for lesson in lessons.values())]
    words += notes
    words += [crossed.markdown(code) for code in LANGUAGES] if crossed else []
    page_note = f"The page: artifact `{parent.PAGES}/{Path(page.PAGES['en']).name}`."
    return {
        "status": "FAILED" if failed else "FINISHED",
        "metrics": {f"best/{objective}": rows[0].mean},
        "tags": {
            "best.experiment": rows[0].name,
            "sweep.objective": objective,
            "sweep.direction": settings["direction"],
            "mlflow.note.content": "\n\n".join([page_note, table, *filter(None, words)]),
        },
    }


def _launch_all(plan: Plan, task: Task, screen: Screen, multirun: bool) -> str:
    """Run all trials, or those that successive halving chooses; return what Hydra wrote to standard error."""
    if task.halves:
        return Halving(plan, task, screen).run(lambda words: launch(plan, task, words, multirun))
    words = task.words if task.searches else [*task.words, "sweep.rungs=null"]  # a single trial
    return launch(plan, task, words, multirun)


def launch(plan: Plan, task: Task, words: list[str], multirun: bool) -> str:
    """Run the trials with Hydra and return what it wrote to standard error.

    If a worker is killed, joblib gives up and Hydra is started again; trials that have ended take no time.

    Raises:
        CapasError: it could not start, for example because an override is invalid.
    """
    os.environ |= {VARIABLE: str(plan.folder), DRIVER: str(os.getpid()), AT_ONCE: str(task.at_once)}
    # joblib's tracker of semaphores, a process, would warn of those of killed workers after the last word.
    warnings = (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, warnings))
    starts, known = Counter[str](), 0
    while True:
        stderr, code = _launch(plan, words, multirun)
        states = read_states(plan.points)
        lost = [state for state in states if state.status not in AT_REST]
        if not lost and (not code or len(states) in (task.expected, known)):
            break
        known = len(states)
        for state in lost:
            starts[state.identity] += 1
            if starts[state.identity] < _STARTS:
                log.warning("%s: its process was killed; starting it again", state.name)
                (plan.points / f"{state.identity}.json").unlink()
            else:
                reason = "\n".join([_LOST, *stderr.splitlines()[-1:]])
                state.write(plan.points, status=FAILED, stage="", line="", reason=reason)
    if code and not any(state.status == FAILED for state in states):
        raise CapasError(stderr)
    return stderr


def _launch(plan: Plan, words: list[str], multirun: bool) -> tuple[str, int]:
    import hydra

    from capas.sweep.point import point

    register()
    conf, stderr = str(plan.folder / CONF), io.StringIO()
    sys.argv = [sys.argv[0], *(["-m"] if multirun else []), *words]
    try:
        with contextlib.redirect_stderr(stderr):
            hydra.main(version_base="1.3", config_path=conf, config_name=NAME)(point)()
    except SystemExit as end:  # raised for the first failed trial, after the others
        return stderr.getvalue().strip(), int(end.code or 0)
    return stderr.getvalue().strip(), 0


def show(home: Path) -> None:
    """Print the sweeps, their trials and the disk space that they take."""
    console, table = stdout(), Table(box=None)
    for heading in ("sweep", "trials", "workspaces", "command"):
        table.add_column(heading, overflow="fold")
    plans = list(_plans(home))
    for plan in plans:
        states = read_states(plan.points)
        counts = Counter(_status_now(plan, state) for state in states)
        points = ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "none"
        size = sum(_own_bytes(plan.work(state.name)) for state in states)
        command = f"stages/sweep.py -m {shlex.join(plan.words)}"
        table.add_row(*map(Text, (plan.key, points, _size(size), command)))
    if plans:
        console.print(table)
    experiments = git(home, "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()
    sizes = {
        "sweeps (without hard links)": (home / FOLDER, _own_bytes(home / FOLDER)),
        "DVC's cache": (cache_of(home), _bytes(cache_of(home))),
    }
    console.print(f"DVC experiments: {len(experiments)} (dvc exp show)", markup=False)
    for name, (folder, size) in sizes.items():
        console.print(f"{name}: {_size(size)} in {folder}", markup=False)
    console.print(
        "To remove workspaces and logs: --clean. Experiments: dvc exp remove NAME. Unused cache: "
        "dvc gc --workspace --all-commits --all-experiments",
        markup=False,
    )


def _status_now(plan: Plan, state: State) -> str:
    """Return a trial's status, or `stopped` if no process of its sweep, or of its own, is left."""
    return state.status if state.status in AT_REST or _is_held(plan, [state]) else STOPPED


def _is_held(plan: Plan, states: Sequence[State]) -> bool:
    """Return whether the sweep or a trial is running: a cluster's jobs go on after the sweep has ended."""
    locks = [f"sweep-{plan.key}", *(f"point-{state.identity}" for state in states)]
    return any(is_held(plan.lock(name)) for name in locks)


def clean(home: Path) -> None:
    """Remove the workspaces, logs and copied inputs of sweeps that are not running."""
    freed, running = 0, 0
    for plan in list(_plans(home)):
        states = read_states(plan.points)
        if _is_held(plan, states):
            running += 1
            continue
        left = [plan.folder, *(plan.work(state.name) for state in states)]
        freed += sum(_remove(folder) for folder in left)
    if not running:
        for folder in (home / FOLDER).glob("*"):
            freed += _remove(folder)
    log.info("freed %s; the experiments are kept: dvc exp show", _size(freed))
    if running:
        log.info("%d sweeps are running; their files were kept", running)


def _plans(home: Path) -> Iterator[Plan]:
    for file in sorted((home / FOLDER / "plans").glob("*/plan.json")):
        try:
            yield Plan.read(file.parent)
        except (ValueError, KeyError, TypeError):  # another version of capas, or a full disk
            log.warning("%s cannot be read; --clean removes it", file)


def _remove(folder: Path) -> int:
    """Remove a folder and return how many bytes this frees."""
    size = _own_bytes(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return size


def _own_bytes(folder: Path) -> int:
    """Return the bytes on disk, without files that are hard links to a file elsewhere."""
    return sum(file.st_blocks * 512 for file in _files(folder) if file.st_nlink == 1)


def _bytes(folder: Path) -> int:
    return sum({file.st_ino: file.st_blocks * 512 for file in _files(folder)}.values())


def _files(folder: Path) -> Iterator[os.stat_result]:
    for place, _, names in os.walk(folder):
        yield from ((Path(place) / name).lstat() for name in names)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
