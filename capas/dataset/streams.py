"""Hash a file's bytes as stored while they are read, and decompress them."""

import hashlib
import io
from typing import Any, BinaryIO

import pyarrow as pa

BUFFER_BYTES = 2**20


class Hashing(io.RawIOBase):
    """A stream that passes bytes through and hashes each once, in order."""

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
        """Read and hash the bytes that a decompressor leaves unread at the end of the file."""
        while content := self._raw.read(BUFFER_BYTES):
            self.digest.update(content)
            self.num_bytes += len(content)


class _Unpacked(io.RawIOBase):
    """A decompressing stream of pyarrow, as a Python stream."""

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
