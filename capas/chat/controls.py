"""Find control tokens in a text."""

import re
from collections.abc import Iterator, Mapping

from tokenizers import AddedToken


class Controls:
    """The control tokens of a chat format, by their text."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        self._tokens, self.pattern = tokens, control_pattern(tokens)

    def find(self, text: str) -> Iterator[tuple[re.Match[str], str]]:
        """Yield the control tokens in a text, with the whitespace that they strip, and their names."""
        for found in self.pattern.finditer(text):
            is_bare = found.group() in self._tokens
            yield found, found.group() if is_bare else found.group().strip()

    def names(self, text: str) -> list[str]:
        return [name for _, name in self.find(text)]


def control_pattern(controls: Mapping[str, AddedToken]) -> re.Pattern[str]:
    """Return a pattern that finds control tokens, the longest first, with the whitespace that they strip."""
    longest_first = sorted(
        controls.values(), key=lambda token: (-len(token.content), token.content)
    )
    alternatives = [
        (r"\s*" if token.lstrip else "")
        + re.escape(token.content)
        + (r"\s*" if token.rstrip else "")
        for token in longest_first
    ]
    return re.compile("|".join(alternatives) or r"(?!)")
