"""Check the files of data/embedded/, which ship with the repository, before they are used."""

import hashlib
from pathlib import Path

from capas.core.errors import CapasError
from capas.core.files import read_json

FOLDER = "data/embedded"
MANIFEST = f"{FOLDER}/manifest.json"
_WAY_OUT = (
    "Restore it with `git checkout data/embedded`, or rebuild all files with `python "
    "stages/pretrain_embedded.py --replace`."
)


def verify(manifest: Path, files: list[Path]) -> None:
    """Check files against manifest.json: {"files": {name: {"sha256", "bytes"}}}.

    Raises:
        CapasError: a file is missing, is not named in the manifest or has another sha256.
    """
    expected = _read_manifest(manifest)
    for file in files:
        entry = expected.get(file.name)
        if not isinstance(entry, dict) or "sha256" not in entry:
            raise CapasError(f"{manifest} names no sha256 of {file.name}. {_WAY_OUT}")
        if not file.is_file():
            raise CapasError(f"{file} is missing. {_WAY_OUT}")
        _verify_file(file, entry["sha256"])


def _verify_file(file: Path, expected: str) -> None:
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        hint = " It is a Git LFS pointer." if content.startswith(b"version https://git-lfs") else ""
        raise CapasError(
            f"{file} is not the file shipped with this version.{hint}\n"
            f"  sha256 found    {found}\n  sha256 expected {expected}\n"
            f"{_WAY_OUT}"
        )


def _read_manifest(manifest: Path) -> dict[str, dict[str, str]]:
    try:
        files = read_json(manifest).get("files")
    except CapasError as error:
        raise CapasError(f"{error}. {_WAY_OUT}") from None
    if not isinstance(files, dict):
        raise CapasError(f"{manifest} is damaged: 'files' is not an object. {_WAY_OUT}")
    return files
