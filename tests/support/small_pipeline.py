"""A repository with a pipeline of three stages, and a stand-in for `dvc repro` that takes no time.

Its compose stage has no Hydra: params.yaml is conf/config.yaml and, over it, conf/overrides.yaml.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from workspace import REPOSITORY, Workspace

from capas.config.composition import dump
from capas.core.dag import StageSpec, md5, recorded
from capas.workspace.due import Inputs, in_order

DVC_YAML = """
stages:
  compose:
    cmd: python stages/compose_params.py
    deps: [conf, stages/compose_params.py]
    outs: [params.yaml: {cache: false, persist: true}]
  prepare:
    cmd: python stages/prepare.py
    deps: [stages/prepare.py]
    params: [dataset]
    outs: [data/raw]
    metrics: [reports/metrics/prepare.json: {cache: false}]
  train:
    cmd: python stages/train.py
    deps: [data/raw, stages/train.py]
    params: [lora, trainer]
    outs: [data/adapter]
    metrics: [reports/metrics/train.json: {cache: false}]
"""
COMPOSE = """
import sys
from pathlib import Path
import yaml
from capas.config.composition import dump
if "--force" not in sys.argv:
    sys.exit("compose: an edit of params.yaml would be lost")
values = yaml.safe_load(Path("conf/config.yaml").read_text())
for group, leaves in (yaml.safe_load(Path("conf/overrides.yaml").read_text()) or {}).items():
    values[group].update(leaves)
if values["lora"]["r"] <= 0:
    sys.exit("compose: lora.r must be greater than 0")
Path("params.yaml").write_text(dump(values))
"""
CONFIG = {
    "dataset": {"seed": 0},
    "lora": {"r": 16, "lora_alpha": 16},
    "trainer": {"learning_rate": 0.004, "max_steps": 10},
}
ATTRIBUTES = (Path(__file__).resolve().parents[2] / ".gitattributes").read_text()


class Small(Workspace):
    """`runs` are the stages that `remake` ran, in their order."""

    @classmethod
    def make(cls, root: Path) -> "Small":
        files = {
            "dvc.yaml": DVC_YAML,
            "stages/compose_params.py": COMPOSE,
            "stages/prepare.py": "first = 1\n",
            "stages/train.py": "first = 1\n",
            "conf/config.yaml": yaml.safe_dump(CONFIG),
            "conf/overrides.yaml": "# Nothing overridden.\n",
            "conf/revisions.yaml": "{}\n",
            ".gitattributes": ATTRIBUTES,
            ".gitignore": "/data\n/.dvc\n__pycache__\n",
        }
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        made = cls(root)
        for words in (
            ("init", "-q", "-b", "main"),
            *(
                ("config", f"user.{k}", v)
                for k, v in (("name", "test"), ("email", "t@example.org"))
            ),
        ):
            made.run("git", *words)
        made.compose()
        made.remake()
        made.commit()
        return made

    def _env(self, **env: str) -> dict[str, str]:
        return super()._env(**{**env, "PYTHONPATH": str(REPOSITORY)})

    def compose(self) -> None:
        values = yaml.safe_load(self.read("conf/config.yaml"))
        for group, leaves in (yaml.safe_load(self.read("conf/overrides.yaml")) or {}).items():
            values[group].update(leaves)
        (self.root / "params.yaml").write_text(dump(values))

    def override(self, **groups: dict[str, Any]) -> None:
        """Write conf/overrides.yaml, and what follows from it."""
        (self.root / "conf/overrides.yaml").write_text(yaml.safe_dump(groups))
        self.compose()
        self.remake()

    def remake(self) -> list[str]:
        """Run the stages that are due, as `dvc repro` would, and record them in dvc.lock."""
        lock, ran = recorded(self.root), []
        made: dict[str, str] = {}
        for spec in in_order(StageSpec.read_all(self.root)):
            now = Inputs.read(spec, self.root, made, {})
            entry = lock.get(spec.name)
            if entry is None or any(now.differences(entry)) or self._changed(entry):
                ran.append(spec.name)
                lock[spec.name] = self._ran(spec, now)
            made |= {out["path"]: out["md5"] for out in lock[spec.name]["outs"]}
        text = yaml.safe_dump({"schema": "2.0", "stages": lock}, sort_keys=False)
        (self.root / "dvc.lock").write_text(text)
        return ran

    def _changed(self, entry: dict[str, Any]) -> bool:
        files = {out["path"]: out["md5"] for out in entry["outs"]}
        return any(
            not (self.root / path).exists() or md5(self.root / path) != found
            for path, found in files.items()
        )

    def _ran(self, spec: StageSpec, now: Inputs) -> dict[str, Any]:
        said = json.dumps([spec.name, now.params, now.deps], sort_keys=True)
        for out in spec.outs:
            file = self.root / out
            file.parent.mkdir(parents=True, exist_ok=True)
            if spec.name != "compose":
                file.write_text(hashlib.sha256(said.encode()).hexdigest() + "\n")
        entry: dict[str, Any] = {"cmd": spec.cmd, "deps": self._listed(now.deps)}
        if now.params:
            entry["params"] = now.params
        outs = {out: md5(self.root / out) for out in spec.outs}
        return {**entry, "outs": self._listed(outs)}

    def _listed(self, files: dict[str, str]) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = []
        for path, found in files.items():
            size = {"size": 1, "nfiles": 1} if found.endswith(".dir") else {"size": 1}
            listed.append({"path": path, "hash": "md5", "md5": found, **size})
        return listed

    def unmerged(self) -> list[str]:
        listed = self.run("git", "diff", "--name-only", "--diff-filter=U").split()
        return sorted(set(listed))
