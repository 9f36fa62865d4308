"""Where a model comes from: the embedded base, a local folder, or a commit on the Hugging Face Hub."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from capas import embedded
from capas.errors import CapasError


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


def snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder, in the Hub's own cache, with the files of one commit that match `patterns`.

    Raises:
        CapasError: no commit is named; it is not found, gated or out of reach.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise CapasError(
            f"model.revision={revision}: name the commit of {name} (40 hex digits, on its page under 'Files "
            "and versions'); a branch moves, and the same configuration would mean another model tomorrow"
        )
    from huggingface_hub import snapshot_download

    with _reached(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def file_names(name: str, revision: str | None) -> list[str]:
    """All files of that commit on the Hub, those that were not downloaded included.

    Raises:
        CapasError: as `snapshot`.
    """
    from huggingface_hub import list_repo_files

    with _reached(name, revision):
        return list_repo_files(name, revision=revision)


@contextmanager
def _reached(name: str, revision: str | None) -> Iterator[None]:
    from httpx import HTTPError
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except (HTTPError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled) as error:
        raise CapasError(
            f"{name} at {revision} could not be downloaded: {error}\nA gated model needs `hf auth login`; "
            "without a network use model=embedded, or a folder that somebody downloaded before."
        ) from None
