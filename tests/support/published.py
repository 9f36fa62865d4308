"""The outputs of all stages, published to a store of MLflow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_inputs import write_inputs

from capas.core.dag import StageSpec, read_yaml, recorded, recorded_key
from capas.core.params import Params, select
from capas.core.stage import Stage
from capas.core.worktree import git
from capas.tracking.store import Store
from stages import publish_run

MARKER = "reports/.published"


def publish(root: Path) -> None:
    spec = StageSpec.read("publish", root)
    values = select(read_yaml(root / "params.yaml"), spec.params["params.yaml"])
    stage = Stage(spec, root)
    publish_run.main(Params(values), stage)
    stage.finish()


def published(folder: Path) -> Iterator[Path]:
    """Yield a result in `folder` that is published already."""
    write_inputs(folder)
    lock = recorded(folder)
    git(folder, "init", "-q")
    git(folder, "config", "user.name", "Ana García")
    (folder / "reports/timings").mkdir()
    keys = {name: recorded_key(lock[name]) for name in ("train", "publish") if name in lock}
    assert len(keys) == 2
    for name, key in {**keys, "format": "of other inputs"}.items():
        timing = {"key": key, "ended": 1_700_000_012.5, "seconds": 12.5}
        timing |= {"cpu_seconds": 20.0, "peak_memory_bytes": 1000}
        timing |= {"estimated_memory_bytes": 900} if name == "train" else {}
        (folder / f"reports/timings/{name}.json").write_text(json.dumps(timing))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT"):
            patch.delenv(name, raising=False)
        publish(folder)
        yield folder


def the_run(root: Path) -> tuple[Store, Any]:
    store = Store.open(root, "capas")
    (found,) = store.client.search_runs([store.experiment_id])
    return store, found


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values}))
