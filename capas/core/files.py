"""Read and write a stage's facts, JSON for metrics and CSV for curves; equal facts give equal bytes."""

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CapasError: the file is missing, damaged, or has no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CapasError(f"{file} is missing") from None
    except ValueError as error:
        raise CapasError(f"{file} is damaged: {error}. Restore it and try again") from None
    if not isinstance(content, dict):
        raise CapasError(f"{file} must hold an object, not {type(content).__name__}")
    return content


def write_json(file: Path, facts: Mapping[str, Any]) -> None:
    """Write facts as indented JSON, in their order, with floats rounded to 6 significant digits."""
    text = json.dumps(rounded(facts), indent=2, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def write_whole(file: Path, text: str) -> None:
    """Write a text atomically: a reader finds the old text or the new one, even after a kill."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(
        f".{file.name}.{os.getpid()}.partial"
    )  # another process may write it, too
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def write_csv(file: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write these columns of the rows as CSV; a value missing in a row is left empty."""
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rounded(rows))


def rounded(value: Any) -> Any:
    """Return `value` with every float in it rounded to 6 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
