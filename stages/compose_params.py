"""Compose conf/ into params.yaml, the only configuration that stages read, and validate every value.

Reads   conf/, requirements.lock, the code of all stages; data/own, for functions of evaluation.metrics and
        tasks of evaluation.harness; params.yaml, for values that were set outside conf/
Writes  params.yaml, code.yaml, environment.yaml, data/composed/; conf/overrides.yaml if values were set
        outside conf/, conf/revisions.yaml if a branch on the Hub, or a folder, is used for the first time

`dvc repro` runs it after every edit of conf/. By hand:

    python stages/compose_params.py --check          show what would change; changes nothing
    python stages/compose_params.py --print lora.r=8 the values with Hydra overrides, as JSON
    python stages/compose_params.py --reset          empty conf/overrides.yaml first
    python stages/compose_params.py --force          conf/ is right: drop edits of params.yaml
    python stages/compose_params.py --keep           params.yaml is right: record it as overrides
    python stages/compose_params.py --update-revisions   pin branches and folders to their current content

A leaf before and after: `trainer: {seed: ${seed}}` in conf/trainer/_base.yaml, `trainer: {seed: 0}` here.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile

from capas.config.adoption import adopt, came_from_outside
from capas.config.advice import advice
from capas.config.auto_metrics import chosen, with_metrics
from capas.config.composition import (
    CONF,
    NOTHING_OVERRIDDEN,
    OVERRIDES,
    PARAMS,
    Values,
    composer,
    dump,
    read,
    word_given,
)  # fmt: skip
from capas.config.environment import ENVIRONMENT, LOCK, environment
from capas.config.hydra_overrides import check
from capas.config.json_schema import group_schema
from capas.config.kept_overrides import difference, in_force
from capas.config.label_check import check_answers
from capas.config.pins import REVISIONS, Pins
from capas.config.problems import refused
from capas.config.requirements import read_by
from capas.config.resolved_files import resolved_files
from capas.config.schema import GROUPS
from capas.config.validation import validate
from capas.core import code_digests
from capas.core.dag import StageSpec, md5
from capas.core.errors import CapasError, exit_on_user_error, sweep_instead
from capas.core.files import file_sha256, write_whole
from capas.core.progress import heartbeat
from capas.hub import embedded
from capas.workspace import unfinished

log = logging.getLogger("capas")
SCHEMAS = Path(".vscode/schema")
COST = "CAPAS_COST"  # off: no cost is estimated. No result depends on it
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
    check_answers(target)
    target = pins.resolve(target)
    outputs = {REVISIONS: pins.dump()} if pins.changed else {}
    files = resolved_files(target)
    outputs |= {PARAMS: dump(target), ENVIRONMENT: environment(), **files}
    if digests := code_digests.digests(Path()):
        code_digests.check_declared(StageSpec.read_all(Path()).values(), digests)
        outputs[Path(code_digests.CODE)] = code_digests.dump(digests)
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
    """Check that no experiment was killed here, because its values would be taken for the user's.

    Raises:
        CapasError: one was killed.
    """
    left = None if "DVC_EXP_NAME" in os.environ else unfinished.killed(Path())
    if left:
        raise CapasError(
            f"`{left.command}` was killed, and its values are still in params.yaml and conf/.\n"
            "To restore the workspace: capas restore   (checkpoints are kept: the same command "
            "resumes)\nTo keep its values: capas restore --keep"
        )


def is_costly(old: Values, new: Values) -> bool:
    """Return whether to estimate the cost of a run: not for the embedded base, nor if nothing has changed."""
    if new["model"]["model_name_or_path"] == embedded.FOLDER or "DVC_EXP_NAME" in os.environ:
        return False
    if os.environ.get(COST) == "off":
        return False
    return any(old.get(group) != new[group] for group in COSTLY)


def tell_cost() -> None:
    """Log download, disk, memory and minutes of the stages; a failed estimate stops nothing."""
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
    """Return digests of the files that compose reads and DVC hashes afterwards, except its own outputs."""
    own = (OVERRIDES, REVISIONS)
    files = [path for path in CONF.rglob("*") if path.is_file() and path not in own]
    files += [path for path in (PARAMS, LOCK) if path.exists()]
    its_code = {folder: md5(Path(folder)) for folder in (code_digests.PACKAGE, code_digests.STAGES)}
    return {str(path): file_sha256(path) for path in files} | its_code


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


def write_all(files: dict[Path, str]) -> None:
    for path, text in files.items():
        write(path, text)


def write(path: Path, text: str) -> None:
    """Write a file, unless it has this text already."""
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
    with exit_on_user_error("compose"):
        main(parse_options())
