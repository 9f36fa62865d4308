"""A file's bytes on their way: hashed as they lie there, and unpacked."""

import hashlib
import io
from typing import Any, BinaryIO

import pyarrow as pa

BUFFER_BYTES = 2**20


class Hashing(io.RawIOBase):
    """Reads through, hashing every byte once, in order."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self.digest, self.num_bytes = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._raw.read(len(buffer))
        buffer[: len(content)] = content
        self.digest.update(content)
        self.num_bytes += len(content)
        return len(content)

    def drain(self) -> None:
        """What a decompressor leaves unread at the end belongs to the file too."""
        while content := self._raw.read(BUFFER_BYTES):
            self.digest.update(content)
            self.num_bytes += len(content)


class _Unpacked(io.RawIOBase):
    """A stream of pyarrow's as one of Python's."""

    def __init__(self, raw: Any, compression: str) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def unpacked(raw: Hashing, compression: str | None) -> io.RawIOBase:
    return _Unpacked(io.BufferedReader(raw, BUFFER_BYTES), compression) if compression else raw
