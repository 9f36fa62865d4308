"""List the files that commands write and git tracks; they are regenerated and never merged by hand.

This is the only list. `.gitattributes` marks the files `-merge`, so that git never mixes two versions line by
line: a dvc.lock of two halves would record results that nobody computed. The files in BY_KEY have choices of
both sides, so git does merge them and leaves conflict markers if it cannot.
"""

from fnmatch import fnmatch
from pathlib import Path

from capas.core.code_digests import CODE
from capas.core.dag import read_yaml

LOCK, PARAMS = "dvc.lock", "params.yaml"
ENVIRONMENT = "environment.yaml"
COMPOSED = (PARAMS, CODE, ENVIRONMENT)  # outputs of compose, which reads only the first
OVERRIDES, REVISIONS = "conf/overrides.yaml", "conf/revisions.yaml"
BY_KEY = (OVERRIDES, REVISIONS)
SCHEMAS = ".vscode/schema/*.json"
READ_BY_COMMANDS = (LOCK, *COMPOSED, *BY_KEY)
PATTERNS = (*READ_BY_COMMANDS, "reports/*", SCHEMAS)


def is_generated(path: str) -> bool:
    """Return whether a command writes the file; `path` is relative to the repository's top folder."""
    return any(fnmatch(path, pattern) for pattern in PATTERNS)


def uncached(root: Path) -> list[str]:
    """Return the outputs that `dvc.yaml` declares with `cache: false`."""
    stages = read_yaml(root / "dvc.yaml").get("stages", {}).values()
    outs = [
        out
        for entry in stages
        for kind in ("outs", "metrics", "plots")
        for out in entry.get(kind, [])
    ]
    return [
        path
        for out in outs
        if isinstance(out, dict)
        for path, flags in out.items()
        if (flags or {}).get("cache") is False
    ]
