"""A throw-away clone of this repository, as it stands in the working tree."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
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
        code, said = self.ended(*command, **env)
        assert not check or code == 0, f"{' '.join(command)}:\n{said}"
        return said

    def ended(self, *command: str, **env: str) -> tuple[int, str]:
        """The exit code, and stdout and stderr together."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self._env(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def start(self, *command: str, **env: str) -> "subprocess.Popen[str]":
        """The command in a process group of its own, as a terminal starts it, not waited for."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self._env(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def restore(self, *options: str, code: int = 0) -> str:
        """What `capas restore` says; AssertionError where it ends with another code."""
        found, said = self.ended(sys.executable, "-m", "capas.workspace.restore", *options)
        assert found == code, said
        return said

    def repro(self, *targets: str, check: bool = True, **env: str) -> str:
        return self.run("dvc", "repro", *targets, check=check, **env)

    def repro_killed(self, stage: str, when: Callable[[], bool], seconds: float = 600) -> str:
        """`dvc repro`, with SIGKILL to the stage's process as soon as `when()` is true."""
        log = self.root / ".dvc/tmp/killed.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as out:
            dvc = subprocess.Popen(
                ["dvc", "repro"], cwd=self.root, env=self._env(), stdout=out, stderr=out
            )
            deadline = time.monotonic() + seconds
            while not when():
                assert dvc.poll() is None, f"dvc ended before the kill:\n{log.read_text()}"
                assert time.monotonic() < deadline, f"nothing to kill:\n{log.read_text()}"
                time.sleep(0.005)
            os.kill(int(self.read(f".dvc/tmp/stage-{stage}.lock")), signal.SIGKILL)
            assert dvc.wait() != 0
        return log.read_text()

    def recorded(self, stage: str) -> dict[str, Any]:
        """The stage's entry in dvc.lock."""
        entry: dict[str, Any] = yaml.safe_load(self.read("dvc.lock"))["stages"][stage]
        return entry

    def outputs(self) -> dict[str, str]:
        """{path: md5} of all outputs that dvc.lock records."""
        lock = yaml.safe_load(self.read("dvc.lock"))["stages"]
        return {o["path"]: o["md5"] for entry in lock.values() for o in entry.get("outs", [])}

    def _env(self, **env: str) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_"))}
        return {**inherited, **ENVIRONMENT, "PYTHONPATH": str(self.root), **env}

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
