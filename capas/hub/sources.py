"""Find the source of a model or an adapter: the embedded base, a local folder, or a commit on the Hub."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

from capas.core.errors import CapasError
from capas.core.files import file_sha256
from capas.hub import embedded
from capas.hub.repository import Repository, is_commit

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
MODEL_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
)
CODE_FILES = ("*.py",)  # downloaded too if model.trust_remote_code allows it
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MADE_HERE = "data/models"


@dataclass(frozen=True)
class Kind:
    """A kind of source, and the dotted configuration keys that name it and pin it."""

    called: str
    key: str
    revision: str


MODEL = Kind("model", "model.model_name_or_path", "model.revision")
ADAPTER = Kind("adapter", "lora.adapter_name_or_path", "lora.adapter_revision")


class Source(Enum):
    EMBEDDED = "embedded"
    FOLDER = "folder"
    HUB = "hub"


def find_source(name: str, root: Path, kind: Kind = MODEL) -> Source:
    """Return the kind of source that a name means; folders are relative to `root`, the repository.

    Raises:
        CapasError: it is neither a folder nor a model id on the Hub, or it is an adapter that the pipeline
            itself writes, which the training would overwrite.
    """
    if name == embedded.FOLDER and kind is MODEL:
        return Source.EMBEDDED
    if kind is ADAPTER and (root / name).resolve().is_relative_to((root / _MADE_HERE).resolve()):
        raise CapasError(
            f"{kind.key}={name}: the pipeline overwrites {_MADE_HERE}, so the next training would "
            f"start from its own result. Copy the adapter first: cp -rL {name} FOLDER, and set "
            f"{kind.key}=FOLDER"
        )
    if (root / name).is_dir():
        return Source.FOLDER
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        return Source.HUB
    raise CapasError(
        f"{kind.key}={name} is neither a folder here nor the id of {_a(kind)} on the Hub (owner/name)"
    )


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def check_folder(
    folder: Path, name: str, revision: str | None, part: Literal["tokenizer", "model", "adapter"]
) -> None:
    """Compare the content of a local folder with its pinned revision, because DVC does not see edits in it.

    Args:
        revision: the result of `folder_revision` or `adapter_revision`.
        part: the part that the stage reads; a mask, for example, needs no weights.

    Raises:
        CapasError: no revision is given, or it does not match; the message names the one that does.
    """
    kind = ADAPTER if part == "adapter" else MODEL
    index, patterns = (0, ADAPTER_FILES) if kind is ADAPTER else _PARTS[part]
    given = (revision or "").split("-")
    if given[index:][:1] != [_digest(matching(folder, patterns))]:
        now = adapter_revision(folder) if kind is ADAPTER else folder_revision(folder)
        raise CapasError(
            f"{kind.revision}={revision or 'null'}: {name} is a folder, and its content does not "
            "match the pinned revision. To use the current content: python "
            "stages/compose_params.py --update-revisions; if conf/ sets the revision, change it "
            f"there, {kind.revision.rpartition('.')[2]}: {now}"
        )


def folder_revision(folder: Path) -> str:
    """Return a digest of a model's folder: 16 hex digits for its tokenizer, 16 for the model."""
    return "-".join(_digest(matching(folder, patterns)) for _, patterns in _PARTS.values())


def adapter_revision(folder: Path) -> str:
    """Return a digest of an adapter's folder: 16 hex digits."""
    return _digest(matching(folder, ADAPTER_FILES))


_PARTS = {"tokenizer": (0, TOKENIZER_FILES), "model": (1, (*MODEL_FILES, *CODE_FILES))}


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()[:16]


def snapshot(name: str, revision: str | None, patterns: Sequence[str], kind: Kind = MODEL) -> Path:
    """Return the folder, in the Hub's own cache, with the files of one commit that match `patterns`.

    Raises:
        CapasError: no commit is named; it was not found, is gated or cannot be reached; a file is damaged.
    """
    return on_hub(name, kind).download(_commit(name, revision, kind), patterns)


def file_names(name: str, revision: str | None, kind: Kind = MODEL) -> list[str]:
    """Return all file names of a commit on the Hub, whether downloaded or not.

    Raises:
        CapasError: no commit is named, or it was not found, is gated or cannot be reached.
    """
    return on_hub(name, kind).file_names(_commit(name, revision, kind))


def on_hub(name: str, kind: Kind = MODEL) -> Repository:
    return Repository("model", name, kind.key)


def _a(kind: Kind) -> str:
    return f"an {kind.called}" if kind is ADAPTER else f"a {kind.called}"


def _commit(name: str, revision: str | None, kind: Kind) -> str:
    if revision is None or not is_commit(revision):
        raise CapasError(
            f"{kind.revision}={revision or 'null'} is not a commit of {name}; a branch can move, "
            f"and the same configuration would then use another {kind.called}. `dvc repro compose` "
            "resolves it once and pins it in conf/revisions.yaml. (If you meant a folder: no "
            f"folder {name} exists here.)"
        )
    return revision
