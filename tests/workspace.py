"""A throw-away clone of this repository, as it stands in the working tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@example.org",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@example.org",
}


class Workspace:
    """A git repository with capas in it; commands run in it with this Python."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *command: str, check: bool = True, **env: str) -> str:
        """stdout and stderr together; AssertionError with both where the command fails."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_"))}
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**inherited, **ENVIRONMENT, "PYTHONPATH": str(self.root), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"
        return done.stdout

    def repro(self, *targets: str, check: bool = True, **env: str) -> str:
        return self.run("dvc", "repro", *targets, check=check, **env)

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.root / file
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    def read(self, file: str) -> str:
        return (self.root / file).read_text(encoding="utf-8")

    def commit(self) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "--allow-empty", "-m", "test")


def stages_run(log: str) -> list[str]:
    """The stages that a `dvc repro` executed, or restored from its run-cache, in its own order."""
    return re.findall(r"(?:Running stage|Stage) '(\w+)'(?::| is cached)", log)


def make_workspace(root: Path) -> Workspace:
    """Copies every file that git tracks or would track, and commits it."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, root / name)
    workspace = Workspace(root)
    workspace.run("git", "init", "-q", "-b", "main")
    workspace.commit()
    return workspace
