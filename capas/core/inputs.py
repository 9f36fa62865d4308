"""Find the files that stages read and no stage makes, and those of them that git does not have."""

from pathlib import Path

from capas.core.dag import StageSpec
from capas.core.worktree import git


def external(root: Path) -> list[str]:
    """Return the files and folders that stages read and no stage makes, sorted."""
    stages = StageSpec.read_all(root).values()
    made = {out for stage in stages for out in stage.outs}
    return sorted({dep for stage in stages for dep in stage.deps} - made)


def ignored(root: Path, tree: str) -> list[str]:
    """Return the external files that are not in the git tree, which are those in data/own.

    Files in .dvcignore are left out, as DVC does, because an editor's swap file disappears with the editor.

    Raises:
        CapasError: git has no such tree.
    """
    from dvc.fs import localfs
    from dvc.ignore import DvcIgnoreFilter

    have = set(git(root, "ls-tree", "-r", "-z", "--name-only", tree).split("\0"))
    rules = DvcIgnoreFilter(localfs, str(root.absolute()))
    found = []
    for name in external(root):
        path = root / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            relative = file.relative_to(root).as_posix()
            if relative in have or not file.is_file() or rules.is_ignored_file(str(file)):
                continue
            found.append(relative)
    return found
