"""Compose conf/ into params.yaml, the only configuration that stages read, and validate every value.

Reads   conf/, requirements.lock, the code of all stages; data/own, for functions of evaluation.metrics and
        tasks of evaluation.harness; params.yaml, for values that came in from outside conf/
Writes  params.yaml, code.yaml, environment.yaml, data/composed/; conf/overrides.yaml where such values came
        in, conf/revisions.yaml where a branch on the Hub, or a folder, is used for the first time

`dvc repro` runs it after every edit of conf/. By hand:

    python stages/compose_params.py --check          what a compose would change; changes nothing
    python stages/compose_params.py --print lora.r=8 the values with Hydra overrides, as JSON
    python stages/compose_params.py --reset          empty conf/overrides.yaml first
    python stages/compose_params.py --force          conf/ is right: drop edits of params.yaml
    python stages/compose_params.py --keep           params.yaml is right: record it as overrides
    python stages/compose_params.py --update-revisions   what branches and folders stand for today

A leaf before and after: `trainer: {seed: ${seed}}` in conf/trainer/_base.yaml, `trainer: {seed: 0}` here.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from capas.config.checking import check
from capas.config.composition import (
    CONF,
    NOTHING_OVERRIDDEN,
    OVERRIDES,
    PARAMS,
    Values,
    composer,
    digest,
    dump,
    read,
    word_given,
)  # fmt: skip
from capas.config.options import OWN, find_template, options_of
from capas.config.overrides import absorb, difference, in_force
from capas.config.pins import REVISIONS, Pins
from capas.config.problems import refused
from capas.config.requirements import read_by
from capas.config.schema import GROUPS, advice, group_schema, validate
from capas.core import code
from capas.core.errors import CapasError, sweep_instead, told
from capas.core.files import write_whole
from capas.core.params import Params
from capas.core.progress import heartbeat
from capas.dataset.references import read_references
from capas.evaluation.choice import Choice, choose_metrics
from capas.evaluation.harness import read_tasks
from capas.evaluation.names import AUTO
from capas.evaluation.user_metrics import read_sources
from capas.hub import embedded
from capas.workspace import unfinished

log = logging.getLogger("capas")
ENVIRONMENT, LOCK, COMPOSED = (
    Path("environment.yaml"),
    Path("requirements.lock"),
    Path("data/composed"),
)
CODE = (Path("capas"), Path("stages"))
SCHEMAS = Path(".vscode/schema")
COST = "CAPAS_COST"  # off: nothing is measured. No result depends on it
COSTLY = (
    "model",
    "dataset",
    "quantization",
    "lora",
    "trainer",
    "evaluation",
    "generation",
    "hardware",
)
# The packages whose version decides a stage's bytes; stages declare those that they use.
PACKAGES = (
    "accelerate", "bitsandbytes", "datasets", "datasketch", "jinja2", "matplotlib", "numpy", "peft",
    "pyarrow", "rouge-score", "sacrebleu", "safetensors", "scikit-learn", "tokenizers", "torch",
    "transformers",
)  # fmt: skip


def main(options: argparse.Namespace) -> None:
    if options.schema:
        return write_schemas()
    chosen.cache_clear()
    if not (options.print or options.check):
        check_finished()
    ensure_overrides(reset=options.reset)
    before = inputs()
    pins, word = Pins.read(), word_given(options.overrides)
    reads = read_by(Path(), [options.stage], before=False) if options.stage else ()
    if problems := check(options.overrides, reads=reads) if options.print else []:
        raise refused(problems)
    with composer(CONF) as compose:
        target = with_metrics(compose(options.overrides))
    if options.update_revisions:
        validate(target, word)
        pins.update(target)
    if options.print:
        target = pins.resolve(target)
        if options.files:
            write_all({options.files / path: text for path, text in resolved_files(target).items()})
        sys.stdout.write(json.dumps(target) + "\n")
        return None
    if options.check:
        return show_changes(target, pins, options)
    if came_from_outside(target, pins, options):
        target = adopt(read(PARAMS)[0], pins, options.keep)
    validate(target, word)
    target = pins.resolve(target)
    outputs = {REVISIONS: pins.dump()} if pins.changed else {}
    files = resolved_files(target)
    outputs |= {PARAMS: dump(target), ENVIRONMENT: environment(), **files}
    if digests := code.digests(Path()):
        outputs[Path(code.CODE)] = code.dump(digests)
    for note in in_force():
        log.info("conf/overrides.yaml sets %s", note)
    for line in advice(target):
        log.warning("%s", line)
    if inputs() != before or resolved_files(target) != files:
        raise CapasError(
            "conf/, params.yaml, requirements.lock, the code, a function of evaluation.metrics or a "
            "task of evaluation.harness was edited while it was composed; run `dvc repro` again"
        )
    old = read(PARAMS)[0] if PARAMS.exists() else {}
    write_all(outputs)
    log.info("params.yaml written")
    if is_costly(old, target):
        tell_cost()
    if options.reset:
        log.info("now run `dvc repro`: it restores the results from the cache, or runs the stages")
    return None


def check_finished() -> None:
    """Raises CapasError: an experiment was killed here, whose values would be taken for the user's."""
    left = None if "DVC_EXP_NAME" in os.environ else unfinished.killed(Path())
    if left:
        raise CapasError(
            f"`{left.command}` was killed, and its values are still in params.yaml and conf/.\n"
            "To restore the workspace: capas restore   (checkpoints are kept: the same command "
            "resumes)\nTo keep its values: capas restore --keep"
        )


def is_costly(old: Values, new: Values) -> bool:
    """Whether to measure what a run costs: of a model of one's own, where what decides it has changed."""
    if new["model"]["model_name_or_path"] == embedded.FOLDER or "DVC_EXP_NAME" in os.environ:
        return False
    if os.environ.get(COST) == "off":
        return False
    return any(old.get(group) != new[group] for group in COSTLY)


def tell_cost() -> None:
    """Log download, disk, memory and minutes of the stages; that it cannot be said stops nothing."""
    log.info("estimating the cost of the run (about 20 seconds)")
    command = [sys.executable, "-m", "capas.config.cost"]
    with (
        heartbeat(),
        TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.info("%s", line.rstrip("\n"))
        if process.wait():
            errors.seek(0)
            reason = errors.read().strip().splitlines()[-1:] or ["unknown"]
            log.info("the cost of the run could not be estimated: %s", reason[0])


def ensure_overrides(reset: bool) -> None:
    if reset or not OVERRIDES.exists():
        OVERRIDES.write_text(NOTHING_OVERRIDDEN, encoding="utf-8")


def inputs() -> dict[str, str]:
    """What compose reads, and DVC hashes after the command ran, less what compose writes itself."""
    own = (OVERRIDES, REVISIONS)
    files = [path for path in CONF.rglob("*") if path.is_file() and path not in own]
    files += [path for folder in CODE for path in folder.rglob("*.py")]
    files += [path for path in (PARAMS, LOCK) if path.exists()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def show_changes(target: Values, pins: Pins, options: argparse.Namespace) -> None:
    old = read(PARAMS)[0] if PARAMS.exists() else {}
    if came_from_outside(target, pins, options):
        for key, value in difference(pins.known(old), pins.known(target)).items():
            log.info("%s=%s is not from conf/: it would move to conf/overrides.yaml", key, value)
        return
    target = pins.resolve(target)
    was, becomes = difference(old, target), difference(target, old)
    for key, value in becomes.items():
        log.info("%s: %s -> %s", key, was.get(key), value)
    for key in was.keys() - becomes.keys():
        log.info("%s: removed", key)


def came_from_outside(target: Values, pins: Pins, options: argparse.Namespace) -> bool:
    """Whether params.yaml holds values that conf/ does not compose to and that must not be lost.

    DVC writes revisions as conf/ has them, and capas as they are pinned: that is no difference.

    Raises:
        CapasError: both params.yaml and conf/ changed, so that only the user knows which is meant.
    """
    if options.force or options.reset or not PARAMS.exists():
        return False
    found, stamp = read(PARAMS)
    old, target = with_metrics(pins.known(found)), pins.known(target)
    if not difference(old, target) and not difference(target, old):
        return False
    if stamp == digest(found):
        return False  # as capas wrote it: conf/ was edited
    written_by_dvc = stamp is None and "DVC_EXP_NAME" in os.environ
    conf_unchanged = stamp == digest(target)
    if written_by_dvc or conf_unchanged or options.keep:
        return True
    keys = ", ".join({**difference(old, target), **difference(target, old)})
    what = (
        "params.yaml was left by an unfinished `dvc exp run` and differs from conf/"
        if stamp is None
        else "params.yaml was edited and conf/ changed as well"
    )
    raise CapasError(
        f"{what}; they differ in: {keys}\nTo keep conf/: python stages/compose_params.py --force\n"
        "To keep params.yaml: python stages/compose_params.py --keep"
    )


def adopt(values: Values, pins: Pins, keep: bool) -> Values:
    """Validate first: a wrong value must not reach conf/overrides.yaml."""
    validate(values, word_given())
    check_choices(values)
    pins.resolve(values)
    resolved_files(with_metrics(values))
    absorb(values, lambda found: with_metrics(pins.known(found)))
    with composer(CONF) as compose:
        target = with_metrics(compose([]))
    if "DVC_EXP_NAME" not in os.environ or keep:
        log.info("the edit of params.yaml was moved to conf/overrides.yaml")
    return target


def check_choices(values: Values) -> None:
    """Check that the option of every group is there, as `preset` names it.

    Raises:
        CapasError: one is not; `dvc exp run --temp` takes the files along that git knows.
    """
    for group, preset in ((g, values[g]["preset"]) for g in GROUPS):
        if preset not in (there := options_of(CONF, group)):
            raise CapasError(
                f"{group}={preset}: there is no {CONF / group / preset}.yaml, nor one in "
                f"{CONF / OWN / group}; {group} has {', '.join(there)}. Experiments with --temp or "
                f"--queue only see options that git tracks: git add {CONF / OWN}"
            )


def with_metrics(values: Values) -> Values:
    """Replace `evaluation.metrics: auto` by the metrics that suit the answers of the data.

    Values that are not valid stay as they are: `validate` tells all problems at once.
    """
    evaluation = values.get("evaluation")
    if not isinstance(evaluation, dict) or evaluation.get("metrics") != AUTO:
        return values
    try:
        validate(values)
    except CapasError:
        return values
    choice = chosen(json.dumps(values["dataset"]))
    return {**values, "evaluation": {**evaluation, "metrics": choice.metrics}}


@cache
def chosen(dataset: str) -> Choice:
    """Choose once a run, and say so. `dataset` is the group as JSON."""
    params = Params(json.loads(dataset))
    choice = choose_metrics(read_references(params, Path()))
    names = ", ".join(choice.metrics) or "[]"
    log.info("evaluation.metrics=auto looked at the answers (%s): %s", choice.why, names)
    return choice


def environment() -> str:
    """The locked version of each package that decides a stage's bytes."""
    pins = dict(
        re.findall(r"^([\w.-]+)==([^\s;+]+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    )
    versions = {name.lower().replace("_", "-"): pin for name, pin in pins.items()}
    missing = [package for package in PACKAGES if package not in versions]
    if missing:
        raise CapasError(f"{LOCK} does not pin {', '.join(missing)}. Update it: make lock")
    lines = [f'{package}: "{versions[package]}"' for package in PACKAGES]
    return "\n".join([f"# From {LOCK}, by stages/compose_params.py.", *lines]) + "\n"


def resolved_files(values: Values) -> dict[Path, str]:
    """Files that the configuration names, copied where stages can depend on exactly the chosen one."""
    wrong, path = values["generation"]["wrong_chat_template"], values["chat_template"]["path"]
    sources = read_sources(values["evaluation"]["metrics"], Path())
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
        COMPOSED / "harness.json": as_json(tasks),
        COMPOSED / "metrics.json": as_json({"sources": sources}),
        COMPOSED / "prompts.json": as_json({"prompts": prompts(values["generation"]["prompts"])}),
    }


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def in_conf(key: str, name: str, value: str | None = None) -> str:
    """The text of a file in conf/, where compose sees every edit of it; `value` is what names it."""
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


def write_all(files: dict[Path, str]) -> None:
    for path, text in files.items():
        write(path, text)


def write(path: Path, text: str) -> None:
    """An unchanged file is left alone."""
    if path.exists() and not path.is_symlink() and path.read_text(encoding="utf-8") == text:
        return
    write_whole(path, text)


def write_schemas() -> None:
    for group in GROUPS:
        write(SCHEMAS / f"{group}.json", json.dumps(group_schema(group), indent=2) + "\n")
    log.info("%d JSON Schemas written to %s", len(GROUPS), SCHEMAS)


def parse_options() -> argparse.Namespace:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=description)
    ways = parser.add_mutually_exclusive_group()
    for name, text in {
        "--check": "show what would change, change nothing",
        "--print": "print the composed values as JSON",
        "--reset": "empty conf/overrides.yaml first",
        "--force": "keep conf/, drop edits of params.yaml",
        "--keep": "keep params.yaml, record its values as overrides",
        "--update-revisions": "pin branches on the Hub and folders to their current content",
        "--schema": "write the JSON Schemas for editors",
    }.items():
        ways.add_argument(name, action="store_true", help=text)
    parser.add_argument(
        "--files",
        type=Path,
        help="with --print: write the files named in the values to this folder",
    )
    parser.add_argument(
        "--stage",
        metavar="NAME",
        help="with --print: check that this machine can run NAME",
    )
    parser.add_argument("overrides", nargs="*", help="with --print: Hydra overrides, lora.r=8")
    parser.add_argument("-m", "--multirun", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.multirun:
        raise CapasError(sweep_instead(options.overrides))
    if options.overrides and not options.print:
        parser.error("overrides go with --print; to run with a value: dvc exp run -S lora.r=8")
    return options


if __name__ == "__main__":
    logging.basicConfig(format="compose: %(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    with told("compose"):
        main(parse_options())
