"""Environments of their own for the contestants that this project does not depend on."""

import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = Path(__file__).resolve().parents[1] / ".dvc/tmp/benchmarks"


def environment(name: str, packages: list[str], parent: bool = False, drop: str = "") -> str:
    """The Python of a virtual environment; made once.

    Args:
        packages: arguments of `pip install`.
        parent: on top of this one, whose packages it finds where it has none of its own.
        drop: files of its site-packages to be removed, as a pattern.
    """
    folder = ENVIRONMENTS / name
    python, ready = folder / "bin/python", folder / "ready"
    made_of = f"{packages}{drop}"
    if ready.exists() and ready.read_text() == made_of:
        return str(python)
    print(f"an environment for {name} is made in {folder} ...", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    if parent:
        (site / "parent.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")))
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    for file in site.glob(drop) if drop else ():
        file.unlink()
    ready.write_text(made_of)
    return str(python)
