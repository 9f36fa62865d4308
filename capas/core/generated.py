"""The files that commands write and git tracks: they are made again, and nobody merges them by hand.

This is the only list. `.gitattributes` marks them `-merge`, so that git never mixes two versions line by
line: a dvc.lock of two halves would record results that nobody computed. Those in BY_KEY hold choices of both
sides, so that git does mix them, and leaves its markers where it cannot.
"""

from fnmatch import fnmatch
from pathlib import Path

from capas.core.dag import read_yaml

LOCK, PARAMS = "dvc.lock", "params.yaml"
CODE, ENVIRONMENT = "code.yaml", "environment.yaml"  # compose writes them, too, and reads neither
OVERRIDES, REVISIONS = "conf/overrides.yaml", "conf/revisions.yaml"
BY_KEY = (OVERRIDES, REVISIONS)
SCHEMAS = ".vscode/schema/*.json"
PATTERNS = (LOCK, PARAMS, CODE, ENVIRONMENT, *BY_KEY, "reports/*", SCHEMAS)


def is_generated(path: str) -> bool:
    """Return whether a command writes the file; `path` starts at the repository's top folder."""
    return any(fnmatch(path, pattern) for pattern in PATTERNS)


def uncached(root: Path) -> list[str]:
    """Return the outputs that DVC's cache does not hold, as `dvc.yaml` declares them."""
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
