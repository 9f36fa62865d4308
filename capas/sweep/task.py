"""Compose the command of a sweep, and check it before any trial runs."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from capas.config import options
from capas.config.composition import CONF, failures, is_group, reasons, to_values, with_new_keys
from capas.config.hydra_overrides import Composer, Point, check_points, choices_of, key_of
from capas.config.problems import Problem, refused
from capas.config.schema import GROUPS, Group
from capas.config.validation import explain, nearest
from capas.core.dag import StageSpec
from capas.core.errors import CapasError
from capas.core.params import flatten, lookup
from capas.sweep import crossing
from capas.sweep.names import swept_values
from capas.sweep.objective import (
    AUTO,
    Direction,
    contradiction,
    is_on_test_split,
    natural_direction,
    stated_columns,
    test_split_warning,
    unknown_direction,
)  # fmt: skip
from capas.sweep.plan import FOLDER
from capas.sweep.produced import metrics_of, not_produced
from capas.sweep.rungs import metric_of

NAME = "sweep"  # conf/sweep.yaml
_DIRECTION = "${sweep.direction}"  # in conf/sweep/optuna.yaml
_FIXED_BY_THE_SWEEP = ("hydra.sweep.", "hydra.run.", "hydra.output_subdir", "hydra.job.chdir")
_LOCAL = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")
Metric = Annotated[str, Field(pattern=r"^\w+\.\w+$")]
Column = Annotated[str, Field(pattern=r"^(auto|\w+\.\w+)$")]


class Sweep(Group):
    """The group `sweep` of conf/. A metric is FILE.KEY: KEY in reports/metrics/FILE.json."""

    objective: Metric
    direction: Literal["auto", "minimize", "maximize"]
    columns: list[Column]
    replicates: list[str]
    confidence_fraction: Annotated[float, Field(gt=0.5, lt=1)]
    language: Literal["en", "es"]
    cross_templates: bool
    keep: bool
    share_imports: bool
    rungs: Annotated[int, Field(ge=2)] | None
    reduction_factor: Annotated[int, Field(ge=2)]


@dataclass(frozen=True)
class Task:
    """The trials to run, and how to run them.

    Attributes:
        settings, tracking: groups of conf/; the direction is never `auto`.
        words: overrides for Hydra.
        common: those of them that set how trials run, and choices that all trials share (an overlay may
            choose the launcher). They suffice for trials whose values are known.
        expected: number of trials.
        at_once: number of trials that the sweeper proposes before it needs a result.
        points: the trials; a search chooses its own as it proceeds, and has one here, with the first values.
        base: the values of conf/ without any override.
        swept: the values of each key that has several.
        warnings: what the user should know before the first trial.
    """

    settings: dict[str, Any]
    tracking: dict[str, Any]
    words: list[str]
    expected: int
    at_once: int
    common: list[str] = field(default_factory=list)
    launcher: dict[str, Any] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    searches: bool = False
    base: dict[str, Any] = field(default_factory=dict)
    swept: dict[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def halves(self) -> bool:
        """Return whether a grid is run by successive halving; a search decides for each trial alone."""
        return bool(self.settings["rungs"]) and not self.searches and self.expected > 1


def prepare(home: Path, words: list[str], multirun: bool) -> Task:
    """Check a command and return its task; nothing is written.

    Raises:
        CapasError: an override, a value of a trial or the sweep itself is wrong; it lists everything.
    """
    conf = home / CONF
    words = [_without_base(word, conf) for word in words]
    own = [word for word in words if is_of_sweep(word) or _is_of_hydra(word)]
    fixed = tuple(word for word in words if _chooses(word, conf))
    config, problems = _composed([*own, *fixed], conf)
    sweeper = config["hydra"]["sweeper"] if config else {}
    searches = "n_trials" in sweeper
    given = {key_of(word) for word in words}
    swept = [f"{k}={v}" for k, v in (sweeper.get("params") or {}).items() if k not in given]
    every = [*swept, *words]
    composer = Composer(conf)
    checked = check_points(
        every,
        conf,
        several=multirun,
        groups={**GROUPS, NAME: Sweep},
        combine=not searches,
        limit=math.inf,  # a trial takes longer than the check of thousands
        composer=composer,
    )
    reported = {problem.key for problem in checked.problems}
    problems = [*checked.problems, *(p for p in problems if p.key not in reported)]
    if config:
        common = to_values(composer.options(fixed))
        of_sweep = [*_setting_problems(config, common, home)]
        problems += of_sweep
        problems += _repetition_problems(config[NAME], every, searches, conf)
        if not problems:
            problems += _trial_problems(config, checked.points, home, searches)
        elif not of_sweep and not _decides_metrics(every, fixed, conf):
            problems += _metric_problems(config[NAME], [common])  # as far as is known already
    if problems or not config:
        raise refused(problems, "no trial was run")
    expected = (int(sweeper["n_trials"]) if searches else len(checked.points)) if multirun else 1
    settings, warnings = _with_direction(config[NAME], checked.points, expected)
    direction = f"{NAME}.direction={settings['direction']}"
    return Task(
        settings=settings,
        tracking=checked.points[0].values["tracking"],
        words=_with(direction, words, conf),
        common=_with(direction, [*own, *fixed], conf),
        expected=expected,
        at_once=int(sweeper["n_jobs"]) if searches else expected,
        launcher=config["hydra"]["launcher"],
        points=checked.points,
        searches=searches,
        base=to_values(composer.options()),
        swept=swept_values((w for w in every if not is_of_sweep(w) and not _is_of_hydra(w)), conf),
        warnings=warnings,
    )


def _with(direction: str, words: Iterable[str], conf: Path) -> list[str]:
    """Return overrides for Hydra, with the direction that `auto` stands for."""
    others = [word for word in words if key_of(word) != key_of(direction)]
    return [*with_new_keys(others, conf), direction]


def _decides_metrics(words: Iterable[str], fixed: Collection[str], conf: Path) -> bool:
    """Return whether overrides other than the fixed choices may decide what the evaluation computes."""
    return any(
        is_group(key_of(word), conf) or key_of(word).startswith("evaluation.")
        for word in words
        if word not in fixed and key_of(word) != NAME
    )


def _trial_problems(
    config: dict[str, Any], points: Sequence[Point], home: Path, searches: bool
) -> Iterator[Problem]:
    """Yield what is wrong with the objective, the place or the templates of valid trials."""
    settings = config[NAME]
    yield from (found := [*_metric_problems(settings, [point.values for point in points])])
    for point in points:
        yield from _place_problems(point, config["hydra"]["launcher"], home)
    yield from crossing.problems(settings, points, searches)
    yield from _rung_problems(settings, searches)
    if found:
        return
    if settings["direction"] == AUTO and _natural_direction(settings, points) is None:
        yield Problem("sweep.direction", AUTO, unknown_direction(settings["objective"]))


def _metric_problems(
    settings: dict[str, Any], values: Iterable[dict[str, Any]]
) -> Iterator[Problem]:
    for of_trial in values:
        for key, sentence in not_produced(settings, of_trial):
            yield Problem(key, "", sentence)


def _repetition_problems(
    settings: dict[str, Any], words: Iterable[str], searches: bool, conf: Path
) -> Iterator[Problem]:
    """Yield a problem for each key with which a search would choose the luckiest seed."""
    repeated = settings["replicates"] if searches else []
    for word in words:
        if key_of(word) in repeated and len(set(choices_of(word, conf))) > 1:
            yield Problem(
                key_of(word),
                word.partition("=")[2],
                f"{word}: a search proposes each value once, so it would choose a seed as if it were a "
                f"setting. Leave it out, and repeat the best settings afterwards in a grid with {word}",
            )


def _rung_problems(settings: dict[str, Any], searches: bool) -> Iterator[Problem]:
    """Yield why the sweep cannot be one by successive halving."""
    rungs, objective = settings["rungs"], settings["objective"]
    if rungs and settings[crossing.SETTING]:
        yield Problem(
            "sweep.rungs",
            str(rungs),
            f"sweep.rungs={rungs} ends most trainings early, but sweep.cross_templates=true compares the "
            "models of all trials. Set one of the two: sweep.rungs=null, or sweep.cross_templates=false",
        )
    if rungs and searches and metric_of(settings) != objective:
        yield Problem(
            "sweep.objective",
            objective,
            f"sweep.objective={objective} is not known before a training has ended, so a search with "
            f"sweep.rungs={rungs} cannot drop trials by it. Use sweep.objective=train.validation_loss, or "
            "sweep.rungs=null",
        )


def _with_direction(
    settings: dict[str, Any], points: Sequence[Point], expected: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings with the direction that `auto` stands for, and warnings about the objective."""
    natural, objective = _natural_direction(settings, points), settings["objective"]
    warnings = [contradiction(settings, natural)]
    if expected > 1 and is_on_test_split(objective):
        warnings.append(test_split_warning(objective))
    direction = natural if settings["direction"] == AUTO else settings["direction"]
    return {**settings, "direction": direction}, [words for words in warnings if words]


def _natural_direction(settings: dict[str, Any], points: Sequence[Point]) -> Direction | None:
    metrics = {name for point in points for name in metrics_of(point.values)}
    return natural_direction(settings["objective"], metrics)


def _composed(own: list[str], conf: Path) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Return the configuration of the sweep with Hydra's part, and what is wrong with it.

    Args:
        own: overrides of the sweep and of Hydra, and overrides that choose one option for all trials.
    """
    from omegaconf import OmegaConf

    composer, options = Composer(conf, NAME), [word for word in own if "." not in key_of(word)]
    try:
        config = composer.options(tuple(options))
    except failures() as error:
        key = key_of(options[0]) if options else f"conf/{NAME}.yaml"
        return None, [Problem(key, "", reasons(error))]
    problems, known = [], flatten(OmegaConf.to_container(config, resolve=False))
    for word in own:
        if word in options:
            continue
        if key_of(word).startswith(_FIXED_BY_THE_SWEEP):
            problems.append(Problem(key_of(word), "", _without_effect(word)))
            continue
        try:
            composer.set(config, word)
        except failures() as error:
            if _is_of_hydra(word):  # the schema checks the keys of the group sweep
                problems.append(Problem(key_of(word), "", _no_such_setting(word, known, error)))
    tree = OmegaConf.to_container(config, resolve=False)
    assert isinstance(tree, dict)
    return {**tree, NAME: to_values(config[NAME])}, problems


def _without_effect(word: str) -> str:
    return (
        f"{word}: has no effect. A sweep keeps its files in {FOLDER}, and the results of a trial are a DVC "
        "experiment: leave it out"
    )


def _no_such_setting(word: str, known: Iterable[str], error: Exception) -> str:
    key = key_of(word)
    if key in known:
        return f"{word}: {reasons(error)}"
    if key.startswith("hydra.launcher.") and "hydra.launcher.n_jobs" not in known:
        return (
            f"{key}: the chosen launcher has no such setting. hydra/launcher=joblib runs "
            "hydra.launcher.n_jobs trials at once, hydra/launcher=slurm submits jobs to a cluster"
        )
    close = get_close_matches(key, [name for name in known if _is_of_hydra(name)], n=1, cutoff=0.6)
    return f"{key}: no such key{f'; did you mean {close[0]}?' if close else ''}"


def _setting_problems(
    config: dict[str, Any], base: dict[str, Any], home: Path
) -> Iterator[Problem]:
    """Yield what is wrong with the group `sweep`, and which values in conf/sweep/ have no effect."""
    settings = config[NAME]
    try:
        Sweep.model_validate(settings)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(map(str, (NAME, *item["loc"])))
            sentence = explain(key, item["type"], item["msg"], item["input"], {NAME: Sweep})
            yield Problem(key, str(item["input"]), sentence)
        return
    yield from _unknown_metrics(settings, home)
    yield from _direction_problems(config["hydra"]["sweeper"])
    for key in settings["replicates"]:
        if key not in flatten(base):
            sentence = f"sweep.replicates: {key!r} is not a key of params.yaml{nearest(key)}"
            yield Problem("sweep.replicates", key, sentence)
    ours = flatten(values_of({k: v for k, v in config.items() if k != "hydra"}))
    theirs = flatten(base)
    if lost := sorted(k for k in ours if k not in theirs or ours[k] != theirs[k]):
        file = options.file_of(home / CONF, NAME, settings["preset"])
        yield Problem(
            str(file),
            "",
            f"{file} sets {', '.join(lost)}, which would have no effect on the trials. Set it under "
            "hydra.sweeper.params, in a file of conf/experiment/, or on the command line",
        )


def _direction_problems(sweeper: dict[str, Any]) -> Iterator[Problem]:
    """Yield a problem if a search would not optimise in the direction of the ranking."""
    if (direction := sweeper.get("direction", _DIRECTION)) != _DIRECTION:
        yield Problem(
            "hydra.sweeper.direction",
            str(direction),
            f"hydra.sweeper.direction={getattr(direction, 'name', direction)}: the search must optimise in "
            "the direction of the ranking. Choose the search with sweep=optuna, its direction with "
            "sweep.direction",
        )


def _unknown_metrics(settings: dict[str, Any], home: Path) -> Iterator[Problem]:
    """Yield a problem for each metric of a file that no stage writes."""
    outs = {out for spec in StageSpec.read_all(home).values() for out in spec.outs}
    files = sorted(Path(out).stem for out in outs if out.startswith("reports/metrics/"))
    for name in dict.fromkeys([settings["objective"], *stated_columns(settings)]):
        if name.partition(".")[0] not in files:
            yield Problem(
                "sweep",
                name,
                (
                    f"sweep: {name} is not a metric of dvc.yaml{_meant_file(name, files)}; FILE in FILE.KEY "
                    f"must be one of {', '.join(files)}"
                ),
            )


def _meant_file(name: str, files: list[str]) -> str:
    file, _, key = name.partition(".")
    close = get_close_matches(file, files, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}.{key}?)" if close else ""


def _place_problems(point: Point, launcher: dict[str, Any], home: Path) -> list[Problem]:
    """Return the resources that the trial needs and the launcher cannot give."""
    try:
        check_place(point.values["hardware"], launcher)
    except CapasError as error:
        return [Problem("hardware", "", str(error))]
    return []


def defaults(task: Task) -> list[tuple[str, ...]]:
    """Return the overrides of the trials in which every swept key has its value of conf/."""
    keys = [key for key in task.swept if key not in task.settings["replicates"]]
    return [
        point.overrides
        for point in task.points
        if all(_choice(point.values, key) == _choice(task.base, key) for key in keys)
    ]


def _choice(values: dict[str, Any], key: str) -> Any:
    """Return the value of a key; of a group, the name of its option."""
    found = lookup(values, key)
    return found.get("preset") if isinstance(found, dict) else found


def runs_here(launcher: dict[str, Any]) -> bool:
    """Return whether the trials run on this machine; a cluster's machines may have other resources."""
    return str(launcher["_target_"]).rpartition(".")[2] in _LOCAL


def check_place(hardware: dict[str, Any], launcher: dict[str, Any]) -> None:
    """Check that a trial can train in as many processes as it is set to.

    Raises:
        CapasError: it needs several machines, or more GPUs than its job has.
    """
    machines, processes = hardware["num_machines"], hardware["num_processes"]
    if machines > 1:
        raise CapasError(
            f"hardware.num_machines={machines}: a trial of a sweep runs on one machine. Set it to 1"
        )
    gpus = launcher.get("gpus_per_node") or 0
    if is_slurm(launcher) and hardware["device"] == "cuda" and gpus < processes:
        raise CapasError(
            f"hardware.num_processes={processes}, but hydra.launcher.gpus_per_node={gpus}. Set "
            f"gpus_per_node to {processes}"
        )


def is_slurm(launcher: dict[str, Any]) -> bool:
    return str(launcher["_target_"]).endswith("SlurmLauncher")


def is_of_sweep(override: str) -> bool:
    """Return whether an override sets how the sweep runs (`sweep=optuna`), not a value of a trial."""
    return override.lstrip("+~").startswith(("sweep.", "sweep=", "sweep@"))


def _chooses(word: str, conf: Path) -> bool:
    """Return whether an override chooses one existing option for all trials."""
    key, _, option = word.partition("=")
    return is_group(key, conf) and key != NAME and option in options.options_of(conf, key)


def _is_of_hydra(override: str) -> bool:
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def values_of(config: Any) -> dict[str, Any]:
    """Return the values that params.yaml would hold for a composed sweep."""
    from omegaconf import OmegaConf

    tree = config if isinstance(config, dict) else OmegaConf.to_container(config, resolve=False)
    assert isinstance(tree, dict)
    kept = {key: value for key, value in tree.items() if key not in (NAME, "hydra")}
    return to_values(OmegaConf.create(kept))


def _without_base(word: str, conf: Path) -> str:
    """Return `lora=glob(*)` as the choices that it matches.

    An override that matches none is returned as it is, and is refused later.
    """
    key, _, value = word.partition("=")
    if not value.startswith("glob(") or not is_group(key_of(word), conf):
        return word
    choices = [text.partition("=")[2] for text in choices_of(word, conf)]
    return f"{key}={','.join(choices)}" if choices else word
