"""The model that MLflow loads: it answers as it did in the evaluation, from what travels with it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from report_inputs import write_inputs
from workspace import REPOSITORY

from capas.core.dag import StageSpec, read_yaml
from capas.core.errors import CapasError
from capas.core.files import read_json
from capas.core.params import Params, select
from capas.core.stage import Stage
from capas.use import mlflow_model, served_model
from capas.use.card import write_card

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Hi"}


def publish_stage(root: Path) -> tuple[Stage, Params]:
    spec = StageSpec.read("publish", root)
    values = select(read_yaml(root / "params.yaml"), spec.params["params.yaml"])
    return Stage(spec, root), Params(values)


def facts_of(root: Path) -> tuple[Stage, dict[str, Any]]:
    stage, params = publish_stage(root)
    return stage, mlflow_model.served_facts(params, root, stage.dep)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("served"))


def test_a_prompt_comes_after_the_system_message_of_the_training() -> None:
    assert served_model.messages_of({"prompt": "Hi"}, "Be brief.", "user") == [SYSTEM, ASKED]
    assert served_model.messages_of({"prompt": "Hi", "messages": None}, None, "user") == [ASKED]
    assert served_model.messages_of({"prompt": "Once"}, None, "text")[0]["role"] == "text"


@pytest.mark.parametrize("given", [[SYSTEM, ASKED], json.dumps([SYSTEM, ASKED])])
def test_messages_may_be_a_list_or_json(given: Any) -> None:
    row = {"prompt": float("nan"), "messages": given}
    assert served_model.messages_of(row, "another", "user") == [SYSTEM, ASKED]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "expected a `prompt`"),
        ({"prompt": float("nan")}, "expected a `prompt`"),
        ({"messages": "{"}, "`messages` is not valid JSON"),
        ({"messages": "{}"}, "`messages` must be a list, not dict"),
        ({"messages": [{"role": "user"}]}, "role and content"),
        ({"messages": []}, "must end with"),
        ({"messages": [ASKED, {"role": "assistant", "content": "Hello"}]}, "must end with"),
    ],
)
def test_a_row_without_a_question_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(CapasError, match=message):
        served_model.messages_of(row, None, "user")


def test_a_large_base_is_named_instead_of_packed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert facts_of(root)[1]["base"]["packed"]
    monkeypatch.setattr(mlflow_model, "MAX_PACKED_BYTES", 1)
    base = facts_of(root)[1]["base"]
    assert not base["packed"]
    assert base["quantization"]["bnb_4bit_quant_type"] == "nf4"
    with pytest.raises(CapasError, match="Set CAPAS_BASE to a folder with this base"):
        served_model.base_folder(root, {**base, "hub": False})
    monkeypatch.setenv("CAPAS_BASE", str(root / "data/models/base"))
    assert served_model.base_folder(root, base) == root / "data/models/base"
    monkeypatch.setenv("CAPAS_BASE", str(root))
    with pytest.raises(CapasError, match=r"is not a model folder: it has no config\.json"):
        served_model.base_folder(root, base)


def test_a_base_on_the_hub_that_is_not_there_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    base = {"packed": False, "hub": True, "model_name_or_path": "owner/name"}
    with pytest.raises(CapasError, match=r"hf download owner/name --revision 0123"):
        served_model.base_folder(tmp_path, {**base, "revision": "0123", "trust_remote_code": False})


def test_the_card_says_from_what_with_which_scores_and_how_to_load(root: Path) -> None:
    _, facts = facts_of(root)
    reports = [read_json(root / f"reports/{n}.json") for n in ("evaluation_base", "evaluation")]
    source = read_json(root / "data/raw/source.json")
    values = {"lora.r": 16, "dataset.seed": 0, "chat_template.path": "conf/x/qwen.jinja"}
    card = write_card("42", "a1b2", values, facts, source, *reports)
    assert "| exact_match | 0 | 0.5 | +0.5 (+0.3 to +0.7) |" in card
    assert "Base model: `data/embedded`, licence apache-2.0" in card
    assert "Dataset: `embedded`, licence apache-2.0, 25 records" in card
    assert 'load_model("runs:/42/model")' in card
    assert "| `lora.r` | 16 |" in card
    assert "`capas rebuild 42`" in card
    assert "`qwen` (`chat_template.jinja`" in card
    assert "dataset.seed" not in card
    assert "Trained on from" not in card
    whole = write_card("42", "a1b2", {**values, "lora.r": None}, facts, source, *reports)
    assert "library_name: transformers" in whole and "tags:\n- capas\n" in whole
    assert "# All weights trained of data/embedded, training a1b2" in whole
    assert "PEFT" not in whole and "AutoModelForCausalLM.from_pretrained(FOLDER)" in whole
    start = {"adapter_name_or_path": "a/b", "adapter_revision": "01", "sha256": "ff"}
    started = write_card("42", "a1b2", values, facts, source, *reports, start)
    assert "- Trained on from the adapter `a/b` at `01`, sha256 `ff`." in started
    assert not card.count("base_model:")  # no model of the Hub
    named = {**facts, "base": {**facts["base"], "packed": False, "hub": True}}
    assert "base_model: data/embedded" in write_card("42", "a", values, named, source, *reports)


def test_the_code_that_travels_is_whole(root: Path) -> None:
    stage, _ = publish_stage(root)
    files = mlflow_model.code_files(stage)
    assert {"capas/use/served_model.py", "capas/__init__.py", "capas/chat/__init__.py"} <= set(
        files
    )
    before = mlflow_model.code_digest(stage)
    module = root / "capas/use/served_model.py"
    text = module.read_text()
    module.write_text(text + "\n")
    assert mlflow_model.code_digest(stage) != before
    module.write_text(text)


ANSWER = """
import json, sys
import mlflow.pyfunc, pandas as pd
import capas.use.served_model as served
model = mlflow.pyfunc.load_model(sys.argv[1])
asked = json.load(open(sys.argv[2]))
columns = {name: [row[name] for row in asked] for name in asked[0]}
print(json.dumps([served.__file__, list(model.predict(pd.DataFrame(columns))["completion"])]))
"""


@pytest.mark.slow
def test_the_loaded_model_answers_as_in_the_evaluation(tmp_path: Path) -> None:
    """40 records of the test split, in a process of its own, with the code that travels with the model."""
    if not (REPOSITORY / "reports/predictions.parquet").exists():
        pytest.skip("the pipeline has not run here: dvc repro, or dvc pull")
    stage, facts = facts_of(REPOSITORY)
    mlflow_model.write_data(tmp_path / "data", "# card\n", facts, stage)
    run = SimpleNamespace(start_time=0, id="0" * 32)
    mlflow_model.save_model(tmp_path / "model", tmp_path / "data", "key", run, stage, facts)
    raw = {r["id"]: r for r in pq.read_table(REPOSITORY / "data/raw/test.parquet").to_pylist()}
    rows = pq.read_table(REPOSITORY / "reports/predictions.parquet").to_pylist()[::12][:40]
    told = [
        [{k: m[k] for k in ("role", "content")} for m in raw[row["id"]]["messages"][:-1]]
        for row in rows
    ]
    single = [i for i, messages in enumerate(told) if len(messages) == 2]
    assert len(rows) == 40
    assert len(single) > 20
    expected = [row["completion"] for row in rows]
    assert answers(tmp_path, [{"messages": messages} for messages in told]) == expected
    prompts = [{"prompt": told[i][-1]["content"]} for i in single]
    assert answers(tmp_path, prompts) == [expected[i] for i in single]


def answers(folder: Path, asked: list[dict[str, Any]]) -> list[str]:
    (folder / "asked.json").write_text(json.dumps(asked))
    arguments = ["-c", ANSWER, str(folder / "model"), str(folder / "asked.json")]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder / "model/code"), "HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, completions = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(folder / "model/code")
    return list(completions)
