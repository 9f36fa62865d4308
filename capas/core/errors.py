"""Define the errors that a user can act on, and print their messages without a traceback or secrets."""

import errno
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

EXIT_PAUSED = 75  # EX_TEMPFAIL of sysexits.h
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
# Messages of safetensors and torch.save when the disk is full; neither raises an OSError.
_FULL_DISK = ("No space left on device", "PytorchStreamWriter failed writing", ". unexpected pos ")


_SECRETS = (
    # https://TOKEN@host, postgresql://user:password@host; a password may contain an unquoted /
    (
        re.compile(
            r"(?<=://)(?:[^/\s'\"<>]+@|[^/:@\s'\"<>]+:(?!\d+(?:/|$))[^@\s'\"<>]+@(?:[^/\s'\"<>]*@)?)"
        ),
        "***@",
    ),
    # ?token=..., &X-Amz-Signature=..., &sig=..., &api_key=...
    (
        re.compile(
            r"(?i)([?&;](?:[\w-]*[-_.])?(?:token|sig|signature|secret|passw(?:or)?d|pwd|credential|key"
            r"|(?:aws)?(?:access|api|account)key(?:id)?)=)[^&\s'\"#<>]+"
        ),
        r"\1***",
    ),
    # tokens of the Hub, GitHub, GitLab and Amazon, by their form
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|AKIA[0-9A-Z]{16}\b)"
        ),
        "***",
    ),
)


def without_secrets(text: str) -> str:
    """Return the text with *** for passwords and tokens in URLs, and for tokens of a known form."""
    for pattern, hidden in _SECRETS:
        text = pattern.sub(hidden, text)
    return text


class _HideSecrets(logging.Filter):
    """A log filter that hides passwords and tokens in every line of capas."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if (shown := without_secrets(message)) != message:
            record.msg, record.args = shown, ()
        return True


logging.getLogger("capas").addFilter(_HideSecrets())


class CapasError(Exception):
    """An error that the user must fix, of input or state; the message says what, where and how."""


class Paused(CapasError):  # noqa: N818  it reports no error
    """The end of a stage that was asked to pause: nothing is wrong, and the same command goes on later."""


def sweep_instead(overrides: list[str]) -> str:
    """Return the message for a stage that is called with a sweep's options; these are left out of it."""
    given = " ".join(word for word in overrides if not word.startswith("-"))
    return (
        "a stage script runs one configuration. To run several, use a sweep: python "
        f"stages/sweep.py -m {given or 'trainer.learning_rate=1e-3,4e-3'}"
    )


@contextmanager
def exit_on_user_error(name: str) -> Iterator[None]:
    """End the script with exit code 1 and one message if the user or the machine's disk caused the error.

    A pause ends it with EXIT_PAUSED. Any other exception is a defect of the program and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(
            f"{name}: stopped. `dvc repro` runs it again; a training goes on from its last checkpoint."
        )
    except Paused as pause:
        sys.stderr.write(f"{name}: {pause}\n")
        sys.exit(EXIT_PAUSED)
    except CapasError as error:
        sys.exit(f"{name}: {without_secrets(str(error))}")
    except Exception as error:
        reason = reason_of(error)
        if reason is None:
            raise
        sys.exit(
            f"{name}: {without_secrets(reason)}. Nothing was recorded. Fix this and run `dvc repro` "
            "again."
        )


def reason_of(error: Exception) -> str | None:
    """Return the reason of an error if it is a full disk or a missing permission, else None."""
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    if any(sign in str(error) for sign in _FULL_DISK):
        return f"No space left on device ({error})"
    return None


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the first `most` names as text, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
