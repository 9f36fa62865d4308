"""Name the code files that differ between two states of the repository, to explain digests in code.yaml."""

import tarfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from capas.core.code_digests import CODE, PACKAGE, STAGES, CodeReader, differing, digest_of
from capas.core.dag import parse_yaml
from capas.core.errors import CapasError
from capas.core.worktree import git, git_bytes

_MOST_REVISIONS = 50  # revisions of code.yaml that are searched for a digest
State = tuple[str, str]  # a script's name in code.yaml, and a digest of its code


def edited_since(root: Path, states: Collection[State]) -> dict[State, list[str]]:
    """Return {state: files of the script's code that were edited since}, without states that git lacks."""
    revisions = _revisions_of(root, states) if states else {}
    scripts: dict[str, list[str]] = defaultdict(list)
    for (script, _), revision in revisions.items():
        scripts[revision].append(script)
    edited = {}
    for revision, its_scripts in scripts.items():
        with exported(root, revision) as before:
            edited[revision] = between(before, root, its_scripts)
    return {state: edited[revision][state[0]] for state, revision in revisions.items()}


def between_digests(
    root: Path, pairs: Mapping[str, tuple[str, str]], commits: Sequence[str | None]
) -> list[str]:
    """Return the files that differ between two recorded states of the code, sorted.

    Args:
        pairs: {script: its digest in each of the two states}.
        commits: the commit of each state, or None to search for it.

    Returns:
        The files, or none if one of the states cannot be found.
    """
    with ExitStack() as stack:
        trees = []
        for digests, commit in zip(zip(*pairs.values(), strict=True), commits, strict=True):
            found = _tree_of(root, dict(zip(pairs, digests, strict=True)), commit, stack)
            if found is None:
                return []
            trees.append(found)
        return sorted({*chain(*between(trees[0], trees[1], pairs).values())})


def _tree_of(
    root: Path, recorded: Mapping[str, str], commit: str | None, stack: ExitStack
) -> Path | None:
    """Return a folder with the code of these digests, or None: the workspace, or an exported commit.

    An exported commit exists until the stack is closed.
    """
    if _has(root, recorded):
        return root
    state = next(iter(recorded.items()))
    for revision in filter(None, (commit, _revisions_of(root, [state]).get(state))):
        try:
            tree = stack.enter_context(exported(root, revision))
        except CapasError:  # a commit without this code, for example of another project
            continue
        if _has(tree, recorded):
            return tree
    return None


def _has(root: Path, recorded: Mapping[str, str]) -> bool:
    """Return whether the code in a folder has these digests."""
    reader = CodeReader(root)
    return all(digest_of(_files(reader, script)) == digest for script, digest in recorded.items())


def between(one: Path, other: Path, scripts: Collection[str]) -> dict[str, list[str]]:
    """Return {script: files of its code that were edited between two folders, sorted}.

    A file that a script imports only in one of the folders is named only if no edit explains the difference.
    A script that is missing in a folder, or cannot be parsed there, counts as without files.
    """
    readers = CodeReader(one), CodeReader(other)
    found = {}
    for script in scripts:
        files = [_files(reader, script) for reader in readers]
        names = differing(*files)
        edited = [name for name in names if all(name in known for known in files)]
        edited += [n for n in names if not all((root / n).exists() for root in (one, other))]
        found[script] = sorted(edited or names)
    return found


def _files(reader: CodeReader, script: str) -> dict[str, str]:
    try:
        return reader.files(f"{STAGES}/{script}.py")
    except CapasError:
        return {}


@contextmanager
def exported(root: Path, revision: str) -> Iterator[Path]:
    """Yield a temporary folder with the code of a commit.

    Raises:
        CapasError: git has no such commit, or the commit has no such code.
    """
    # The project may be a folder of a larger repository; git archives from its top folder only.
    top, prefix = (git(root, "rev-parse", f"--show-{name}") for name in ("toplevel", "prefix"))
    as_stored = ("-c", "core.autocrlf=false", "archive", "--format=tar")
    archive = git_bytes(Path(top), *as_stored, f"{revision}:{prefix}", PACKAGE, STAGES)
    with TemporaryDirectory(prefix="capas-code-") as folder:
        with tarfile.open(fileobj=BytesIO(archive)) as content:
            # Python 3.11 before 3.11.4 has no filters
            safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            content.extractall(folder, **safely)  # type: ignore[arg-type]
        yield Path(folder)


def _revisions_of(root: Path, states: Collection[State]) -> dict[State, str]:
    """Return {state: newest commit whose code.yaml records it}, without states that no commit has."""
    count = f"--max-count={_MOST_REVISIONS}"
    revisions = git(root, "log", count, "--format=%H", "--", CODE, check=False).split()
    found: dict[State, str] = {}
    for revision in revisions:
        if missing := [state for state in states if state not in found]:
            known = parse_yaml(git(root, "show", f"{revision}:./{CODE}", check=False), CODE)
            found |= {state: revision for state in missing if known.get(state[0]) == state[1]}
    return found
