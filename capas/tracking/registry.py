"""Register the model of an MLflow run, if it passed its gate.

    capas register RUN [--name NAME] [--alias ALIAS] [--force]

RUN is a run id or its beginning, a run name, or a DVC experiment. Load the new version with
mlflow.pyfunc.load_model("models:/NAME@ALIAS"). Registering a run again does not add a version.

Exit code: 0 registered, 1 refused (all reasons are printed), 2 failed (e.g. no such run), 130 stopped.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from capas.core.errors import CapasError
from capas.tracking import runs
from capas.tracking.client import reachable
from capas.tracking.pages import Pages
from capas.tracking.store import GATE, MODEL, TRAIN_KEY, existing, locked, tracking_uri

FORCED = "forced"
_COPIED = (TRAIN_KEY, GATE, "mlflow.source.git.commit")  # tags copied from run to version
_NO_NAME = re.compile(r"[/:'\"]")  # MLflow forbids the first two, and quotes break its queries
_ALIAS = re.compile(r"[A-Za-z0-9_-]+")
_RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)


class Registered(NamedTuple):
    """A version in the registry, and what this call changed."""

    name: str
    version: str
    alias: str
    created: bool
    moved_from: str | None  # the version that had the alias
    experiment_id: str
    run_id: str


class RefusedError(Exception):
    """The run's model must not be registered or pushed; the message has one reason per line."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = reasons

    def message(self, what: str) -> str:
        """Return a message that `what` is not done, with one reason per line."""
        return f"capas: {what}:\n" + "".join(f"  {reason}\n" for reason in self.reasons)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="run id or its beginning, run name, or DVC experiment"
    )
    parser.add_argument(
        "--name", help="name of the registered model (default: EXPERIMENT-MODEL_PRESET)"
    )
    parser.add_argument(
        "--alias", default="champion", help="alias of the new version (default: champion)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="register even if the gate failed; the version is tagged",
    )


def command(options: argparse.Namespace) -> int:
    """Return the exit code: 0, or 1 if the run is refused."""
    root = Path.cwd()
    try:
        done = register(root, options.run, options.name, options.alias, options.force)
    except RefusedError as error:
        sys.stderr.write(error.message(f"{options.run} is not registered"))
        return 1
    how = "registered" if done.created else "was already registered"
    moved = f", which was version {done.moved_from}" if done.moved_from else ""
    pages = Pages(tracking_uri(root), done.experiment_id)
    sys.stdout.write(
        f"{done.name} version {done.version} {how}; alias {done.alias}{moved}\n"
        f'mlflow.pyfunc.load_model("models:/{done.name}@{done.alias}")\n'
        f"its run: {pages.run(done.run_id)}{pages.hint()}\n"
    )
    return 0


def register(root: Path, wanted: str, name: str | None, alias: str, force: bool) -> Registered:
    """Make a version of the run's model and give it the alias; existing versions are left as they are.

    Raises:
        RefusedError: the run is not finished, has no model, or did not pass its gate.
        CapasError: no such run, or several; a name or alias that MLflow does not accept.
    """
    check_alias(alias)
    client = existing(root)
    with locked(root, "registry", seconds=60), reachable(tracking_uri(root)):
        run = runs.find(client, wanted, root)
        name = check_name(name or default_name(client, run))
        forced = admit(client, run, force)
        version, created = find_or_create(client, name, run)
        tags = {key: run.tags[key] for key in _COPIED if key in run.tags}
        send_tags(client, version, tags | ({FORCED: forced} if forced else {}))
        moved_from = move_alias(client, name, alias, version.version)
    done = name, str(version.version), alias, created, moved_from
    return Registered(*done, run.experiment_id, run.id)


def admit(client: Any, run: Any, force: bool) -> str | None:
    """Return the verdict that `force` overrode, or None if the gate passed.

    Raises:
        RefusedError: the run is refused; it has all reasons.
    """
    reasons = []
    if run.status != "FINISHED":
        reasons.append(f"the run is {run.status}: finish it with `dvc repro`")
    files = {file.path for file in client.list_artifacts(run.id, MODEL)}
    if f"{MODEL}/MLmodel" not in files:
        reasons.append(
            f"the run has no model (artifact {MODEL}/MLmodel): publish it with `dvc repro -s -f "
            "publish`"
        )
    found: str | None = run.tags.get(GATE)
    verdict = (
        f"gate {found}"
        if found
        else f"the run has no tag '{GATE}': publish it with `dvc repro -s -f publish`"
    )
    passed = found == "passed"
    if not passed and not force:
        reasons.append(f"{verdict} (to override: --force)")
    if reasons:
        raise RefusedError(reasons)
    return None if passed else verdict


def default_name(client: Any, run: Any) -> str:
    preset = run.params.get("model.preset")
    if preset is None:
        raise CapasError(
            f"run {run.id} has no param 'model.preset' to derive the name from. Set --name"
        )
    experiment = client.get_experiment(run.experiment_id).name
    return _NO_NAME.sub("-", f"{experiment}-{preset}")


def check_name(name: str) -> str:
    if _NO_NAME.search(name) or not name.strip():
        raise CapasError(f"--name {name!r}: expected a name without /, : or quotes")
    return name


def check_alias(alias: str) -> None:
    if not _ALIAS.fullmatch(alias) or _RESERVED.fullmatch(alias):
        raise CapasError(
            f"--alias {alias!r}: expected letters, digits, - and _, but not 'latest' or v1, v2, ..."
        )


def find_or_create(client: Any, name: str, run: Any) -> tuple[Any, bool]:
    """Return the version of this run, and whether it is new."""
    names = [found.name for found in client.search_registered_models(f"name='{name}'")]
    if name not in names:
        client.create_registered_model(name)
    query = f"name='{name}' and run_id='{run.id}'"
    for version in client.search_model_versions(query):
        if version.status == "READY":
            return version, False
    source = f"{run.artifact_uri}/{MODEL}"
    return client.create_model_version(name, source, run.id), True


def send_tags(client: Any, version: Any, tags: dict[str, str]) -> None:
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)


def move_alias(client: Any, name: str, alias: str, version: str) -> str | None:
    """Move the alias, and return the version that had it, if that was another one."""
    before = client.get_registered_model(name).aliases.get(alias)
    if str(before) == str(version):
        return None
    client.set_registered_model_alias(name, alias, version)
    return None if before is None else str(before)
