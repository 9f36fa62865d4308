"""What a sweep was asked for: composed, and checked before any point runs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from capas import options
from capas.composition import CONF, hydra_errors, to_values
from capas.config import Group, explain
from capas.dag import StageSpec
from capas.errors import CapasError
from capas.params import flatten
from capas.sweep.plan import Plan

NAME = "sweep"  # conf/sweep.yaml
_BASE = "_base"  # of a group of conf/: what its choices have in common, no choice itself
Metric = Annotated[str, Field(pattern=r"^\w+\.\w+$")]


class Sweep(Group):
    """The group `sweep` of conf/. A metric is FILE.KEY: KEY in reports/metrics/FILE.json."""

    objective: Metric
    direction: Literal["minimize", "maximize"]
    columns: list[Metric]
    replicates: list[str]
    confidence_fraction: Annotated[float, Field(gt=0, lt=1)]
    language: Literal["en", "es"]
    keep: bool


@dataclass(frozen=True)
class Task:
    """`settings` and `tracking` are groups of conf/."""

    settings: dict[str, Any]
    tracking: dict[str, Any]
    words: list[str]  # overrides for Hydra
    expected: int  # points
    at_once: int  # points that the sweeper proposes before it needs a result


def prepare(plan: Plan, words: list[str], multirun: bool) -> Task:
    """The task of a command.

    Raises:
        CapasError: Hydra cannot compose it, or a value of the sweep itself is not valid.
    """
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    with options.initialize(plan.folder / CONF), hydra_errors():
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        words = [_without_base(word) for word in parser.parse_overrides(words)]
        given = parser.parse_overrides(words)
        fixed = [word for word in given if not word.is_sweep_override()]
        lines = [str(word.input_line) for word in fixed]
        config = compose(NAME, overrides=lines, return_hydra_config=True)
        hydra = OmegaConf.to_container(config.hydra, resolve=False)
        values = values_of(config)
        settings = to_values(config.sweep)
        beside = [str(word.input_line) for word in fixed if not word.is_hydra_override()]
        of_points = [line for line in beside if not is_of_sweep(line)]
        file = options.file_of(plan.folder / CONF, NAME, settings["preset"])
        _check_values(values, to_values(compose("config", overrides=of_points)), file)
        assert isinstance(hydra, dict)
        sweeper = hydra["sweeper"]
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        by_key = {word.key_or_group: word for word in parser.parse_overrides(params) + given}
        swept = [word for word in by_key.values() if word.is_sweep_override()]
        expected = _expected(swept, sweeper) if multirun else 1
    _check_settings(settings, values, plan.home)
    at_once = int(sweeper["n_jobs"]) if "n_trials" in sweeper else expected
    return Task(settings, values["tracking"], words, expected, at_once)


def is_of_sweep(override: str) -> bool:
    """Whether it sets how the sweep goes about it (`sweep=optuna`) and not what a point is."""
    return override.lstrip("+~").startswith(("sweep.", "sweep=", "sweep@"))


def values_of(config: Any) -> dict[str, Any]:
    """What params.yaml would hold, of a composed sweep."""
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(config, resolve=False)
    assert isinstance(tree, dict)
    kept = {key: value for key, value in tree.items() if key not in (NAME, "hydra")}
    return to_values(OmegaConf.create(kept))


def _without_base(word: Any) -> str:
    """`lora=glob(*)` as the choices that it stands for."""
    from hydra.core.override_parser.types import ValueType

    if word.value_type != ValueType.GLOB_CHOICE_SWEEP:
        return str(word.input_line)
    choices = [choice for choice in word.sweep_string_iterator() if choice != _BASE]
    if not choices:
        raise CapasError(
            f"{word.input_line}: neither conf/{word.key_or_group}/ nor conf/own has such a choice"
        )
    return f"{word.get_key_element()}={','.join(choices)}"


def _expected(swept: Iterable[Any], sweeper: dict[str, Any]) -> int:
    """A search says how many points it tries; else they are all combinations."""
    if "n_trials" in sweeper:
        return int(sweeper["n_trials"])
    return math.prod(len(list(word.sweep_string_iterator())) for word in swept)


def _check_values(values: dict[str, Any], of_points: dict[str, Any], file: Path) -> None:
    """A point is made of the command's words alone: what the sweep's `file` sets besides would reach none."""
    ours, theirs = flatten(values), flatten(of_points)
    lost = sorted(key for key in ours if key not in theirs or ours[key] != theirs[key])
    if lost:
        raise CapasError(
            f"{file} sets {', '.join(lost)}, which would reach no point; put it below "
            "hydra.sweeper.params there, into a file of conf/experiment/, or into the command"
        )


def _check_settings(settings: dict[str, Any], values: dict[str, Any], home: Path) -> None:
    problems = []
    try:
        Sweep.model_validate(settings)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(map(str, (NAME, *item["loc"])))
            problems.append(explain(key, item["type"], item["msg"], item["input"]))
    else:
        problems = [*_unknown_metrics(settings, home), *_unknown_replicates(settings, values)]
    if problems:
        lines = "\n".join(f"  {text}" for text in problems)
        raise CapasError(f"the sweep has {len(problems)} problem(s); no point was run:\n{lines}")


def _unknown_metrics(settings: dict[str, Any], home: Path) -> list[str]:
    """Of the key nothing is known before a stage has written the file."""
    outs = {out for spec in StageSpec.read_all(home).values() for out in spec.outs}
    files = sorted(Path(out).stem for out in outs if out.startswith("reports/metrics/"))
    return [
        f"sweep: {name} names no metric of dvc.yaml; FILE in FILE.KEY is one of {', '.join(files)}"
        for name in dict.fromkeys([settings["objective"], *settings["columns"]])
        if name.partition(".")[0] not in files
    ]


def _unknown_replicates(settings: dict[str, Any], values: dict[str, Any]) -> list[str]:
    unknown = [key for key in settings["replicates"] if key not in flatten(values)]
    return [f"sweep.replicates: {key!r} is no key of params.yaml" for key in unknown]
