"""Find the outputs of a recorded result in DVC's cache, by the md5 in its dvc.lock."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from capas.core.dag import md5
from capas.core.errors import CapasError
from capas.workspace.clone import cache_of, stored


class Outputs:
    """The outputs that a dvc.lock names, as far as they are on this machine.

    A file of the workspace counts if its bytes are those that dvc.lock records.
    """

    def __init__(self, root: Path, lock: Mapping[str, Any]) -> None:
        self._root = root
        outs = (out for entry in lock.values() for out in entry.get("outs", []))
        self.md5 = {out["path"]: out["md5"] for out in outs if "md5" in out}

    @cached_property
    def _cache(self) -> Path:
        return cache_of(self._root)

    def find(self, path: str) -> Path | None:
        """Return the file `path`, an output or a file in an output folder; None if it is not here."""
        if path in self.md5:
            return self._file(path, self.md5[path])
        folder, _, name = path.rpartition("/")
        listed = self._listing(folder) if folder in self.md5 else {}
        return self._file(path, listed[name]) if name in listed else None

    def folder(self, path: str) -> dict[str, Path]:
        """Return {name: file} of an output that is a folder.

        Raises:
            CapasError: one of its files, or its listing, is not on this machine.
        """
        listed = self._listing(path) if path in self.md5 else {}
        found = {name: self.find(f"{path}/{name}") for name in listed}
        files = {name: file for name, file in found.items() if file is not None}
        if not files or len(files) < len(found):
            raise CapasError(
                f"{path}: DVC's cache does not hold it any more; `dvc pull` may bring it back"
            )
        return files

    def digest(self, path: str) -> str | None:
        """Return the md5 of an output, or of a file in an output folder; None if it is not known here."""
        folder, _, name = path.rpartition("/")
        return self.md5.get(path) or (
            self._listing(folder).get(name) if folder in self.md5 else None
        )

    def _file(self, path: str, wanted: str) -> Path | None:
        cached = stored(self._cache, wanted)
        if cached.is_file():
            return cached
        here = self._root / path
        return here if here.is_file() and md5(here) == wanted else None

    def _listing(self, folder: str) -> dict[str, str]:
        """Return {file: md5} of a folder; empty if neither the cache nor the workspace has it."""
        wanted = self.md5[folder]
        cached = stored(self._cache, wanted)
        if cached.is_file():
            entries = json.loads(cached.read_text(encoding="utf-8"))
            return {entry["relpath"]: entry["md5"] for entry in entries}
        try:
            is_here = (self._root / folder).is_dir() and md5(self._root / folder) == wanted
        except CapasError:
            is_here = False
        if not is_here:
            return {}
        files = (file for file in (self._root / folder).rglob("*") if file.is_file())
        return {file.relative_to(self._root / folder).as_posix(): md5(file) for file in files}
