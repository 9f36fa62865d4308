"""The working tree as git sees it: nothing of it is lost on the way into another folder."""

import os
from pathlib import Path

import pytest

from capas.core.errors import CapasError
from capas.core.worktree import Snapshot, clone, difference, git, snapshot


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A committed file of each kind, then every kind of edit that is not committed."""
    root = tmp_path / "home with a blank"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    git(root, "config", "user.name", "Ana")
    git(root, "config", "user.email", "ana@example.org")
    (root / ".gitignore").write_text("/ignored\n")
    for name in ("kept", "edited", "removed", "staged"):
        (root / name).write_text(f"{name} 1\n")
    git(root, "add", "--all")
    git(root, "commit", "-q", "-m", "first")
    (root / "edited").write_text("edited 2\n")
    (root / "removed").unlink()
    (root / "staged").write_text("staged 2\n")
    git(root, "add", "staged")
    (root / "new folder").mkdir()
    (root / "new folder/ñ.bin").write_bytes(bytes(range(256)))
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / "ignored").write_text("ignored\n")
    return root


def files(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def test_a_clone_has_what_is_not_committed(home: Path, tmp_path: Path) -> None:
    before = git(home, "status", "--porcelain")
    taken = snapshot(home)
    assert git(home, "status", "--porcelain") == before
    clone(home, taken, tmp_path / "deep/clone")
    expected = files(home)
    del expected["ignored"]
    assert files(tmp_path / "deep/clone") == expected
    assert os.access(tmp_path / "deep/clone/run.sh", os.X_OK)
    assert git(tmp_path / "deep/clone", "rev-parse", "HEAD") == git(home, "rev-parse", "HEAD")
    assert git(tmp_path / "deep/clone", "config", "user.name") == "Ana"


def test_the_patch_leads_from_the_commit_to_the_tree(home: Path, tmp_path: Path) -> None:
    for name, value in {"noprefix": "true", "relative": "true", "external": "false"}.items():
        git(home, "config", f"diff.{name}", value)
    taken = snapshot(home)
    patch = tmp_path / "patch"
    patch.write_bytes(difference(home, taken))
    target = tmp_path / "clone"
    clone(home, Snapshot(taken.commit, f"{taken.commit}^{{tree}}"), target)
    git(target, "apply", "--index", str(patch))
    assert git(target, "write-tree") == taken.tree


def test_all_committed_is_an_empty_patch(home: Path) -> None:
    git(home, "add", "--all")
    git(home, "commit", "-q", "-m", "second")
    taken = snapshot(home)
    assert taken.tree == git(home, "rev-parse", "HEAD^{tree}")
    assert difference(home, taken) == b""


def test_another_repository_named_in_the_environment_is_not_meant(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = snapshot(home)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert snapshot(home) == expected


@pytest.mark.parametrize("kind", ["no repository", "no commit"])
def test_without_a_commit_it_says_what_is_needed(tmp_path: Path, kind: str) -> None:
    if kind == "no commit":
        git(tmp_path, "init", "-q")
    with pytest.raises(CapasError, match="needs a git repository with a commit"):
        snapshot(tmp_path)
