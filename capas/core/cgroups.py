"""Find the control groups around this process, whose limits apply in a container or a cluster's job."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def around(controller: str, root: Path = ROOT, own: Path = OWN) -> Iterator[Path]:
    """Yield the folders of the groups around the process, version 1 or 2, the innermost first.

    Args:
        controller: `memory` or `cpu`; version 1 has a tree for each, version 2 one for all.
        root: the folder where Linux mounts the groups.
        own: the file with the process's own groups.
    """
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        inner = top / path.lstrip("/")
        # In a container the process's own group is mounted as the top one.
        yield from (g for g in (inner, *inner.parents) if g.is_relative_to(top) and g.is_dir())
