"""Ask each trained model of a sweep over chat templates in the format of every other model.

    python -m capas.sweep.crossing FOLDER

It runs in its own process, because kernels are chosen before torch is imported. The adapters and the
formatted questions come from DVC's cache. The results are kept in FOLDER, the folder of the sweep.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.config.duration import LOADING
from capas.config.hydra_overrides import key_of
from capas.config.problems import Problem
from capas.core import dag, links
from capas.core.errors import CapasError, exit_on_user_error
from capas.core.files import read_json, write_json, write_whole
from capas.core.params import Params
from capas.core.records import FORMATTED, Record, evenly_spaced, read_records
from capas.core.worktree import git
from capas.evaluation.answer_length import answer_limit
from capas.evaluation.formats import Format, ask
from capas.evaluation.names import name_of, of_answers
from capas.models import hardware
from capas.sweep.crosstable import Cell, CrossTable
from capas.sweep.plan import Plan, digest
from capas.sweep.ranking import Row

log = logging.getLogger("capas.sweep")
SETTING = "cross_templates"  # a key of the group sweep
KEPT = "templates.json"  # in the folder of the sweep
ADAPTER, DATA, QUANTIZED = "data/models/adapter", "data/formatted", "data/models/quantized"
TOKENIZER, METRICS = "data/models/tokenizer", "data/composed/metrics.json"
_FOLDERS, _FILES = (ADAPTER, DATA, QUANTIZED, TOKENIZER), (METRICS,)
_GROUP = "chat_template"


def problems(
    settings: Mapping[str, Any], points: Sequence[Any], searches: bool
) -> Iterator[Problem]:
    """Yield the reasons why the models of these trials cannot be asked in each other's format."""
    if not settings[SETTING]:
        return
    key, names = f"sweep.{SETTING}", [point.values[_GROUP]["preset"] for point in points]
    rest = {
        frozenset(word for word in point.overrides if not _is_template(word)) for point in points
    }
    if searches or len(rest) > 1 or not 1 < len(set(names)) == len(names):
        yield Problem(
            key,
            "true",
            f"{key}=true needs at least two trials that differ only in chat_template: "
            "python stages/sweep.py -m sweep=templates chat_template=llama3,chatml",
        )
    elif not points[0].values["evaluation"]["metrics"]:
        yield Problem(
            key, "true", f"{key}=true needs a metric that scores answers: evaluation.metrics"
        )


def _is_template(word: str) -> bool:
    key = key_of(word)
    return key == _GROUP or key.startswith(f"{_GROUP}.")


def cross(rows: Sequence[Row], plan: Plan) -> CrossTable:
    """Return the table; compute it if the sweep's folder does not have it for these models.

    Raises:
        CapasError: an output is no longer in DVC's cache, or a model cannot be asked; the reason was logged.
    """
    names = [row.name for row in rows]
    found = read_kept(plan, names)
    if found is None:
        write_whole(plan.folder / "templates.in.json", json.dumps(names))
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(plan.folder)], cwd=plan.home, check=False
        )
        found = read_kept(plan, names)
        if done.returncode or found is None:
            raise CapasError(
                "the models could not be asked in each other's format, see above; the experiments are "
                "there, and the same command asks again"
            )
    return CrossTable(found, metric_of(rows[0], plan))


def read_kept(plan: Plan, names: Sequence[str]) -> list[Cell] | None:
    """Return the cells computed earlier, or None if there are none for these models."""
    file = plan.folder / KEPT
    if not file.exists():
        return None
    facts = read_json(file)
    cells: list[Cell] = facts["cells"]
    return cells if facts["key"] == table_key(plan, names) else None


def table_key(plan: Plan, names: Sequence[str]) -> str:
    """Return a digest of everything that decides the table."""
    outs = [plan.outputs(name).md5 for name in sorted(names)]
    return digest([{path: of.get(path) for path in (*_FOLDERS, *_FILES)} for of in outs])


def compute(plan: Plan) -> None:
    """Ask all models in all formats, and keep the table in the sweep's folder."""
    names = json.loads((plan.folder / "templates.in.json").read_text(encoding="utf-8"))
    with TemporaryDirectory(prefix="capas-") as folder:
        models = [Model(plan, name, Path(folder) / name) for name in sorted(names)]
        models.sort(key=lambda model: model.template)
        cells = list(_cells(models))
    facts = {"key": table_key(plan, names), "cells": cells}
    partial_file = plan.folder / f".{KEPT}.partial"
    write_json(partial_file, facts)
    partial_file.replace(plan.folder / KEPT)


class Model:
    """A trained model with its questions, laid out in `folder` from DVC's cache."""

    def __init__(self, plan: Plan, experiment: str, folder: Path) -> None:
        self.folder = folder
        outputs = plan.outputs(experiment)
        for path in _FOLDERS:
            for name, file in outputs.folder(path).items():
                _place(file, folder / path / name)
        for path in _FILES:
            found = outputs.find(path)
            if found is None:
                raise CapasError(f"{path} of {experiment} is not in DVC's cache: `dvc pull`")
            _place(found, folder / path)
        text = git(plan.home, "show", f"{plan.reference(experiment)}:params.yaml")
        self.params = Params(dag.parse_yaml(text, "params.yaml"))
        self.template = str(self.params.chat_template.preset)
        self.chat = read_json(folder / DATA / "chat.json")
        weights = sorted(name for name in outputs.folder(ADAPTER) if name.endswith(".safetensors"))
        self.weights = [outputs.digest(f"{ADAPTER}/{name}") for name in weights]

    def records(self) -> list[Record]:
        """Return the test records that the stage `evaluate` asks."""
        every = list(read_records(self.folder / DATA / "test.parquet", FORMATTED))
        count = self.params.evaluation.max_records
        return every if count is None else evenly_spaced(every, count)

    def load(self) -> Any:
        """Return the tuned model."""
        device = hardware.prepare(self.params.hardware)  # before torch is imported
        from capas.models.loading import TunedModel, load_model

        group = Params({key: self.params.model[key] for key in LOADING})
        load_base = partial(load_model, self.folder / QUANTIZED, group, device)
        return TunedModel(self.folder / ADAPTER, group, device, load_base).model


def _place(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    links.place(file, target)


def _cells(models: Sequence[Model]) -> Iterator[Cell]:
    """Yield the cells of the table; models and formats that are equal byte for byte run only once."""
    from tokenizers import Tokenizer

    from capas.evaluation.scorer import Scorer

    records = {model.template: model.records() for model in models}
    common = set.intersection(*({record["id"] for record in of} for of in records.values()))
    shared = {name: [r for r in of if r["id"] in common] for name, of in records.items()}
    known: dict[str, tuple[float, float]] = {}
    for model in models:
        evaluation, loaded = model.params.evaluation, None
        scorer = Scorer(of_answers(evaluation.metrics), model.folder / METRICS)
        tokenizer = Tokenizer.from_file(str(model.folder / TOKENIZER / "tokenizer.json"))
        for other in models:
            rows = shared[other.template]
            prompts, stops = [row["prompt_ids"] for row in rows], other.chat["stop_token_ids"]
            limit = answer_limit(rows, evaluation.max_new_tokens)
            key = digest(model.weights, model.chat["stop_token_ids"], prompts, stops, limit)
            if key not in known:
                loaded = model.load() if loaded is None else loaded
                form = Format(prompts, stops)
                answers = ask(
                    loaded, rows, form, model.chat, scorer, tokenizer, limit, evaluation.batch_size
                )
                known[key] = answers.score, answers.stop_rate
                values = model.template, other.template, answers.score
                log.info("trained with %s, asked in %s: %.3f", *values)
            score, stop_rate = known[key]
            yield {
                "trained_with": model.template,
                "asked_in": other.template,
                "num_records": len(rows),
                "score": score,
                "stop_rate": stop_rate,
                "ids": digest(prompts),
            }


def metric_of(row: Row, plan: Plan) -> str:
    """Return the name of the score: the first metric of the evaluation."""
    values = plan.recorded(row.name)["evaluate"]["params"]["params.yaml"]
    metrics = (
        values["evaluation"]["metrics"] if "evaluation" in values else values["evaluation.metrics"]
    )
    return name_of(of_answers(metrics)[0])


if __name__ == "__main__":
    logging.basicConfig(format="sweep: %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)  # other loggers stay quiet during generation
    with exit_on_user_error("sweep"):
        compute(Plan.read(Path(sys.argv[1])))
