"""A pipeline of fakes that publishes: its runs can be rebuilt and shared in a second."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sweeping import FAKE, STAGES, Sweeper

from capas import __main__ as cli
from capas.core.worktree import git
from capas.tracking.store import Store

PUBLISH = """
  publish:
    cmd: python publish.py
    deps: [data/models/adapter, reports/train.json, reports/evaluation.json, publish.py]
    outs:
      - reports/.published: {cache: false}
"""
PUBLISHING = """
from pathlib import Path
from capas.tracking import lineage
from capas.core.dag import StageSpec, recorded
from capas.core.files import read_json
from capas.tracking.run_content import artifacts_digest
from capas.tracking.run_params import recorded_params
from capas.core.stage import Stage
from capas.tracking.store import Store
from capas.tracking.live_sender import run_name

root = Path.cwd()
stage = Stage(StageSpec.read("publish", root), root)
key = read_json(root / "reports/train.json")["train_key"]
store = Store.open(root, "capas")
lock = recorded(root)
run = store.find_or_create(key, lambda: run_name(store, recorded_params(lock)))
if experiment := lineage.experiment(stage, key):
    store.client.set_tag(run.id, "dvc.experiment", experiment)
digest = artifacts_digest(recorded(root))
lineage.send(store, run, stage, run.tags.get("capas.artifacts") != digest)
store.client.set_tag(run.id, "capas.artifacts", digest)
store.set_status(run.id, "FINISHED")
Path("reports/.published").write_text(key)
"""
# The adapter is a folder; what NOISE says is in it, as the rounding of another machine would be.
TRAINING = """
if stage == "train":
    from capas.core.dag import StageSpec, input_key
    Path(out).mkdir(parents=True)
    noise = os.environ.get("NOISE", "")
    extra = Path("extra.bin").read_bytes() if Path("extra.bin").exists() else b""
    weights = json.dumps(said).encode() + noise.encode() + extra
    Path(out, "adapter_model.safetensors").write_bytes(weights)
    Path("reports").mkdir(exist_ok=True)
    key = input_key(StageSpec.read("train", Path.cwd()), Path.cwd())
    used = {"linear_kernel": noise or "torch"}
    Path("reports/train.json").write_text(json.dumps({"train_key": key, "used": used}))
else:
    Path(out).write_text(json.dumps(said))
"""


class Publisher(Sweeper):
    @classmethod
    def make_published(cls, root: Path) -> "Publisher":
        made = cls(Sweeper.make(root).root)
        stages = STAGES.replace(
            "outs: [data/models/adapter]", "outs: [data/models/adapter, reports/train.json]"
        )
        fake = FAKE.replace("Path(out).write_text(json.dumps(said))\n", TRAINING.lstrip())
        (root / "dvc.yaml").write_text(stages + PUBLISH)
        (root / "fake.py").write_text(fake.replace("CAPAS_HOME", "FAKE_HOME"))
        (root / "publish.py").write_text(PUBLISHING)
        made.repro()
        made.commit()
        made.forget()
        return made

    def train(self, r: int) -> None:
        """Publish a run of its own; the edit is not committed."""
        self.edit("conf/lora/_base.yaml", "r: 16", f"r: {r}")
        self.repro()

    def the_run(self) -> tuple[Any, Any]:
        """The client and the newest run."""
        client = Store.open(self.root, "capas").client
        return client, client.search_runs(["1"])[0]

    @contextmanager
    def here(self, **env: str) -> Iterator[pytest.MonkeyPatch]:
        """This process in the repository; the fakes of clones note in it that they ran."""
        with pytest.MonkeyPatch.context() as patch:
            for name in [n for n in os.environ if n.startswith(("DVC_", "GIT_", "MLFLOW_"))]:
                patch.delenv(name)
            for name, value in {"FAKE_HOME": str(self.root), **env}.items():
                patch.setenv(name, value)
            patch.chdir(self.root)
            yield patch

    def capas(self, *words: str, **env: str) -> int:
        with self.here(**env):
            return cli.main(list(words))

    def state(self) -> dict[str, str]:
        """All that a command which only looks must leave alone."""
        files = [self.root / name for name in ("dvc.lock", "params.yaml", "mlflow.db")]
        return {
            "status": git(self.root, "status", "--porcelain"),
            "refs": git(self.root, "for-each-ref"),
            **{file.name: file.read_bytes().hex() for file in files},
        }
