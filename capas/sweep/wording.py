"""Say things about a sweep in the user's language, from the texts of this folder."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from capas.core.language import Language

TEXTS = Path(__file__).parent
LANGUAGES = ("en", "es")


@lru_cache
def language(code: str) -> Language:
    """Return the texts of a language, read once."""
    return Language(TEXTS, code, {})


def say(code: str, key: str, **facts: Any) -> str:
    """Return the text under a dotted key as plain text, for a terminal or to be escaped again."""
    return language(code).say(key, **facts).unescape()


def rounded(value: float, digits: int = 3) -> float:
    """Return a number with so many significant digits, for a sentence."""
    return float(f"{value:.{digits}g}")
