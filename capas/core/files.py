"""Facts of a stage as files: JSON for metrics, CSV for curves; the same facts are the same bytes."""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CapasError: the file is missing, damaged, or holds something else.
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
    """Indented, in the order given, floats rounded to 6 significant digits."""
    text = json.dumps(rounded(facts), indent=2, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def write_whole(file: Path, text: str) -> None:
    """Who reads it meanwhile, and who comes after a kill, finds the old text or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def write_csv(file: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Those columns of the rows; a value that a row lacks is left empty."""
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rounded(rows))


def rounded(value: Any) -> Any:
    """`value` with every float in it rounded to 6 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
