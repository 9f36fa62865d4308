"""Where a model comes from: the embedded base, a local folder, or a commit on the Hugging Face Hub."""

import hashlib
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Literal

from capas import embedded
from capas.errors import CapasError
from capas.hub import Repository, is_commit

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
CODE_FILES = ("*.py",)  # taken along where model.trust_remote_code allows it


class Source(Enum):
    EMBEDDED = "embedded"
    FOLDER = "folder"
    HUB = "hub"


def find_source(name: str, root: Path) -> Source:
    """What `model.model_name_or_path` means; folders are relative to `root`, the repository.

    Raises:
        CapasError: it is neither a folder nor the id of a model on the Hub.
    """
    if name == embedded.FOLDER:
        return Source.EMBEDDED
    if (root / name).is_dir():
        return Source.FOLDER
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        return Source.HUB
    raise CapasError(
        f"model.model_name_or_path={name} is neither a folder here nor the id of a model on the Hub "
        "(owner/name)"
    )


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def check_folder(
    folder: Path, name: str, revision: str | None, part: Literal["tokenizer", "model"]
) -> None:
    """Compare a local folder with `model.revision`: DVC does not see an edit in it.

    Args:
        revision: of `folder_revision`. A stage checks its own part: a mask needs no weights.

    Raises:
        CapasError: no revision is given, or that of another content; with the one that fits.
    """
    index, patterns = _PARTS[part]
    given = (revision or "").split("-")
    if given[index:][:1] != [_digest(matching(folder, patterns))]:
        raise CapasError(
            f"model.revision={revision or 'null'}: {name} is a folder, whose files may change; the revision "
            "stands for what is in it. To use it as it is now: python stages/compose_params.py "
            "--update-revisions; where conf/ gives the revision itself, set it there, "
            f"revision: {folder_revision(folder)}"
        )


def folder_revision(folder: Path) -> str:
    """Stands for the content of a model's folder: 16 hex digits for its tokenizer, 16 for the model."""
    return "-".join(_digest(matching(folder, patterns)) for _, patterns in _PARTS.values())


_PARTS = {"tokenizer": (0, TOKENIZER_FILES), "model": (1, (*MODEL_FILES, *CODE_FILES))}


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(
                f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode()
            )
    return digest.hexdigest()[:16]


def snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder, in the Hub's own cache, with the files of one commit that match `patterns`.

    Raises:
        CapasError: no commit is named; it is not found, gated or out of reach; a file is damaged.
    """
    return on_hub(name).download(_commit(name, revision), patterns)


def file_names(name: str, revision: str | None) -> list[str]:
    """All files of that commit on the Hub, those that were not downloaded included.

    Raises:
        CapasError: as `snapshot`.
    """
    return on_hub(name).file_names(_commit(name, revision))


def on_hub(name: str) -> Repository:
    return Repository("model", name, "model.model_name_or_path")


def _commit(name: str, revision: str | None) -> str:
    if revision is None or not is_commit(revision):
        raise CapasError(
            f"model.revision={revision or 'null'} does not name the commit of {name}; a branch moves, and "
            "the same configuration would mean another model tomorrow. `dvc repro compose` asks the Hub once "
            f"and records it in conf/revisions.yaml. (If {name} is meant to be a folder: there is none of "
            "that name here.)"
        )
    return revision
