"""Read a repository on the Hugging Face Hub: its commits and files, with errors explained in words.

`huggingface_hub` does the work: HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE have their usual meaning,
and none of them is stored. This module adds two things: it retries if the first request of a listing is
answered with 429 or 5xx, and it compares the contents of downloaded files, not only their sizes. A cut
connection resumes in steps of 10 MiB; if the process is killed, complete files are kept.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal, TypeVar

from capas.core.errors import CapasError

log = logging.getLogger("capas")
COMMIT = re.compile(r"[0-9a-f]{40}")
WAITS_SECONDS = (1.0, 5.0, 20.0)  # before each retry, if the Hub does not say how long to wait
LONGEST_WAIT_SECONDS = 300.0  # the Hub counts requests in windows of five minutes
_ASK_AGAIN = (429, 500, 502, 503, 504)
_GIT_BLOB, _LFS_OBJECT = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")

Answer = TypeVar("Answer")


def is_commit(revision: str | None) -> bool:
    return COMMIT.fullmatch(revision or "") is not None


@dataclass(frozen=True)
class Repository:
    """A model or data set on the Hub.

    Args:
        key: the dotted configuration key that names it; messages begin with it.
    """

    kind: Literal["model", "dataset"]
    name: str
    key: str

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{'datasets/' * (self.kind == 'dataset')}{self.name}"

    def commit(self, revision: str) -> str:
        """Return the commit, 40 hex digits, that a branch or tag points to now; always asks the Hub.

        Raises:
            CapasError: it was not found, is gated, or cannot be reached.
        """
        from huggingface_hub import HfApi

        def ask() -> Any:
            return HfApi().repo_info(self.name, repo_type=self.kind, revision=revision)

        return str(self._with_retries(revision, ask).sha)

    def file_names(self, commit: str) -> list[str]:
        """Return all file names of a commit, whether downloaded or not.

        Raises:
            CapasError: see `commit`.
        """
        from huggingface_hub import list_repo_files

        return self._with_retries(
            commit, lambda: list_repo_files(self.name, repo_type=self.kind, revision=commit)
        )

    def download(self, commit: str, patterns: Sequence[str]) -> Path:
        """Return the folder, in the Hub's own cache, with the files of a commit that match `patterns`.

        It works offline if all of them were downloaded before.

        Raises:
            CapasError: see `commit`; or the content of a file does not match its hash on the Hub.
        """
        from huggingface_hub import snapshot_download

        folder = Path(
            self._with_retries(
                commit,
                lambda: snapshot_download(
                    self.name, repo_type=self.kind, revision=commit, allow_patterns=list(patterns)
                ),
            )
        )
        self._check_content(folder, patterns)
        return folder

    def _check_content(self, folder: Path, patterns: Sequence[str]) -> None:
        """Check that the content of each file matches the hash that names it in the cache.

        A file in the cache is a link to a file that is named by its hash. That file may itself be a link into
        a store with other names. A mirror may use other names, and a file system without links has none.
        Such files are not checked.
        """
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            if not file.is_symlink() or not any(fnmatch(name, pattern) for pattern in patterns):
                continue
            blob = file.parent / file.readlink()
            if _is_damaged(blob):
                raise CapasError(
                    f"{self.key}={self.name}: {name} is damaged: its content does not match the "
                    f"hash on the Hub. Delete it and run again: rm {file.resolve()}"
                )

    def _with_retries(self, revision: str, ask: Callable[[], Answer]) -> Answer:
        """Return the answer of `ask`; retry while the Hub is busy, and explain its errors in words."""
        waits = iter(WAITS_SECONDS)
        while True:
            try:
                return ask()
            except _refusals() as error:
                seconds = next(waits, None) if _status(error) in _ASK_AGAIN else None
                if seconds is None:
                    raise CapasError(self._in_words(revision, error)) from None
                _wait(error, seconds)
            except OSError as error:  # disk errors pass; this one has no class or errno of its own
                if "Consistency check failed" not in str(error):
                    raise
                raise CapasError(self._in_words(revision, error)) from None

    def _in_words(self, revision: str, error: Exception) -> str:
        reason, way_out = self._diagnose(revision, error)
        return f"{self.key}={self.name} at {revision} could not be downloaded: {reason}\n{way_out}"

    def _diagnose(self, revision: str, error: Exception) -> tuple[str, str]:
        """Return the reason for an error, and what to do about it."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        log_in = "log in with `hf auth login`, or set HF_TOKEN"
        if isinstance(error, GatedRepoError):
            return (
                f"it is gated, and {_who(error)}",
                f"Accept its conditions on {self.page}; {log_in}.",
            )
        if isinstance(error, RevisionNotFoundError):
            return (
                f"it has no commit, branch or tag {revision}",
                f"Its revisions are listed on {self.page}, under 'Files and versions'.",
            )
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"the Hub has no {self.kind} of that name, or it is private",
                f"Check the name ({self.page}); for a private one, {log_in}. (If you meant a "
                "folder: no folder of that name exists here.)",
            )
        if isinstance(error, HfHubHTTPError) and _status(error) == 401:
            return "the Hub does not accept your token", f"Make a new one and {log_in}."
        if isinstance(error, JSONDecodeError):
            return (
                "the server that answered is not a Hub",
                "Check HF_ENDPOINT; a proxy may require a login.",
            )
        return str(error), (
            f"Without a network, use a {self.kind} downloaded before, or {self.kind}=embedded"
            + (", or a downloaded folder." if self.kind == "model" else ".")
        )


def _refusals() -> tuple[type[Exception], ...]:
    """Return the errors that the client raises if the Hub, the network or the name is at fault."""
    from httpx import HTTPError
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        OfflineModeIsEnabled,
    )

    return HTTPError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, JSONDecodeError


def _wait(error: Any, seconds: float) -> None:
    seconds = min(_requested_wait(error) or seconds, LONGEST_WAIT_SECONDS)
    log.info("the Hub is busy (HTTP %s): retrying in %.0f s", _status(error), seconds)
    time.sleep(seconds)


def _status(error: Any) -> int:
    """Return the HTTP status of an error, or 0 if there was no answer."""
    return error.response.status_code if getattr(error, "response", None) is not None else 0


def _who(error: Any) -> str:
    return (
        "nobody is logged in" if _status(error) == 401 else "your account does not have access yet"
    )


def _requested_wait(error: Any) -> float | None:
    """Return the seconds to wait, from the headers `Retry-After` or `RateLimit` of an answer."""
    from huggingface_hub.utils import parse_ratelimit_headers

    text = error.response.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    limit = parse_ratelimit_headers(error.response.headers)
    return limit.reset_in_seconds + 1.0 if limit and limit.remaining == 0 else None


def _is_damaged(blob: Path) -> bool:
    if _LFS_OBJECT.fullmatch(blob.name):
        return _file_digest(hashlib.sha256(), blob) != blob.name
    if _GIT_BLOB.fullmatch(blob.name):
        header = b"blob %d\0" % blob.stat().st_size
        of_git = _file_digest(hashlib.sha1(header, usedforsecurity=False), blob)
        return blob.name not in (of_git, _file_digest(hashlib.sha1(usedforsecurity=False), blob))
    return False


def _file_digest(digest: Any, file: Path) -> str:
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return str(digest.hexdigest())
