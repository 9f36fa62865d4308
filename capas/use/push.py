"""Push the model of a run to the Hugging Face Hub, with a model card.

    capas push OWNER/NAME                      the adapter of the workspace's result, as published;
                                               the whole model, if all weights were trained
    capas push OWNER/NAME --run RUN            another run: run id or its beginning, name, DVC experiment
    capas push OWNER/NAME --merged FOLDER      the merged model of `capas merge` instead of the adapter

The repository is created if it does not exist. A push is one commit; pushing the same model again adds none.
The commit also deletes the weights and configuration of a previous model; your own files stay. The card
lists base, data, licences, chat template, scores with intervals, and how to load and rebuild the model. A
small base that is not on the Hub is pushed with the adapter, in the folder `base`. Log in once:
`hf auth login`, or set HF_TOKEN.

Exit code: 0 pushed, 1 refused (all reasons are printed), 2 failed, 130 stopped.
"""

import argparse
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.models import tuned_weights
from capas.tracking import runs
from capas.tracking.client import reachable
from capas.tracking.lineage import ADAPTER
from capas.tracking.registry import RefusedError, admit
from capas.tracking.store import MODEL, existing, tracking_uri
from capas.use import card
from capas.use.tuned_model import SERVED

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# The files of a model: left over from another one, transformers or PEFT would load them, or mix both.
_OF_MODEL = re.compile(
    r"base/.+|[\w.-]+\.(safetensors|safetensors\.index\.json|py)|"
    r"(adapter_config|config|generation_config|merge)\.json"
)
_STATUS = {
    401: (
        "you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token with "
        "write access"
    ),
    403: "your token has no write access there: create one that has, or choose another OWNER",
    404: "no such repository, or your token has no access to it",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="OWNER/NAME", help="repository on the Hub")
    parser.add_argument(
        "--run", metavar="RUN", help="push a run of MLflow instead of the workspace's result"
    )
    parser.add_argument(
        "--merged",
        type=Path,
        metavar="FOLDER",
        help="push the merged model in FOLDER (capas merge)",
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--branch", default="main", help="branch to push to (default: main)")
    parser.add_argument("--force", action="store_true", help="push even if the gate failed")


def command(options: argparse.Namespace) -> int:
    """Return the exit code: 0, or 1 if the run is refused.

    Raises:
        CapasError: the name is not OWNER/NAME, there is no such run, or the Hub refuses the push.
    """
    if not _NAME.fullmatch(options.name):
        raise CapasError(f"{options.name!r} is not a repository name: expected OWNER/NAME")
    root, word = Path.cwd(), options.run or own_training(Path.cwd())
    client = existing(root)
    with TemporaryDirectory(prefix="capas-") as temporary:
        with reachable(tracking_uri(root)):
            run = runs.find(client, word, root)
            try:
                admit(client, run, options.force)
            except RefusedError as error:
                sys.stderr.write(error.message(f"{run.name} is not pushed"))
                return 1
            client.download_artifacts(run.id, MODEL, temporary)
        data = Path(temporary, SERVED)
        whole = not tuned_weights.is_adapter(data / "adapter")
        if whole and options.merged:
            raise CapasError(
                "the run's model is a whole model, there is nothing to merge. Omit --merged"
            )
        files = of_tuned(data) if options.merged is None else of_merged(options.merged, run)
        text = (data / "adapter/README.md").read_text(encoding="utf-8")
        facts = read_json(options.merged / "merge.json") if options.merged else None
        base = read_json(data / "served.json")["base"]
        shown = card.for_hub(text, options.name, base, facts, whole)
        url = send(options.name, files, shown, run, options.private, options.branch)
    sys.stdout.write(f"{url}\n")
    return 0


def own_training(root: Path) -> str:
    """Return the key of the training in the workspace.

    Raises:
        CapasError: this is not the repository's top folder, or nothing was trained.
    """
    if not (root / "dvc.yaml").exists():
        raise CapasError(f"{root} has no dvc.yaml; start it in the repository's top folder")
    if not (root / "reports/train.json").exists():
        raise CapasError(
            "no trained model in this workspace. Run `dvc repro`, or choose a run with --run"
        )
    return str(read_json(root / "reports/train.json")["train_key"])


def of_tuned(data: Path) -> dict[str, Path]:
    """Return {path in the repository: file}, with the adapter's base if that was packed."""
    adapter = {file.name: file for file in (data / "adapter").iterdir() if file.name != "README.md"}
    if not tuned_weights.is_adapter(data / "adapter"):
        return adapter
    base = {f"base/{file.name}": file for file in (data / "base").glob("*")}
    return adapter | base


def of_merged(folder: Path, run: Any) -> dict[str, Path]:
    """Return {path in the repository: file} of a merged model.

    Raises:
        CapasError: the folder is not from `capas merge`, or was merged from another adapter than the run's.
    """
    merged, own = read_json(folder / "merge.json")["adapter_sha256"], run.tags.get(ADAPTER)
    if merged != own:
        raise CapasError(
            f"{folder} was merged from the adapter {merged[:12]}..., and run {run.name} "
            f"has {str(own)[:12]}.... Choose its run with --run, or merge again"
        )
    own = ("README.md", ".gitignore")
    return {file.name: file for file in folder.iterdir() if file.name not in own}


def send(
    name: str, files: dict[str, Path], shown: str, run: Any, private: bool, branch: str
) -> str:
    """Push one commit, which also removes files of an earlier model, and return its address.

    Raises:
        CapasError: the Hub refuses it or cannot be reached.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    sent = [CommitOperationAdd(path, str(file)) for path, file in sorted(files.items())]
    sent.append(CommitOperationAdd("README.md", shown.encode()))
    message = f"capas: run {run.name}"
    try:
        api = HfApi()
        api.create_repo(name, private=private or None, exist_ok=True)
        if branch != "main":
            api.create_branch(name, branch=branch, exist_ok=True)
        there = api.list_repo_files(name, revision=branch)
        stale = [p for p in sorted(there) if _OF_MODEL.fullmatch(p) and p not in files]
        operations = [*sent, *(CommitOperationDelete(path) for path in stale)]
        done = api.create_commit(name, operations, commit_message=message, revision=branch)
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = _STATUS.get(status, f"the Hub answers {status}: {error}")
        raise CapasError(f"{name} is not pushed: {reason}") from None
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        raise CapasError(f"{name} is not pushed, the Hub cannot be reached: {error}") from None
    except ValueError as error:  # raised by the client if the Hub rejects the card
        raise CapasError(f"{name} is not pushed: {error}") from None
    return str(done.commit_url)
