"""Detect and rebuild a git index that a killed process left truncated.

DVC writes the index in place, and git does not check it: half of an index looks like one with fewer files.
"""

import hashlib
from pathlib import Path

from capas.core.worktree import git

_DIGESTS = ("sha1", "sha256")  # digests of git's object formats


def is_broken(root: Path) -> bool:
    """Return whether the index is empty, or its checksum at the end is wrong."""
    file = _file(root)
    if file is None or not file.exists():
        return False
    content = file.read_bytes()
    return not content or not any(_is_whole(content, name) for name in _DIGESTS)


def mend(root: Path, tree: str) -> list[str]:
    """Rebuild a broken index from a tree and return a sentence about it, or none if the index is intact.

    Raises:
        CapasError: git cannot read the tree.
    """
    file = _file(root)
    if file is None or not is_broken(root):
        return []
    file.unlink()
    git(root, "read-tree", tree)
    git(root, "update-index", "-q", "--refresh", check=False)  # fails if a file differs
    return ["git's index was truncated and has been rebuilt"]


def _file(root: Path) -> Path | None:
    name = git(root, "rev-parse", "--git-path", "index", check=False)
    return root / name if name else None


def _is_whole(content: bytes, name: str) -> bool:
    """Return whether the last bytes are the digest of the others, or zeros, as with `index.skipHash`."""
    size = hashlib.new(name).digest_size
    body, end = content[:-size], content[-size:]
    return end in (hashlib.new(name, body, usedforsecurity=False).digest(), bytes(size))
