"""Find a run in MLflow by any of its names."""

from pathlib import Path
from typing import NamedTuple

from capas.core.dag import parse_yaml, recorded_key
from capas.core.errors import CapasError
from capas.core.worktree import git
from capas.tracking.client import Client, Run
from capas.tracking.store import EXPERIMENT, TRAIN_KEY


def find(client: Client, word: str, root: Path) -> Run:
    """Return a training run by id, name, DVC experiment or train_key.

    The beginning of an id or of a train_key is enough.

    Raises:
        CapasError: there is none, or more than one.
    """
    runs = _all(client)
    keys = {word, *_experiment_keys(word, root)}
    ways = (
        [run for run in runs if run.id == word],
        [run for run in runs if run.name == word],
        [run for run in runs if run.tags[TRAIN_KEY] in keys],
        [run for run in runs if run.tags.get(EXPERIMENT) == word],
        [run for run in runs if run.id.startswith(word)],
        [run for run in runs if run.tags[TRAIN_KEY].startswith(word)],
    )
    found = next(filter(None, ways), [])
    if not found:
        there = ", ".join(f"{run.name} ({run.id[:8]})" for run in runs[:5])
        raise CapasError(
            f"MLflow has no training run {word!r}. Training runs: {len(runs)}"
            + (f", the newest: {there}" if runs else "")
        )
    if len(found) > 1:
        several = ", ".join(f"{run.id} ({run.name})" for run in found[:5])
        raise CapasError(
            f"{word!r} matches {len(found)} runs: {several}. Use the run id, or more characters of "
            "it"
        )
    return found[0]


def _all(client: Client) -> list[Run]:
    """Return the training runs, newest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run for run in client.search_runs(experiments) if TRAIN_KEY in run.tags]


class Experiment(NamedTuple):
    """An experiment of DVC: a commit on top of the commit on which it was run."""

    name: str
    reference: str
    commit: str
    baseline: str
    time: float  # time of its commit, in seconds since 1970


def experiments(root: Path) -> list[Experiment]:
    """Return DVC's experiments in this repository, newest first."""
    form = "--format=%(refname) %(objectname) %(committerdate:unix)"
    order = "--sort=-committerdate"
    found = []
    for line in git(root, "for-each-ref", order, form, "refs/exps", check=False).splitlines():
        reference, commit, time = line.split()
        if reference.count("/") == 4:  # refs/exps/ab/cdef.../NAME
            _, _, start, rest, name = reference.split("/")
            found.append(Experiment(name, reference, commit, start + rest, float(time)))
    return found


def _experiment_keys(name: str, root: Path) -> set[str]:
    """Return the train_keys of DVC's experiments with that name, which may have been renamed since."""
    named = [one for one in experiments(root) if one.name == name]
    return {key for one in named if (key := _train_key(_lock(one, root)))}


def experiment_of(train_key: str, adapter_md5: str, root: Path) -> str | None:
    """Return the name of DVC's oldest experiment with this training, for example a pulled one.

    Args:
        adapter_md5: md5 of the adapter in dvc.lock; a lock without it is not parsed.
    """
    for one in reversed(experiments(root)):
        lock = _lock(one, root)
        if adapter_md5 in lock and _train_key(lock) == train_key:
            return one.name
    return None


def _lock(experiment: Experiment, root: Path) -> str:
    return git(root, "show", f"{experiment.commit}:./dvc.lock", check=False)


def _train_key(lock: str) -> str | None:
    entry = parse_yaml(lock, "dvc.lock").get("stages", {}).get("train")
    return recorded_key(entry) if entry else None
