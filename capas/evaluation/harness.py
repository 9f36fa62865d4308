"""Run tasks of EleutherAI's lm-evaluation-harness on the base and on the tuned model.

    evaluation.harness.tasks: [arc_easy]     a task of the harness; its data must be in the Hub's cache
    evaluation.harness.include_path: data/own/tasks, with tasks: [mine]     a folder of the user's own tasks

Compose copies the files of that folder for the stage, with the harness's version, so that a change of either
reruns the evaluation. The stage writes them into a temporary folder and works there: `data_files` of a task
names files of this folder. (DVC does not see what a task fetches from the Hub.)
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.params import Params
from capas.evaluation.user_metrics import FOLDERS

if TYPE_CHECKING:
    from capas.models.loading import TunedModel

PACKAGE = "lm_eval"
KEY = "evaluation.harness"


def read_tasks(tasks: list[str], include_path: str | None, root: Path) -> dict[str, Any]:
    """Return the harness's version, and {name: text} of the folder's files, for compose.

    Raises:
        CapasError: the harness is not installed, or the folder is missing, lies elsewhere, has no task or has
            a file that is not text.
    """
    if not tasks:
        return {"version": None, "files": {}}
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        raise CapasError(
            f"{KEY}.tasks={tasks} needs the lm-evaluation-harness, which is not installed: pip "
            f"install -e '.[harness]'. Or set {KEY}.tasks=[]"
        ) from None
    return {"version": found, "files": _texts(include_path, root) if include_path else {}}


def _texts(include_path: str, root: Path) -> dict[str, str]:
    given, path = f"{KEY}.include_path={include_path}", PurePosixPath(include_path)
    inside = any(path.is_relative_to(f) and path != PurePosixPath(f) for f in FOLDERS)
    if not inside or ".." in path.parts:
        raise CapasError(
            f"{given}: move the tasks into a folder in {' or '.join(FOLDERS)}, so that edits rerun "
            "the evaluation"
        )
    folder = root / path
    if not folder.is_dir():
        raise CapasError(f"{given}: no such folder")
    files = sorted(f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    if not any(file.suffix == ".yaml" for file in files):
        raise CapasError(f"{given}: no task found; a task is a file NAME.yaml")
    try:
        return {f.relative_to(folder).as_posix(): f.read_text(encoding="utf-8") for f in files}
    except UnicodeDecodeError as error:
        raise CapasError(
            f"{given}: a file is not UTF-8 text (data must be JSON or CSV): {error}"
        ) from None


def evaluate(
    models: "TunedModel",
    tokenizer: Any,
    settings: Params,
    composed: Path,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Return the scores of every task, for base and tuned model.

    Args:
        models: the tuned model with its base.
        settings: evaluation.harness.
        composed: data/composed/harness.json.

    Returns:
        {version, tasks: {task: {version, num_records, num_fewshot, metrics: {metric: {base, base_stderr,
        tuned, tuned_stderr}}}}}; a standard error is None if the harness has none.

    Raises:
        CapasError: a task is not known, or its data is missing.
    """
    from lm_eval.models.huggingface import HFLM

    facts = read_json(composed)
    with _laid_out(facts["files"]) as folder:
        tasks = _known(list(settings.tasks), folder)

        def run(model: Any) -> dict[str, Any]:
            subject = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            return _run(subject, tasks, settings, seed)

        with models.base() as model:
            base = run(model)
        tuned = run(models.model)
    scores = {name: _side_by_side(name, base, tuned) for name in sorted(tuned["results"])}
    return {"version": facts["version"], "tasks": scores}


@contextlib.contextmanager
def _laid_out(files: Mapping[str, str]) -> Iterator[Path]:
    """Write the files into a temporary folder, which is the current folder in the block."""
    with TemporaryDirectory(prefix="capas-harness-") as name:
        folder = Path(name)
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
        with contextlib.chdir(folder):
            yield folder


def _known(names: list[str], folder: Path) -> Any:
    """Return the tasks of the harness and of the folder.

    Raises:
        CapasError: the harness knows no task of this name.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = TaskManager(include_path=str(folder))
    if unknown := [name for name in names if not tasks.match_tasks([name])]:
        raise CapasError(f"{KEY}.tasks: the harness knows no task {', '.join(unknown)}")
    return tasks


def _run(subject: Any, tasks: Any, settings: Params, seed: int) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    names = list(settings.tasks)
    try:
        found: dict[str, Any] = simple_evaluate(
            subject,
            tasks=names,
            task_manager=tasks,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, ImportError) as error:
        raise CapasError(
            f"{KEY}.tasks={names}: {error}. Stages are offline, so the task's data must already be "
            f"in the Hub's cache. Run `lm_eval run --model dummy --tasks {','.join(names)} --limit "
            "1` first"
        ) from error
    return found


def _side_by_side(task: str, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    scores = {"base": base["results"][task], "tuned": tuned["results"][task]}
    metrics: dict[str, dict[str, float | None]] = {}
    for key in scores["tuned"]:
        metric, _, chosen = key.partition(",")  # "acc,none": the metric, and a filter of answers
        if not chosen or metric.endswith("_stderr"):
            continue
        name = metric if chosen == "none" else f"{metric} {chosen}"
        metrics[name] = {
            f"{model}{suffix}": _number(found.get(f"{metric}{suffix},{chosen}"))
            for model, found in scores.items()
            for suffix in ("", "_stderr")
        }
    return {
        "version": tuned["versions"].get(task),
        "num_records": tuned["n-samples"].get(task, {}).get("effective"),
        "num_fewshot": tuned["n-shot"].get(task),
        "metrics": metrics,
    }


def _number(value: Any) -> float | None:
    return (
        float(value) if isinstance(value, int | float) else None
    )  # the harness has "N/A" for none
