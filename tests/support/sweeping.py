"""A repository with the real conf/, compose stage and sweep, whose other stages take no time."""

import io
import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Self
from unittest import mock

import psutil
import yaml
from workspace import REPOSITORY, Workspace, make_workspace

from capas.sweep.plan import Plan

STAGES = """
stages:
  compose:
    cmd: python stages/compose_params.py
    deps: [conf, requirements.lock]
    outs:
      - params.yaml: {cache: false, persist: true}
      - environment.yaml: {cache: false, persist: true}
  fetch:
    cmd: python fake.py fetch data/raw
    deps: [fake.py, data/own]
    params: [dataset.seed]
    outs: [data/raw]
  quantize:
    cmd: python fake.py quantize data/models/quantized
    deps: [fake.py, data/raw]
    params: [quantization]
    outs: [data/models/quantized]
  train:
    cmd: python fake.py train data/models/adapter
    deps: [fake.py, data/models/quantized]
    params: [trainer, lora]
    outs: [data/models/adapter]
    metrics:
      - reports/metrics/train.json: {cache: false}
  evaluate:
    cmd: python fake.py evaluate reports/evaluation.json
    deps: [fake.py, data/models/adapter]
    params: [evaluation]
    outs: [reports/evaluation.json]
    metrics:
      - reports/metrics/tuned.json: {cache: false}
"""
# The loss has its minimum at a learning rate of 0.01; what ran is noted in the user's repository.
FAKE = """
import json, math, os, sys, time
from fractions import Fraction
from pathlib import Path
import yaml

stage, out = sys.argv[1:]
home = Path(os.environ.get("CAPAS_HOME", "."))
params = yaml.safe_load(Path("params.yaml").read_text())
rate = float(params["trainer"]["learning_rate"])
until = os.environ.get("CAPAS_TRAIN_UNTIL", "")
part = f" {until}" if stage == "train" and until else ""
with (home / ".dvc/tmp/ran").open("a") as ran:
    ran.write(f"{stage} {rate:g}{part}\\n")
print(f"{stage} says so", flush=True)
hold = home / ".dvc/tmp/hold"
while hold.exists() and hold.read_text() == stage:
    time.sleep(0.1)
if stage == "train" and rate > 0.5:
    sys.exit("the loss is nan")
said = {
    "stage": stage,
    "rate": rate,
    "quantization": params["quantization"]["preset"],
    "own": sorted(os.listdir("data/own")),
    "note": Path("note.txt").read_text(),
}
Path(out).parent.mkdir(parents=True, exist_ok=True)
Path(out).write_text(json.dumps(said))
if stage == "train" and until:
    part, file = Fraction(until), f"paused-{until.replace('/', 'of')}.json"
    loss = abs(math.log10(rate) + 2) + params["seed"] / 100 + 1 - part
    checkpoints = Path(".dvc/tmp/checkpoints/train-key")
    checkpoints.mkdir(parents=True, exist_ok=True)
    scores = {"step": int(part * 27), "num_steps": 27, "validation_loss": float(loss)}
    (checkpoints / file).write_text(json.dumps(scores))
    sys.exit(75)
metrics = Path("reports/metrics")
metrics.mkdir(parents=True, exist_ok=True)
seed = params["seed"]
if stage == "train":
    loss = abs(math.log10(rate) + 2) + seed / 100
    (metrics / "train.json").write_text(json.dumps({"validation_loss": loss}))
if stage == "evaluate":
    scores = {"exact_match": 0.5, "exact_match_gain": 0.4, "loss": None}
    (metrics / "tuned.json").write_text(json.dumps(scores))
"""


# Found before DVC's own package, whose modules it leaves as they are.
DVC_PACKAGE = """
from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
from dvc.version import __version__, version_tuple
"""


class Sweeper(Workspace):
    """Its commands; `ran` counts the executions of stages."""

    @classmethod
    def make(cls, root: Path) -> "Sweeper":
        made = cls._with_fakes(root)
        made.repro()
        made.commit()
        made.forget()
        return made

    @classmethod
    def make_quick(cls, root: Path) -> "Sweeper":
        """A repository whose points call tests/support/dvc_standin.py in place of DVC."""
        made = cls._with_fakes(root)
        for unused in ("tests", "benchmarks", ".vscode"):
            shutil.rmtree(root / unused)
        (root / ".dvc/tmp").mkdir(exist_ok=True)
        (root / "dvc").mkdir()
        (root / "dvc/__init__.py").write_text(DVC_PACKAGE)
        shutil.copyfile(REPOSITORY / "tests/support/dvc_standin.py", root / "dvc/__main__.py")
        made.commit()
        return made

    @classmethod
    def _with_fakes(cls, root: Path) -> "Sweeper":
        root.mkdir(parents=True, exist_ok=True)
        made = cls(make_workspace(root).root)
        (root / "dvc.yaml").write_text(STAGES)
        (root / "fake.py").write_text(FAKE)
        (root / "note.txt").write_text("committed\n")
        (root / "dvc.lock").unlink()
        shutil.rmtree(root / "reports")
        made.edit("conf/config.yaml", "tracking: mlflow", "tracking: none")
        made.run("git", "config", "user.name", "test")
        made.run("git", "config", "user.email", "test@example.org")
        return made

    def copy(self, root: Path) -> Self:
        return type(self)(Path(shutil.copytree(self.root, root, symlinks=True)))

    def sweep(self, *words: str, check: bool = True) -> str:
        return self.run(sys.executable, "stages/sweep.py", *words, check=check)

    def sweep_here(self, *words: str) -> tuple[int, str]:
        """The exit code and the output of the script, run in this process: for launchers that start none."""
        said, code = io.StringIO(), 0
        with (
            mock.patch.dict(os.environ, self._env(), clear=True),
            mock.patch.object(sys, "argv", ["stages/sweep.py", *words]),
            chdir(self.root),
            redirect_stdout(said),
            redirect_stderr(said),
            logging_as_at_the_start(),
        ):
            try:
                runpy.run_path("stages/sweep.py", run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
                said.write(end.code if isinstance(end.code, str) else "")
        return code, said.getvalue()

    def sweep_beside(self, *words: str) -> "subprocess.Popen[str]":
        """The same, started and not waited for."""
        return self.start(sys.executable, "stages/sweep.py", *words)

    def ran(self) -> Counter[str]:
        """{'train': 2, 'train 0.001': 1, ...}"""
        file = self.root / ".dvc/tmp/ran"
        lines = file.read_text().splitlines() if file.exists() else []
        return Counter([*lines, *(line.split()[0] for line in lines)])

    def forget(self) -> None:
        (self.root / ".dvc/tmp/ran").unlink(missing_ok=True)

    def hold(self, stage: str) -> None:
        """That stage does not end, until `let_go`."""
        (self.root / ".dvc/tmp/hold").write_text(stage)

    def let_go(self) -> None:
        (self.root / ".dvc/tmp/hold").unlink()

    def experiments(self) -> dict[str, str]:
        """{name: reference}"""
        found = self.run("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()
        return {reference.rpartition("/")[2]: reference for reference in found}

    def lock(self, name: str) -> dict[str, Any]:
        """The stages of an experiment's dvc.lock."""
        text = self.run("git", "show", f"{self.experiments()[name]}:dvc.lock")
        stages: dict[str, Any] = yaml.safe_load(text)["stages"]
        return stages

    def result(self, name: str, file: str) -> dict[str, object]:
        """A small output of an experiment, out of DVC's cache."""
        outs = {o["path"]: o["md5"] for s in self.lock(name).values() for o in s.get("outs", [])}
        md5 = outs[file]
        found: dict[str, object] = json.loads(
            self.read(f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}")
        )
        return found

    def wait_for(self, stage: str, count: int = 1, seconds: float = 90) -> None:
        wait(lambda: self.ran()[stage] >= count, seconds, lambda: f"{stage}: ran {self.ran()}")

    def wait_until_idle(self, seconds: float = 30) -> None:
        """No process is left in a point's workspace."""
        deadline = time.monotonic() + seconds
        while busy := [p for p in psutil.process_iter(["cwd"]) if self._is_in_a_point(p)]:
            assert time.monotonic() < deadline, f"still there: {busy}"
            time.sleep(0.1)

    def _is_in_a_point(self, process: psutil.Process) -> bool:
        return str(process.info["cwd"] or "").startswith(str(self.root / ".dvc/tmp/sweep/work"))


@contextmanager
def logging_as_at_the_start() -> Iterator[None]:
    """No handlers and no levels but those that the block sets."""
    logs = [logging.root, logging.getLogger("capas"), logging.getLogger("hydra_plugins")]
    levels = [log.level for log in logs]
    try:
        with mock.patch.object(logging.root, "handlers", []):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def wait(until: Callable[[], bool], seconds: float = 15, told: Callable[[], object] = str) -> None:
    """`told` says what there is instead, where it does not come."""
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, told()
        time.sleep(0.05)


def kill(process: "subprocess.Popen[str]", number: int = signal.SIGKILL) -> str:
    """The driver alone; its workers see that it is gone."""
    os.kill(process.pid, number)
    return process.communicate(timeout=120)[0]


def plan_in(folder: Path) -> Plan:
    """A plan of the sweep of a repository with conf/ and dvc.yaml in this empty folder."""
    shutil.copytree(REPOSITORY / "conf", folder / "conf")
    shutil.copyfile(REPOSITORY / "dvc.yaml", folder / "dvc.yaml")
    return Plan(folder, "key", (), "c" * 40, "t" * 40, "inputs", (), folder / "cache")
