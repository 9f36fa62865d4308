"""What reruns after an edit: of every leaf key, every package, every digest of code, every dep.

`dvc status` is asked in a clone whose dvc.lock is the committed one; outputs are not needed for it. It names
what changed for which stage, so that everything is edited at once.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_yaml import NAMES, spec
from workspace import Workspace, make_workspace

from capas.core.params import flatten

PARAMS_FILES = ("params.yaml", "code.yaml", "environment.yaml")
COMPUTE = ["quantize", "evaluate_base", "train", "evaluate", "sample"]
READ_MODEL = ["evaluate_base", "train", "evaluate", "sample"]
FETCH_MODEL = ["fetch_tokenizer", "fetch_model"]
# The longest prefix of a key decides. `report` shows every value but those of tracking; what `publish` names
# here is what the model that it writes for MLflow answers with.
EXPECTED: dict[str, list[str]] = {
    "hardware": [*COMPUTE, "report", "publish"],
    "hardware.preset": ["report"],
    "hardware.dtype": ["report"],  # model.dtype has its value
    "hardware.num_processes": ["train", "report"],
    "hardware.num_machines": ["train", "report"],
    "hardware.distributed_type": ["train", "report"],
    "model.preset": ["report"],
    "model.licence": ["report", "publish"],
    "model.model_name_or_path": [*FETCH_MODEL, "train", "report", "publish"],
    "model.revision": [*FETCH_MODEL, "train", "report", "publish"],
    "model.pad_token": ["format", "report"],
    "model.cpu_instruction_set": ["report"],  # hardware.instruction_set has its value
    "model.cpu_num_threads": ["report"],  # and hardware.num_threads this one's
    "model.trust_remote_code": [*FETCH_MODEL, *COMPUTE, "report", "publish"],
    "model.dtype": [*COMPUTE, "report", "publish"],
    "model.attn_implementation": [*READ_MODEL, "report", "publish"],
    "dataset": ["fetch", "report"],
    "dataset.preset": ["report"],
    "dataset.max_length": ["format", "report"],
    "dataset.overflow": ["format", "report"],
    "dataset.overflow_budget_fraction": ["format", "report"],
    "chat_template": ["format", "report"],
    "chat_template.preset": ["report"],
    "chat_template.allowed_tokens": ["tokenize", "format", "report"],
    "chat_template.contrast": ["report"],  # generation.wrong_chat_template has its value
    "chat_template.train_on": ["format", "report"],
    "quantization": ["quantize", "report", "publish"],
    "quantization.preset": ["report", "publish"],
    "lora": ["train", "report"],
    "lora.preset": ["report"],
    "lora.adapter_name_or_path": ["fetch_model", "train", "report"],
    "lora.adapter_revision": ["fetch_model", "train", "report"],
    "trainer": ["train", "report"],
    "trainer.preset": ["report"],
    "evaluation": ["evaluate", "report"],
    "evaluation.preset": ["report"],
    "evaluation.batch_size": ["evaluate_base", "evaluate", "report", "publish"],
    "evaluation.labels": ["evaluate_base", "evaluate", "report"],
    "evaluation.max_new_tokens": ["evaluate_base", "evaluate", "report", "publish"],
    "evaluation.max_records": ["evaluate_base", "evaluate", "report"],
    "evaluation.metrics": ["evaluate_base", "evaluate", "sample", "report"],
    "evaluation.noise_records": ["evaluate_base", "evaluate", "report"],
    "generation": ["sample", "report"],
    "generation.preset": ["report"],
    "generation.system": ["sample", "report", "publish"],
    "tracking": ["publish"],
    "experiment": [],
    "seed": ["report"],
}

INSIDE = {  # a file of each folder that is a dep
    "conf": "conf/trainer/_base.yaml",
    "conf/chat_template": "conf/chat_template/qwen.yaml",
    "data/own": "data/own/mine.jsonl",
    "capas": "capas/training/trainer.py",
    "stages": "stages/train_lora.py",
}
# Every dep: what has to be computed again when it is another.
FILES: dict[str, list[str]] = {
    "capas": ["compose"],  # which computes the digests of the code
    "stages": ["compose"],
    "requirements.lock": ["compose"],
    "conf": ["compose"],
    "conf/chat_template": ["report"],
    "conf/overrides.yaml": ["report"],
    "data/composed/chat_template.jinja": ["format"],
    "data/composed/checkpoint_metric.json": ["train"],
    "data/composed/harness.json": ["evaluate"],
    "data/composed/metrics.json": ["evaluate_base", "evaluate", "sample"],
    "data/composed/prompts.json": ["sample"],
    "data/composed/wrong_chat_template.jinja": ["sample"],
    "data/embedded/manifest.json": FETCH_MODEL,
    "data/embedded/tokenizer.json": ["fetch_tokenizer"],
    "data/embedded/tokenizer_config.json": ["fetch_tokenizer"],
    "data/embedded/config.json": ["fetch_model"],
    "data/embedded/generation_config.json": ["fetch_model"],
    "data/embedded/model.safetensors": ["fetch_model"],
    "data/general/records.jsonl": ["evaluate"],
    "data/own": ["compose", "fetch"],
    "data/raw": ["tokenize", "evaluate_base", "sample", "report", "publish"],
    "data/models/tokenizer": ["tokenize", "format", *READ_MODEL, "report"],
    "data/tokenized": ["format"],
    "data/formatted": [*READ_MODEL, "report", "publish"],
    "data/models/base": ["quantize", "evaluate_base", "report"],
    "data/models/initial_adapter": ["train"],
    "data/models/quantized": [*READ_MODEL, "report", "publish"],
    "data/models/adapter": ["evaluate", "sample", "report", "publish"],
    "reports/evaluation_base.json": ["evaluate", "report", "publish"],
    "reports/predictions_base.parquet": ["evaluate", "report", "publish"],
    "reports/predictions_base_alone.parquet": ["evaluate"],
    "reports/predictions_nearest.parquet": ["evaluate", "report"],
    "reports/certificate.json": ["publish"],
    "reports/evaluation.json": ["report", "publish"],
    "reports/format.json": ["report", "publish"],
    "reports/history.csv": ["report", "publish"],
    "reports/predictions.parquet": ["report", "publish"],
    "reports/quantization.json": ["report", "publish"],
    "reports/samples.jsonl": ["report", "publish"],
    "reports/train.json": ["report", "publish"],
    "reports/validation.csv": ["report", "publish"],
    "reports/lengths.csv": ["report"],
    "reports/next_token.csv": ["report"],
    "reports/answer_loss.csv": ["report"],
    "reports/attention.json": ["report"],
    "reports/quantization_error.csv": ["report"],
    "reports/samples.json": ["report"],
    "reports/samples.md": ["publish"],
    "reports/mask.html": ["publish"],
    "reports/mask.es.html": ["publish"],
    "reports/index.html": ["publish"],
    "reports/index.es.html": ["publish"],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("invalidation"))


def due(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """{dep or params file: {stage: what `dvc status` calls modified or new there}}."""
    status = json.loads(workspace.run("dvc", "status", "--json").splitlines()[-1])
    found: dict[str, dict[str, Any]] = {}
    for stage, entries in status.items():
        for entry in (e for e in entries if isinstance(e, dict)):
            for file, change in entry.get("changed deps", {}).items():
                if change not in ("deleted", {}):
                    found.setdefault(file, {})[stage] = change
    return found


@contextlib.contextmanager
def edited(workspace: Workspace, files: Iterable[str]) -> Iterator[None]:
    """With a comment at the end. Outputs of stages are not there in a fresh clone: one is made for each."""
    paths = [workspace.root / file for file in files]
    originals = {path: path.read_bytes() if path.exists() else None for path in paths}
    for path, original in originals.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((original or b"") + b"\n# a comment\n")
    try:
        yield
    finally:
        for path, original in originals.items():
            path.unlink() if original is None else path.write_bytes(original)


def mutated(value: Any) -> Any:
    """Every leaf another one."""
    if isinstance(value, dict) and value:
        return {key: mutated(inner) for key, inner in value.items()}
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {"x": 1} if isinstance(value, dict) else f"{value}x"


def expected_stages(key: str) -> set[str]:
    prefixes = [p for p in EXPECTED if key == p or key.startswith(p + ".")]
    return set(EXPECTED[max(prefixes, key=len)])


@pytest.fixture(scope="module")
def changes(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """What is due when every key, every package, every digest and every dep was edited."""
    yaml_files = {name: yaml.safe_load(workspace.read(name)) for name in PARAMS_FILES}
    others = [INSIDE.get(dep, dep) for dep in FILES]
    with edited(workspace, [*yaml_files, *others]):
        for name, values in yaml_files.items():
            (workspace.root / name).write_text(yaml.safe_dump(mutated(values)))
        return due(workspace)


def test_nothing_is_due_in_a_fresh_clone_but_what_is_missing(workspace: Workspace) -> None:
    assert due(workspace) == {}


def test_every_key_reruns_exactly_the_stages_of_the_table(
    workspace: Workspace, changes: dict[str, dict[str, Any]]
) -> None:
    wrong, keys = {}, flatten(yaml.safe_load(workspace.read("params.yaml")))
    for key in keys:
        found = {
            stage
            for stage, groups in changes["params.yaml"].items()
            if any(f"{key}.".startswith(f"{group}.") for group in groups)
        }
        if found != expected_stages(key):
            wrong[key] = sorted(found)
    assert wrong == {}
    assert len(keys) > 90


def test_every_package_reruns_the_stages_that_declare_it(
    workspace: Workspace, changes: dict[str, dict[str, Any]]
) -> None:
    packages = yaml.safe_load(workspace.read("environment.yaml"))
    found = {stage: set(names) for stage, names in changes["environment.yaml"].items()}
    declared = {n: s.params for n in NAMES if "environment.yaml" in (s := spec(n)).params}
    assert found == {
        n: set(params["environment.yaml"] or packages) for n, params in declared.items()
    }
    assert len(packages) > 10


def test_a_digest_of_code_reruns_its_stage(changes: dict[str, dict[str, Any]]) -> None:
    """Which files a digest covers: tests/core/test_code_digests.py."""
    found = {stage: list(digests) for stage, digests in changes["code.yaml"].items()}
    scripts = {name: [Path(spec(name).cmd.split()[1]).stem] for name in NAMES}
    assert found == {name: script for name, script in scripts.items() if name != "compose"}


def test_every_other_dep_reruns_exactly_the_stages_of_the_table(
    changes: dict[str, dict[str, Any]],
) -> None:
    assert {dep for name in NAMES for dep in spec(name).deps} == set(FILES)
    found = {file: set(stages) for file, stages in changes.items() if file not in PARAMS_FILES}
    assert found == {dep: set(stages) for dep, stages in FILES.items()}
