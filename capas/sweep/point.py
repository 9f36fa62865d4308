"""Run one trial: a DVC experiment in its own workspace. Hydra's launchers call `point`."""

import json
import math
import os
import re
import shutil
import sys
import traceback
from contextlib import AbstractContextManager, ExitStack, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf

from capas.config.composition import word_given
from capas.config.validation import validate
from capas.core.cores import usable_cores
from capas.core.dag import recorded_key
from capas.core.errors import CapasError
from capas.core.locks import BusyError, exclusive
from capas.core.process import follow
from capas.core.stage import CHECKPOINTS
from capas.core.workers import end_with
from capas.core.worktree import git
from capas.sweep import costs, libraries
from capas.sweep.names import name_of
from capas.sweep.objective import AUTO, TEST_FILE, stated_columns
from capas.sweep.plan import AT_ONCE, DRIVER, Plan, digest
from capas.sweep.rungs import Ladder, Rung, fractions, is_among_best, metric_of
from capas.sweep.shared import SharedStages
from capas.sweep.slots import place
from capas.sweep.state import CACHED, DONE, DROPPED, FAILED, PAUSED, RUNNING, WAITING, State
from capas.sweep.task import check_place, is_of_sweep, is_slurm, values_of
from capas.sweep.workspace import lay_out, set_aside
from capas.tracking.store import HOME
from capas.training.pause import VARIABLE
from capas.workspace.clone import environment

_STAGE = re.compile(r"^(?:Running stage|Stage) '(?P<name>\w+)'")
_METRICS = "reports/metrics/{}.json"
_NUM_LAST = 6  # last lines of a traceback that are shown


class PointFailed(HydraException):
    """A failed trial with its message; the other trials continue."""


def point(config: Any) -> float:
    """Run a trial and return the objective's value; everything else about it is in its state file.

    Raises:
        PointFailed: the pipeline failed, or the values are invalid.
    """
    plan = Plan.current()
    if os.getppid() == (driver := int(os.environ[DRIVER])):
        end_with(driver)  # this process is its worker, and the trial ends with it
    settings = OmegaConf.to_container(config.sweep, resolve=True)
    launcher = OmegaConf.to_container(HydraConfig.get().launcher, resolve=False)
    if (number := settings.get("trial")) is not None:
        overrides, values = plan.trial(number)
    else:
        overrides = [word for word in HydraConfig.get().overrides.task if not is_of_sweep(word)]
        values = values_of(config)
    this = Point(plan, overrides, values, settings, launcher)
    try:
        return this.result()
    except CapasError as error:
        this.say(status=FAILED, reason=str(error), line="")
        raise PointFailed(f"{this.name}: {error}") from None
    except Exception as error:  # for example a full disk or a missing permission
        last = traceback.format_exc().splitlines()[-_NUM_LAST:]
        this.say(status=FAILED, reason="\n".join(last), line="")
        raise PointFailed(f"{this.name}: {error}") from error


def num_workers(launcher: dict[str, Any]) -> int:
    """Return how many trials run at once on a machine, as far as the launcher's settings tell."""
    given = launcher.get("n_jobs")
    if given is None:
        return usable_cores() if "submitit" in launcher["_target_"] else 1
    return usable_cores() if given < 1 else int(given)


class Point:
    """A trial of a sweep.

    Args:
        values: the values of params.yaml.
        settings: the group `sweep`, and `rung`, the part of the steps at which this job pauses.
        launcher: the settings of Hydra's launcher.
    """

    def __init__(
        self,
        plan: Plan,
        overrides: list[str],
        values: dict[str, Any],
        settings: dict[str, Any],
        launcher: dict[str, Any],
    ) -> None:
        self.plan, self.overrides, self.values = plan, overrides, values
        self.settings, self.launcher = settings, launcher
        self.identity = digest(values, plan.inputs)
        self.name = name_of(overrides, self.identity, plan.swept)
        self.log = plan.folder / "logs" / f"{self.name}.log"
        self.work = plan.work(self.name)
        self._ladder = Ladder.of(plan.folder, self.identity)
        self._state = State(self.identity, self.name, overrides, train_key=self._ladder.train_key)
        self._state.started -= self._ladder.seconds

    def say(self, **changes: Any) -> None:
        self._state.write(self.plan.points, **changes)

    def result(self) -> float:
        """Run the trial, unless it is already an experiment, and return the objective's value.

        Raises:
            CapasError: it failed, now or before the sweep was started again because of a lost worker.
        """
        state = self.plan.points / f"{self.identity}.json"
        if state.exists() and (before := State.read(state)).status == FAILED:
            raise CapasError(before.reason)
        self.say(status=WAITING)
        validate(self.values, word_given(self.overrides))
        file = self.plan.lock(f"point-{self.identity}")
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(exclusive(file, seconds=0))
            except BusyError:
                self.say(stage="another sweep that runs this trial")
                lock = stack.enter_context(exclusive(file))
            return self._result(lock.fileno())

    def _result(self, lock: int) -> float:
        found = self._experiment()
        status = CACHED if found else DONE
        if not found:
            if (score := self._climb(lock)) is not None:
                return score
            found = self._experiment()
        if not found:
            raise CapasError(f"DVC recorded no experiment {self.name}; see its log: {self.log}")
        value = self._read(found)
        if status == DONE and not self.settings["keep"]:
            shutil.rmtree(self.work, ignore_errors=True)
        self.say(name=found, status=status, stage="", line="")
        return value

    def _climb(self, lock: int) -> float | None:
        """Train from rung to rung; return the score at which the trial rests, None if it has ended."""
        given = self.settings.get("rung")
        grid = "trial" in self.settings
        rungs = [Fraction(given)] if given else [] if grid else fractions(self.settings)
        for fraction in rungs:
            if not self._reach(fraction, lock):
                return None  # the training ended before it
            if grid or not self._goes_on(fraction):
                return self._rest(fraction, PAUSED if grid else DROPPED)
        self._run(lock)
        return None

    def _reach(self, fraction: Fraction, lock: int) -> bool:
        """Train until a rung, and record it; return False if the training ended before it.

        Raises:
            CapasError: the pipeline failed.
        """
        if str(fraction) in self._ladder.rungs:
            return True
        try:
            self._run(lock, **{VARIABLE: str(fraction)})
        except CapasError:
            if (rung := Rung.read(self.work / CHECKPOINTS, fraction)) is None:
                raise
        else:
            return False
        self._ladder.rungs[str(fraction)] = rung
        self.say(status=WAITING)
        self._ladder.seconds, self._ladder.train_key = self._state.seconds, self._state.train_key
        self._ladder.write()
        if not self.settings["keep"]:
            set_aside(self.plan, self.work)  # the workspaces of many trials would fill the disk
        return True

    def _goes_on(self, fraction: Fraction) -> bool:
        """Return whether a trial of a search goes on; a decision holds when it is started again."""
        ladder, name = self._ladder, str(fraction)
        decided = ladder.dropped_at is not None or ladder.last != ladder.rungs[name]
        if not decided and not is_among_best(self.plan.folder, ladder, fraction, self.settings):
            ladder.dropped_at = name
            ladder.write()
        return ladder.dropped_at != name

    def _rest(self, fraction: Fraction, status: str) -> float:
        """Record that the trial pauses or was dropped; return its score there."""
        rung, metric = self._ladder.rungs[str(fraction)], metric_of(self.settings)
        score = rung.scores[metric.partition(".")[2]]
        steps = {"step": rung.step, "num_steps": rung.num_steps}
        self.say(status=status, stage="", line="", metrics={metric: score}, **steps)
        return score

    def _experiment(self) -> str | None:
        """Return the name of this trial's experiment at this commit, or None if there is none."""
        pattern = self.plan.reference(f"*-{self.identity}")
        found = git(self.plan.home, "for-each-ref", "--format=%(refname)", pattern).split()
        return found[0].rpartition("/")[2] if found else None

    def _read(self, experiment: str) -> float:
        """Read the trial's metrics from git alone, and return the objective's value."""
        reference, columns = self.plan.reference(experiment), stated_columns(self.settings)
        shown = headline(self.plan.home, reference) if AUTO in self.settings["columns"] else ""
        names = dict.fromkeys(filter(None, [self.settings["objective"], *columns, shown]))
        metrics = {name: metric(self.plan.home, reference, name) for name in names}
        train_key = recorded_key(self.plan.recorded(experiment)["train"])
        seconds = costs.recall(self.plan, train_key)
        self.say(metrics=metrics, headline=shown, train_key=train_key, train_seconds=seconds)
        value = metrics[self.settings["objective"]]
        if value is None or not math.isfinite(value):
            raise CapasError(
                f"sweep.objective={self.settings['objective']} is {value} for this trial. Choose "
                "another objective, or add the metric to evaluation.metrics"
            )
        return value

    def _run(self, lock: int, **more: str) -> None:
        """Run the experiment.

        Args:
            more: environment variables for it.
        """
        self.say(stage="a free slot")
        with self._place() as variables:
            variables = {**variables, **more}
            lay_out(self.plan, self.work, self.values)
            stages = SharedStages(self.plan, self.values, self.work)
            with stages.held(
                lambda stage: self.say(stage=f"{stage}, which another trial is running")
            ):
                self._run_experiment(stages, variables, lock)

    def _place(self) -> AbstractContextManager[dict[str, str]]:
        """Reserve GPUs and cores; Slurm already gives them to its job, so nothing is reserved there.

        Raises:
            CapasError: the trial trains in more processes than it has GPUs, or on several machines.
        """
        hardware = self.values["hardware"]
        check_place(hardware, self.launcher)
        if is_slurm(self.launcher):
            return nullcontext({})
        workers = min(num_workers(self.launcher), int(os.environ[AT_ONCE]))
        return place(self.plan.lock, hardware["device"], workers, hardware["num_processes"])

    def _run_experiment(self, stages: SharedStages, variables: dict[str, str], lock: int) -> None:
        sets = [word for override in self.overrides for word in ("-S", override)]
        command = [sys.executable, "-m", "dvc", "exp", "run", "-n", self.name, *sets]
        env = {**environment(self.work, **{HOME: str(self.plan.home)}), **variables}
        if self.settings["share_imports"]:
            first = libraries.shared.share(self.plan, self.values, variables)
            env["PATH"] = os.pathsep.join([*first, env["PATH"]])
        stage = ""
        for line in follow(command, self.work, env, self.log, self._watch_training, [lock]):
            if match := _STAGE.match(line):
                stages.finished(stage)
                stage = match["name"]
                self.say(status=RUNNING, stage=stage, line="")
            elif line:
                self.say(line=line[:200])
        stages.finished(stage)
        costs.remember(self.plan, self.work)
        reference = self.plan.reference(self.name)
        quiet = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance")
        git(self.plan.home, "fetch", *quiet, str(self.work), f"+{reference}:{reference}")

    def _watch_training(self) -> None:
        """Record the training's key as soon as it has one: its MLflow run can then be found."""
        if not self._state.train_key:
            live = next(iter((self.work / ".dvc/tmp/live").glob("*.jsonl")), None)
            if live is not None:
                self.say(train_key=live.stem)


def metric(home: Path, reference: str, name: str) -> float | None:
    """Return the metric FILE.KEY: the key KEY of reports/metrics/FILE.json in a commit.

    Raises:
        CapasError: there is no such file or key; the message lists those that exist.
    """
    file, _, key = name.partition(".")
    values, path = _metrics(home, reference, file), _METRICS.format(file)
    if values is None:
        there = git(home, "ls-tree", "--name-only", reference, "reports/metrics/").split()
        raise CapasError(
            f"sweep: {name!r} is not a metric: there is no {path}; available: {', '.join(there)}"
        )
    if key not in values:
        raise CapasError(f"sweep: {name!r} is not a metric: {path} has {', '.join(values)}")
    return None if values[key] is None else float(values[key])


def headline(home: Path, reference: str) -> str:
    """Return the headline metric of an evaluation, tuned.KEY: the one whose gain it reports, or the loss.

    It is "" if the evaluation has no numbers.
    """
    values = _metrics(home, reference, TEST_FILE) or {}
    keys = [key for key in values if f"{key}_gain" in values] or ["loss"]
    return f"{TEST_FILE}.{keys[0]}" if keys[0] in values else ""


def _metrics(home: Path, reference: str, file: str) -> dict[str, Any] | None:
    """Return reports/metrics/FILE.json of a commit, or None if it has none."""
    text = git(home, "show", f"{reference}:{_METRICS.format(file)}", check=False)
    return dict(json.loads(text)) if text else None
