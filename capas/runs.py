"""A run of MLflow by what a user calls it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capas.dag import parse_yaml, recorded_key
from capas.errors import CapasError
from capas.store import TRAIN_KEY, UNNAMED
from capas.worktree import git


def find(client: Any, word: str, root: Path) -> Any:
    """The training's run that `word` names: an id, its beginning, a name, an experiment of DVC, a train_key.

    Raises:
        CapasError: there is none, or more than one.
    """
    runs = list(_all(client))
    keys = {word, *_experiment_keys(word, root)}
    start = word.removeprefix(UNNAMED)  # what a run is called until it is an experiment
    ways = (
        [run for run in runs if run.info.run_id == word],
        [run for run in runs if run.info.run_name == word],
        [run for run in runs if run.data.tags[TRAIN_KEY] in keys],
        [run for run in runs if run.info.run_id.startswith(word)],
        [run for run in runs if start != word and run.data.tags[TRAIN_KEY].startswith(start)],
    )
    found = next(filter(None, ways), [])
    if not found:
        there = ", ".join(f"{run.info.run_name} ({run.info.run_id[:8]})" for run in runs[:5])
        raise CapasError(
            f"MLflow has no run of a training called {word!r}. There are {len(runs)}"
            + (f", the newest: {there}" if runs else "")
        )
    if len(found) > 1:
        several = ", ".join(f"{run.info.run_id} ({run.info.run_name})" for run in found[:5])
        raise CapasError(f"{word!r} names {len(found)} runs: {several}. Give the id, or more of it")
    return found[0]


def _all(client: Any) -> Iterator[Any]:
    """The runs of trainings, newest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token = None
    while experiments:
        page = client.search_runs(experiments, page_token=token)
        yield from (run for run in page if TRAIN_KEY in run.data.tags)
        token = page.token
        if not token:
            return


def _experiment_keys(name: str, root: Path) -> set[str]:
    """The trainings of DVC's experiments with that name: it may have been renamed since."""
    listed = git(root, "for-each-ref", "--format=%(refname)", "refs/exps", check=False).split()
    keys = set()
    for reference in listed:
        if reference.rpartition("/")[2] == name and reference.count("/") == 4:
            stages = parse_yaml(git(root, "show", f"{reference}:./dvc.lock"), "dvc.lock")["stages"]
            keys.add(recorded_key(stages["train"]))
    return keys
