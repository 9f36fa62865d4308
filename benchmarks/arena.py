"""A folder where stages of capas run as DVC runs them, apart from the repository's own results."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_workspace(folder: Path, overrides: list[str], env: dict[str, str]) -> None:
    """The code as it is here, and params.yaml composed with Hydra overrides; data is the caller's."""
    for name in ("capas", "stages", "conf"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("dvc.yaml", "dvc.lock", "code.yaml", "environment.yaml"):
        shutil.copy(ROOT / name, folder)
    compose = [sys.executable, "stages/compose_params.py", "--print", "--files", str(folder)]
    with (folder / "params.yaml").open("w") as out:  # JSON is YAML as well
        subprocess.run([*compose, *overrides], cwd=ROOT, env=env, stdout=out, check=True)
