"""Read the files that the configuration names, for the copies in data/composed that stages use."""

import json
from pathlib import Path
from typing import Any

from capas.config.composition import CONF, Values
from capas.config.environment import locked_versions
from capas.config.options import OWN, find_template
from capas.core.code_digests import CodeReader, digest_of
from capas.core.errors import CapasError
from capas.evaluation.harness import read_tasks
from capas.evaluation.names import needs_answers
from capas.evaluation.user_metrics import read_sources

KEY_OF_METRIC = "trainer.metric_for_best_model"
COMPOSED = Path("data/composed")
CODE_OF_METRIC = "capas/evaluation/checkpoint_metric.py"


def resolved_files(values: Values) -> dict[Path, str]:
    """Return {path: text} of copies of the named files, so that stages depend on exactly the chosen ones.

    Raises:
        CapasError: a file is missing, lies where compose does not notice edits, or cannot be used.
    """
    wrong, path = values["generation"]["wrong_chat_template"], values["chat_template"]["path"]
    sources = read_sources(values["evaluation"]["metrics"], Path())
    metric = values["trainer"]["metric_for_best_model"]
    of_metric = read_sources([metric] if needs_answers(metric) else [], Path(), KEY_OF_METRIC)
    harness = values["evaluation"]["harness"]
    tasks = read_tasks(harness["tasks"], harness["include_path"], Path())
    other = find_template(CONF, wrong).as_posix()
    return {
        COMPOSED / "chat_template.jinja": (
            "{# the model's own #}\n"
            if path.partition(":")[0] == "model"
            else in_conf("chat_template.path", path)
        ),
        COMPOSED / "wrong_chat_template.jinja": (
            in_conf("generation.wrong_chat_template", other, wrong) if wrong else "{# none #}\n"
        ),
        COMPOSED / "checkpoint_metric.json": as_json(
            {"sources": of_metric, **(_code_of_metric() if needs_answers(metric) else {})}
        ),
        COMPOSED / "harness.json": as_json(tasks),
        COMPOSED / "metrics.json": as_json({"sources": sources}),
        COMPOSED / "prompts.json": as_json({"prompts": prompts(values["generation"]["prompts"])}),
    }


def _code_of_metric() -> dict[str, Any]:
    """Return a digest of the code that generates and scores answers, and the packages that only it uses.

    They decide a training's bytes only if a metric of answers chooses the checkpoint: see RECORDED_APART.
    """
    versions = locked_versions()
    return {
        "code": digest_of(CodeReader(Path()).files(CODE_OF_METRIC)),
        "packages": {name: versions[name] for name in ("rouge-score", "sacrebleu")},
    }


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def in_conf(key: str, name: str, value: str | None = None) -> str:
    """Return the text of a file in conf/, where compose notices every edit.

    Args:
        value: the value of `key`, if it is not the file's name.

    Raises:
        CapasError: the file is missing, or lies elsewhere.
    """
    path, given = Path(name), f"{key}={value or name!r}"
    if not path.resolve().is_relative_to(CONF.resolve()):
        raise CapasError(f"{given}: move the file into conf/, so that edits rerun the stages")
    if not path.is_file():
        own = CONF / OWN / path.parent.name
        if (own / path.name).is_file():
            raise CapasError(f"{given}: there is no {path}; did you mean {own / path.name}?")
        found = [file for folder in (path.parent, own) for file in folder.glob(f"*{path.suffix}")]
        there = ", ".join(map(str, sorted(set(found)))) or "nothing"
        raise CapasError(f"{given}: there is no {path}; available: {there}")
    return path.read_text(encoding="utf-8")


def prompts(setting: Any) -> list[str] | None:
    if not isinstance(setting, str):
        return setting
    if not Path(setting).is_file():
        raise CapasError(
            f"generation.prompts={setting!r}: no such file. Name a file as "
            "conf/generation/NAME.txt, or write a list of quoted prompts: ['Set a timer for 5 "
            "minutes.']"
        )
    lines = [line.strip() for line in in_conf("generation.prompts", setting).splitlines()]
    if not any(lines):
        raise CapasError(
            f"generation.prompts={setting!r}: the file has no prompt. Write one prompt per line"
        )
    return [line for line in lines if line]
