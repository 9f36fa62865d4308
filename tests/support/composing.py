"""The compose stage in this process, and a repository whose pipeline is compose alone."""

import sys
from pathlib import Path

import pytest
import yaml
from workspace import Workspace, make_workspace

from capas.config.composition import composer, dump
from capas.core.errors import exit_on_user_error
from stages.compose_params import main, parse_options


class Composing(Workspace):
    """Composes in this process. Where `dvc` has a part in what is tested, a test runs it."""

    def __init__(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        super().__init__(root)
        self.caplog = caplog

    def compose(self, *options: str, **env: str) -> str:
        """What `python stages/compose_params.py` logs; SystemExit with its message where it refuses."""
        self.caplog.clear()
        with pytest.MonkeyPatch.context() as patch, exit_on_user_error("compose"):
            patch.chdir(self.root)
            patch.setattr(sys, "argv", ["compose_params.py", *options])
            patch.delenv("DVC_EXP_NAME", raising=False)
            for name, value in env.items():
                patch.setenv(name, value)
            main(parse_options())
        return "\n".join(self.caplog.messages)

    def refusal(self, *options: str, **env: str) -> str:
        with pytest.raises(SystemExit) as ended:
            self.compose(*options, **env)
        return str(ended.value.code)

    def experiment(self, *overrides: str) -> str:
        """What `dvc exp run -S` does: params.yaml as DVC composes it, and its variable for the stage."""
        with composer(self.root / "conf") as run:
            _, values = dump(run(list(overrides))).split("\n", 1)
        (self.root / "params.yaml").write_text(values)
        return self.compose(DVC_EXP_NAME="tried")


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A pipeline of compose alone: what follows it is tested in the slow tier."""
    workspace = make_workspace(tmp_path_factory.mktemp("compose"))
    dvc_yaml = yaml.safe_load(workspace.read("dvc.yaml"))
    only_compose = {"stages": {"compose": dvc_yaml["stages"]["compose"]}}
    (workspace.root / "dvc.yaml").write_text(yaml.safe_dump(only_compose))
    (workspace.root / "dvc.lock").unlink(missing_ok=True)
    workspace.repro("compose")
    workspace.commit()
    return workspace
