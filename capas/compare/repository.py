"""Find the results of a repository by name: the workspace, commits, DVC experiments, MLflow runs."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.compare.changes import texts_of
from capas.compare.outputs import Outputs
from capas.compare.sides import HEAD, METRICS, RUN, WORKSPACE, Kind, Side
from capas.compare.tracked import PUBLISHED, TABLE, Tracked, database, read_runs
from capas.config.composition import CONF
from capas.core import timings
from capas.core.dag import md5, parse_yaml, read_yaml, recorded, recorded_key
from capas.core.errors import CapasError, listed
from capas.core.files import read_json
from capas.core.worktree import git
from capas.evaluation.names import LABEL_SCORES
from capas.tracking import runs
from capas.tracking.client import reachable
from capas.tracking.pages import Pages
from capas.tracking.run_content import artifacts_digest
from capas.tracking.store import ARTIFACTS, EXPERIMENT, TRAIN_KEY, existing, tracking_uri
from capas.use.tuned_model import ran_with, say

_NUM_NAMES = 5
_LOW = ".low"


class Repository:
    """The results that can be named in the repository `root`.

    Args:
        downloads: an existing folder for the artifacts of runs on an MLflow server.
    """

    def __init__(self, root: Path, downloads: Path) -> None:
        self.root, self._downloads = root, downloads

    @cached_property
    def has_git(self) -> bool:
        return bool(git(self.root, "rev-parse", "--verify", "--quiet", "HEAD", check=False))

    @cached_property
    def head(self) -> str | None:
        return git(self.root, "rev-parse", "HEAD") if self.has_git else None

    @cached_property
    def experiments(self) -> list[runs.Experiment]:
        """The experiments of DVC, newest first."""
        return runs.experiments(self.root)

    @cached_property
    def tracked(self) -> list[Tracked]:
        """The runs in the local MLflow database.

        If it cannot be read, a warning is shown and the list is empty: git and DVC still allow a comparison.
        """
        try:
            return read_runs(self.root)
        except CapasError as error:
            say(f"capas: MLflow is left out: {error}")
            return []

    @cached_property
    def timings(self) -> dict[str, dict[str, Any]]:
        return timings.read(self.root)

    def workspace(self) -> Side:
        """Return the result in the workspace, without edited values that no stage has run with yet."""
        lock = recorded(self.root)
        file, made = self.root / METRICS, self.root / "dvc.lock"
        metrics = read_json(file) if file.exists() and "evaluate" in lock else {}
        params = self.root / "params.yaml"
        values = read_yaml(params) if params.exists() else {}
        base = self.root / "reports/metrics/base.json"
        side = self._side(
            WORKSPACE,
            "workspace",
            "the files here",
            values,
            lock,
            metrics,
            made.stat().st_mtime if made.exists() else 0.0,
            base=read_json(base).get("base", {}) if base.exists() else {},
        )
        return replace(side, pending=self._pending(values, lock))

    def _pending(self, values: Mapping[str, Any], lock: Mapping[str, Any]) -> str:
        """Return a note on configuration edits that are not in the result yet; empty if there are none."""
        now, ran = texts_of(values), texts_of(ran_with(values, lock))
        if changed := [key for key in now if now[key] != ran.get(key)]:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            return f"params.yaml has values that no stage has run with ({changed[0]}{more}): run `dvc repro`"
        read = {dep["path"]: dep["md5"] for dep in lock.get("compose", {}).get("deps", [])}
        conf = self.root / CONF
        if read.get(CONF.name) and conf.is_dir() and md5(conf) != read[CONF.name]:
            return "conf/ was edited after this result was made: run `dvc repro` to see what the edit changes"
        return ""

    def commit(self, name: str, revision: str, kind: Kind = "commit") -> Side:
        """Return the result that git has for a commit.

        Args:
            name: the name that the user gave.
            revision: the hash of the commit.
            kind: "commit" or "experiment".
        """
        texts = {
            file: git(self.root, "show", f"{revision}:./{file}", check=False)
            for file in ("dvc.lock", "params.yaml", METRICS, "reports/metrics/base.json")
        }
        line = git(self.root, "show", "--no-patch", "--format=%ct %s", revision)
        time, _, subject = line.partition(" ")
        lock = parse_yaml(texts["dvc.lock"], f"{name}: dvc.lock").get("stages", {})
        values = parse_yaml(texts["params.yaml"], f"{name}: params.yaml")
        metrics = _parsed(texts[METRICS], f"{name}: {METRICS}")
        base = _parsed(texts["reports/metrics/base.json"], f"{name}: reports/metrics/base.json")
        short = revision[:7]
        origin = f"experiment {short}" if kind == "experiment" else f"commit {short}: {subject}"
        return self._side(
            name,
            kind,
            origin,
            values,
            lock,
            metrics,
            float(time),
            commit=revision,
            base=base.get("base", {}),
        )

    def _side(
        self,
        name: str,
        kind: Kind,
        origin: str,
        values: Mapping[str, Any],
        lock: dict[str, Any],
        metrics: dict[str, Any],
        time: float,
        commit: str | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> Side:
        seconds, cpu = self._cost(lock)
        run = self._publisher(artifacts_digest(lock))
        return Side(
            name=name,
            kind=kind,
            origin=origin,
            texts=texts_of(ran_with(values, lock)),
            lock=lock,
            metrics=metrics if "evaluate" in lock else {},
            outputs=Outputs(self.root, lock),
            time=time,
            commit=commit,
            baseline=dict(base or {}),
            seconds=seconds,
            cpu=cpu,
            run=run,
            table=_existing(run.folder / TABLE) if run and run.folder else None,
        )

    def _publisher(self, digest: str) -> Tracked | None:
        """Return the run that published outputs with this digest, if possible one with its artifacts here."""
        found = [run for run in self.tracked if run.texts.get(ARTIFACTS) == digest]
        return next((run for run in found if run.folder), next(iter(found), None))

    def _cost(self, lock: Mapping[str, Any]) -> tuple[dict[str, float], str | None]:
        """Return the seconds of each stage and the CPU that trained.

        They come from the timings recorded here, or from the MLflow run of the training.
        """
        own = timings.matching(self.timings, lock)
        seconds = {name: float(cost["seconds"]) for name, cost in own.items()}
        cpu = own.get("train", {}).get("cpu")
        if "train" in lock and "train" not in own:
            key = recorded_key(lock["train"])
            run = next((r for r in self.tracked if r.train_key == key and r.seconds), None)
            if run:
                return {**run.seconds, **seconds}, run.cpu
        return seconds, cpu

    def find(self, word: str) -> Side:
        """Return the result that `word` names.

        Raises:
            CapasError: no result has this name, several have it, or it has no result yet.
        """
        side = self._named(word)
        if not side.has_result:
            raise CapasError(
                f"{word} has no result: {_lacking(side)}. To run the pipeline there: "
                f"{'' if side.kind == 'workspace' else f'git checkout {word}, then '}dvc repro"
            )
        return side

    def _named(self, word: str) -> Side:
        if word == WORKSPACE:
            return self.workspace()
        if not word:
            raise CapasError("an empty name names no result")
        if word.startswith(RUN):
            return self._run(word.removeprefix(RUN))
        experiments = self._experiments_called(word)
        commit = self._commit_called(word)
        if experiments and commit and commit != experiments[0].commit:
            raise CapasError(
                f"{word!r} names an experiment of DVC and a commit: say {experiments[0].reference} or "
                f"{commit[:10]}"
            )
        if experiments:
            return self.commit(word, experiments[0].commit, "experiment")
        if commit:
            return self.commit(word, commit)
        if self._may_be_run(word):
            return self._run(word)
        raise CapasError(self._unknown(word))

    def _experiments_called(self, word: str) -> list[runs.Experiment]:
        """Return the experiment with this name, as a list of at most one.

        Raises:
            CapasError: several have the name, and not exactly one of them is based on HEAD.
        """
        named = [e for e in self.experiments if word in (e.name, e.reference)]
        here = [e for e in named if e.baseline == self.head] or named
        if len(here) > 1:
            several = ", ".join(e.reference for e in here)
            raise CapasError(
                f"{word!r} names {len(here)} experiments of DVC; say which one: {several}"
            )
        return here

    def _commit_called(self, word: str) -> str | None:
        if not self.has_git or word.startswith("-"):
            return None
        found = git(
            self.root, "rev-parse", "--verify", "--quiet", f"{word}^{{commit}}", check=False
        )
        return found or None

    def _may_be_run(self, word: str) -> bool:
        """Return whether `word` may be an MLflow run; a local database tells without importing MLflow."""
        uri = tracking_uri(self.root)
        if database(self.root) is None:
            return "://" in uri and not uri.startswith("sqlite")
        return any(run.is_called(word) for run in self.tracked)

    def _run(self, word: str) -> Side:
        """Return a run with its published files: from the disk if they are there, otherwise through MLflow.

        Raises:
            CapasError: there is no such run, or its publish has not finished.
        """
        found = [run for run in self.tracked if run.is_called(word)]
        if len(found) == 1 and found[0].folder:
            return self._from_artifacts(found[0], found[0].folder)
        client = existing(self.root)
        with reachable(tracking_uri(self.root)):
            run = runs.find(client, word, self.root)
            there = {file.path for file in client.list_artifacts(run.id)}
            if missing := sorted({*PUBLISHED} - there):
                raise CapasError(
                    f"run {run.name} has no result: {', '.join(missing)} is missing, so its "
                    "publish has not finished. Check its state out and run `dvc repro publish`"
                )
            folder = self._downloads / run.id
            folder.mkdir(exist_ok=True)
            for name in {*PUBLISHED, TABLE} & there:
                client.download_artifacts(run.id, name, str(folder))
        tags = run.tags
        tracked = Tracked(
            run_id=run.id,
            name=run.name,
            train_key=tags[TRAIN_KEY],
            time=run.start_time / 1000,
            metrics=run.metrics,
            texts=tags,
            experiment_id=run.experiment_id,
        )
        return self._from_artifacts(tracked, folder)

    def _from_artifacts(self, run: Tracked, folder: Path) -> Side:
        lock = read_yaml(folder / "dvc.lock").get("stages", {})
        texts = texts_of(ran_with(read_yaml(folder / "params.yaml"), lock))
        return self._of_run(run, texts, lock, _existing(folder / TABLE))

    def _of_run(
        self,
        run: Tracked,
        texts: dict[str, str],
        lock: dict[str, Any] | None = None,
        table: Path | None = None,
    ) -> Side:
        return Side(
            name=run.name or run.run_id[:8],
            kind="run",
            origin=f"MLflow run {run.run_id}",
            texts=texts,
            lock=lock or {},
            metrics=_flat(run),
            outputs=Outputs(self.root, lock or {}),
            time=run.time,
            baseline=run.below("base."),
            seconds=run.seconds,
            cpu=run.cpu,
            tracked_sha256=run.sha256,
            run=run,
            table=table,
        )

    def page(self, sides: Sequence[Side]) -> tuple[str, str] | None:
        """Return the address of MLflow's comparison page and a hint on what must run first.

        None if a result has no run, or if the runs are in several MLflow experiments.
        """
        found = [side.run for side in sides if side.run]
        ids = list(dict.fromkeys(run.run_id for run in found))
        experiments = {run.experiment_id for run in found}
        if len(ids) < len(sides) or len(experiments) > 1:
            return None
        pages = Pages(tracking_uri(self.root), experiments.pop())
        return pages.comparison(ids), pages.hint()

    def unlisted_runs(self, sides: Sequence[Side]) -> list[Side]:
        """Return the runs of the local MLflow database not listed yet, newest first.

        Runs of `sides` and of DVC experiments are left out. If the artifacts of a run are elsewhere, only its
        parameters and scores are known.
        """
        keys = {side.train_key for side in sides}
        names = {experiment.name for experiment in self.experiments}
        others = [
            run
            for run in self.tracked
            if not (run.train_key in keys or run.texts.get(EXPERIMENT) in names)
        ]
        return [
            self._from_artifacts(run, run.folder) if run.folder else self._of_run(run, run.texts)
            for run in others
            if run.scores
        ]

    def _unknown(self, word: str) -> str:
        """Return the error message for a name that nothing has."""
        named = [e.name for e in self.experiments]
        form = "--format=%(refname:short)"
        refs = git(self.root, "for-each-ref", form, "refs/heads", "refs/tags", check=False)
        places = {
            "experiments": named,
            "branches and tags": refs.split(),
            "MLflow runs": [run.name or run.run_id[:8] for run in self.tracked],
        }
        always = [WORKSPACE, HEAD] if self.has_git else [WORKSPACE]
        every = [*always, *(name for names in places.values() for name in names)]
        close = difflib.get_close_matches(word, every, n=1, cutoff=0.6)
        meant = f"; did you mean {close[0]}?" if close else ""
        lines = [f"no experiment, commit, branch, tag or MLflow run is called {word!r}{meant}"]
        lines.append(f"  always there: {', '.join(always)}")
        if not self.has_git:
            lines.append(f"  {self.root} is no git repository with a commit")
        for place, names in places.items():
            unique = list(dict.fromkeys(names))
            if unique:
                lines.append(f"  {place}: {listed(unique, _NUM_NAMES)}")
        lines.append(
            "  an experiment of another clone: dvc exp pull REMOTE NAME; a commit: git fetch"
        )
        return "\n".join(lines)


@contextmanager
def open_repository(root: Path) -> Iterator[Repository]:
    """Yield the repository with a temporary folder for downloads, which is deleted afterwards."""
    with TemporaryDirectory(prefix="capas-compare-") as folder:
        yield Repository(root, Path(folder))


def _flat(run: Tracked) -> dict[str, Any]:
    """Return a run's metrics in the form of reports/metrics/tuned.json.

    The interval's lower end is included, because it marks the headline metric.
    """
    lows = (k.removesuffix(_LOW) for k in run.below("difference.") if k.endswith(_LOW))
    name = next((name for name in lows if name not in ("loss", *LABEL_SCORES)), None)
    marked = {} if name is None else {f"{name}_gain_low": run.metrics[f"difference.{name}{_LOW}"]}
    return {**run.scores, **marked}


def _existing(file: Path) -> Path | None:
    return file if file.is_file() else None


def _parsed(text: str, name: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise CapasError(f"{name} is no JSON: {error}") from None
    return found


def _lacking(side: Side) -> str:
    stages = ", ".join(side.lock) or "no stage"
    if "evaluate" not in side.lock:
        return f"evaluate has not run (its dvc.lock records {stages})"
    return f"{METRICS} is missing"
