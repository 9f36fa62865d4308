"""Define a problem of the configuration, and the error that lists several."""

from collections.abc import Iterable
from dataclasses import dataclass

from capas.core.errors import CapasError, without_secrets


@dataclass(frozen=True)
class Problem:
    """A problem with a value; `value` is empty if the key itself is wrong.

    `message` is the whole sentence, with key, value and advice.
    """

    key: str
    value: str
    message: str

    def __str__(self) -> str:
        return self.message


def refused(problems: Iterable[Problem], nothing: str = "no stage was run") -> CapasError:
    """Return the problems as one error, each once.

    Args:
        nothing: says what did not happen because of them.
    """
    messages = list(dict.fromkeys(problem.message for problem in problems))
    lines = without_secrets("\n".join(f"  {message}" for message in messages))
    noun = "problem" if len(messages) == 1 else "problems"
    return CapasError(f"{len(messages)} {noun} in the configuration; {nothing}:\n{lines}")
