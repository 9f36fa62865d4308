"""Find, open and hash the files of a source, with never more than a buffer in memory.

A file is in data/own, or linked there, so that DVC notices edits. Or it is behind a URL that fsspec opens;
`dataset.revision` then pins its content.
"""

import errno
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

from capas.core.errors import CapasError
from capas.dataset.streams import BUFFER_BYTES, Hashing, unpacked

OWN = "data/own"
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_FORMATS = {
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "text": (".txt",),
}
KNOWN = ", ".join(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
# Keys of fsspec's info() that identify the content of a file; without any, the content itself is hashed.
_MARKS = ("ETag", "etag", "Content-MD5", "md5Hash", "content_md5", "checksum")

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass
class File:
    """One file of a source; `name` is written as in dataset.data_files, with globs expanded.

    `sha256` and `num_bytes` describe the file as stored, compressed or not, and are known once it was read.
    `read_as` has its encoding and separator, found or set. `unread` counts, per column that was not read, the
    rows. `num_cut` counts the texts that were cut, and `num_pieces` the pieces.
    """

    name: str
    root: Path
    sha256: str = ""
    num_bytes: int = 0
    read_as: dict[str, str] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    num_cut: int = 0
    num_pieces: int = 0
    suffix: str = field(init=False)
    compression: str | None = field(init=False)

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name.split("?")[0].lower())
        self.compression = _COMPRESSED.get(path.suffix)
        self.suffix = path.with_suffix("").suffix if self.compression else path.suffix

    @property
    def format(self) -> str | None:
        """The format, as in `dataset.path`: json, csv, parquet or text; None for an unknown suffix."""
        return next((f for f, suffixes in _FORMATS.items() if self.suffix in suffixes), None)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file and yield its content, decompressed; the whole file is hashed on the way.

        Raises:
            CapasError: the file is missing, unreachable or damaged.
        """
        with _reached(self.name), _open(self.name, self.root) as raw:
            hashing = Hashing(raw)
            with io.BufferedReader(unpacked(hashing, self.compression), BUFFER_BYTES) as content:
                yield content
                hashing.drain()
            self.sha256, self.num_bytes = hashing.digest.hexdigest(), hashing.num_bytes

    @contextmanager
    def open_seekable(self) -> Iterator[BinaryIO]:
        """Open the file for random access (parquet); the content is hashed in a separate pass.

        Raises:
            CapasError: the file is compressed as a whole, missing, unreachable or damaged.
        """
        if self.compression:
            raise CapasError(
                f"{self.name}: parquet is compressed internally; decompress the file first"
            )
        with self.open() as content:
            while content.read(BUFFER_BYTES):
                pass
        with _reached(self.name), _open(self.name, self.root) as raw:
            yield raw

    def facts(self) -> dict[str, Any]:
        facts = {"file": self.name, "bytes": self.num_bytes, "sha256": self.sha256}
        return {**facts, **self.read_as}


def by_split(data_files: DataFiles) -> dict[str, list[str]]:
    """Return {split: patterns}; files without a split belong to "train"."""
    if isinstance(data_files, Mapping):
        return {split: _listed(files) for split, files in data_files.items()}
    return {"train": _listed(data_files)}


def expand(patterns: Sequence[str], path: str, root: Path) -> list[File]:
    """Return the files that match, sorted for each pattern, each file once.

    Args:
        path: `dataset.path`, the format: json, csv, parquet or text.

    Raises:
        CapasError: a pattern matches nothing, a file is outside data/own or has another format, or a folder
            is a link.
    """
    names = {name: None for pattern in patterns for name in sorted(_matching(pattern, root))}
    for name in names:
        _check_seen(name, root)
    files = [File(name, root) for name in names]
    for file in files:
        if file.suffix not in _FORMATS[path]:
            hint = f"set dataset.path={file.format}" if file.format else f"known: {KNOWN}"
            raise CapasError(
                f"dataset.path={path}, but {file.name} is named "
                f"{file.suffix or 'without a format'}; {hint} (each also with .gz or .zst appended)"
            )
    return files


def is_url(name: str) -> bool:
    return "://" in name


def _listed(files: str | Sequence[str]) -> list[str]:
    return [files] if isinstance(files, str) else list(files)


def _matching(pattern: str, root: Path) -> list[str]:
    names = _matching_urls(pattern) if is_url(pattern) else _matching_here(pattern, root)
    if not names:
        raise CapasError(f"dataset.data_files: {pattern} matches no file")
    return names


def _matching_here(pattern: str, root: Path) -> list[str]:
    parts = PurePosixPath(pattern).parts
    if parts[:2] != PurePosixPath(OWN).parts or ".." in parts or len(parts) < 3:
        raise CapasError(
            f"dataset.data_files: {pattern} is outside {OWN}, so DVC would not notice edits. Copy "
            f"the file into {OWN} or link it there (ln -s FILE {OWN}/), and name it {OWN}/..."
        )
    if (root / pattern).is_dir():
        raise CapasError(
            f"dataset.data_files: {pattern} is a folder; name its files, as {pattern}/*.jsonl"
        )
    if (root / pattern).is_file():  # a file's name may contain the characters of a pattern
        return [pattern]
    return [f.relative_to(root).as_posix() for f in root.glob(pattern) if f.is_file()]


def _check_seen(name: str, root: Path) -> None:
    """Check that no folder on the way is a link: DVC follows links to files but not to folders.

    Raises:
        CapasError: a folder is a link.
    """
    folders = [] if is_url(name) else list(PurePosixPath(name).parents)[:-3]
    linked = [folder for folder in folders if (root / folder).is_symlink()]
    if linked:
        raise CapasError(
            f"dataset.data_files: {linked[0]} is a link to a folder, and DVC would not notice edits "
            "in it. Make it a real folder and link the files inside"
        )


def _matching_urls(url: str) -> list[str]:
    if re.search(r"://[^/?#]*:[^/?#]*@", url):
        raise CapasError(
            "dataset.data_files: a URL contains a password, which every report would show. Remove "
            "it and configure the machine instead (~/.netrc, AWS_PROFILE, ...)"
        )
    path = url.split("://")[1].partition("/")[2].split("?")[0]
    if not re.search(r"[*\[]", path):
        return [url]
    with _reached(url):
        fs, path = _filesystem(url)
        found = fs.glob(path)
        return [str(fs.unstrip_protocol(name)) for name in found]


def _open(name: str, root: Path) -> BinaryIO:
    if not is_url(name):
        return (root / name).open("rb")
    fs, path = _filesystem(name)
    opened: BinaryIO = fs.open(path, "rb")
    return opened


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

    Raises:
        CapasError: fsspec does not support the URL, or a package for it is not installed.
    """
    import fsspec

    try:
        fs, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:  # no such scheme, or its package is not installed
        raise CapasError(f"dataset.data_files: {url} cannot be opened: {error}") from None
    return fs, path


def url_revision(data_files: DataFiles) -> str:
    """Return a revision of the content behind the URLs, 16 hex digits.

    It covers the name, size and ETag of every file, or a similar mark that fsspec reports. If a server
    reports no mark, it covers the content's sha256.

    Raises:
        CapasError: a URL cannot be reached.
    """
    digest = hashlib.sha256()
    for patterns in by_split(data_files).values():
        urls = [
            url for pattern in patterns if is_url(pattern) for url in _matching(pattern, Path())
        ]
        for url in sorted(urls):
            digest.update(f"{url} {_mark(url)}\n".encode())
    return digest.hexdigest()[:16]


def _mark(url: str) -> str:
    fs, path = _filesystem(url)
    with _reached(url):
        fs.invalidate_cache(path)
        info = fs.info(path)
    known = [f"{key}={info[key]}" for key in _MARKS if info.get(key)]
    if known:
        return f"{info.get('size')} {' '.join(known)}"
    file = File(url, Path())
    with file.open() as content:
        while content.read(BUFFER_BYTES):
            pass
    return file.sha256


@contextmanager
def _reached(name: str) -> Iterator[None]:
    """Turn errors of reading (disk, network, damaged archive) into a CapasError for the user."""
    from aiohttp import ClientError

    try:
        yield
    except (OSError, ClientError, pa.ArrowInvalid) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the disk that is written to is full
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CapasError(f"{name} cannot be read: {reason}") from None
