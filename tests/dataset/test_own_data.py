"""The README's lines for one's own records, followed literally: real Spanish records, a Hub on loopback."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from architectures import write_small
from dataside import MAINS
from hub import Hub, use
from tiny import run_stage
from workspace import Workspace, make_workspace, stages_run

from capas.chat.format import ChatFormat
from capas.core.records import FORMATTED, IGNORE_INDEX, read_records

README = Path(__file__).resolve().parents[2] / "README.md"
TOKENIZERS = {"qwen2.5_0.5b_instruct": "qwen2.5", "llama_3.2_1b_instruct": "llama3"}
SHORT = """\
dataset: {max_records: 80}
trainer: {max_steps: 2, logging_steps: 1, eval_steps: 2, save_steps: 2}
evaluation: {max_records: 2, max_new_tokens: 4, bootstrap_resamples: 100}
generation: {num_prompts: 1, num_return_sequences: 1, max_new_tokens: 4}
"""


JSONL = {"model": "llama_3.2_1b_instruct", "dataset": "own_jsonl", "trainer": "qlora"}


def recipes(readme: Path) -> list[dict[str, str]]:
    """{group: option} of each block with lines of conf/config.yaml."""
    blocks = re.findall(
        r"```yaml\n# conf/config.yaml\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL
    )
    return [dict(re.findall(r"^  - (\w+): (\S+)", block, re.MULTILINE)) for block in blocks]


def test_both_readmes_give_the_same_lines() -> None:
    found = recipes(README)
    assert found == recipes(README.with_suffix(".es.md"))
    assert [(recipe["model"], recipe["dataset"]) for recipe in found] == [
        ("qwen2.5_0.5b_instruct", "support"),
    ]


@pytest.fixture(params=[0, 1], ids=["csv_qwen", "jsonl_llama"])
def own(
    request: pytest.FixtureRequest, tmp_path: Path, kit: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Workspace, dict[str, str]]]:
    """A clone in which somebody followed the README; the Hub has a tiny model of that architecture."""
    recipe = [*recipes(README), JSONL][request.param]
    root = tmp_path / "clone"
    root.mkdir()
    workspace = make_workspace(root)
    write_records(kit, tmp_path, root / "data/own")
    if recipe["dataset"] == "support":
        words = ("check", str(tmp_path / "support.csv"), "--write")
        workspace.run(sys.executable, "-m", "capas", *words)
    for group, option in recipe.items():
        config = workspace.read("conf/config.yaml")
        (root / "conf/config.yaml").write_text(
            re.sub(rf"^  - {group}: \w+.*$", f"  - {group}: {option}", config, flags=re.MULTILINE)
        )
    (root / "conf/overrides.yaml").write_text(SHORT)
    with Hub() as hub:
        name = yaml.safe_load(workspace.read(f"conf/model/{recipe['model']}.yaml"))[
            "model_name_or_path"
        ]
        hub.commit(f"models/{name}", repository(recipe["model"], kit, tmp_path / "model"))
        use(hub, tmp_path / "home", monkeypatch)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield workspace, recipe


def write_records(kit: Path, elsewhere: Path, folder: Path) -> None:
    """Write support.csv somewhere, and mine.jsonl to `folder`, which is data/own."""
    rows = [json.loads(line) for line in (kit / "data/xquad_es.jsonl").open(encoding="utf-8")]
    pairs = [(f"{row['instruction']}\n\n{row['input']}", row["output"]) for row in rows]
    with (elsewhere / "support.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows(pairs)
    lines = (
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "mine.jsonl").write_text(text, encoding="utf-8")


def repository(model: str, kit: Path, folder: Path) -> dict[str, bytes]:
    """Real tokenizer, random weights of a few layers."""
    tokenizer = kit / "tok" / TOKENIZERS[model]
    files = {f.name: f.read_bytes() for f in tokenizer.glob("*.json*")}
    files["chat_template.jinja"] = (tokenizer / "chat_template.jinja").read_bytes()
    # Llama 3.1 called one of Llama 3's reserved tokens so.
    old, new = b"<|reserved_special_token_2|>", b"<|finetune_right_pad_id|>"
    files["tokenizer.json"] = files["tokenizer.json"].replace(old, new)
    vocabulary = max(t["id"] for t in json.loads(files["tokenizer.json"])["added_tokens"]) + 1
    folder.mkdir()
    write_small(model, vocabulary, folder)
    return {**{f.name: f.read_bytes() for f in folder.iterdir()}, **files}


def repro(workspace: Workspace, *targets: str) -> str:
    return workspace.repro(*targets, HF_HUB_OFFLINE="0")


def test_up_to_the_mask(
    own: tuple[Workspace, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages as DVC orders them (test_dag.py), in this process; in the slow tier DVC runs them."""
    workspace, recipe = own
    workspace.run("python", "stages/compose_params.py", HF_HUB_OFFLINE="0")
    monkeypatch.chdir(workspace.root)
    for name, main in MAINS.items():
        run_stage(name, main, workspace.root)
    check_masks(workspace.root)
    pins = yaml.safe_load(workspace.read("conf/revisions.yaml"))["models"]
    assert list(pins.values()) == [
        yaml.safe_load(workspace.read("params.yaml"))["model"]["revision"]
    ]
    assert recipe["dataset"] in workspace.read("params.yaml")


@pytest.mark.slow
def test_all_stages(own: tuple[Workspace, dict[str, str]]) -> None:
    workspace, recipe = own
    log = repro(workspace, "format")
    assert set(stages_run(log)) == {"compose", *MAINS}, log
    assert "didn't change, skipping" in workspace.repro("format", HF_HUB_OFFLINE="1")
    log = repro(workspace)
    assert stages_run(log)[-3:] == ["sample", "report", "publish"], log
    source = json.loads(workspace.read("data/raw/source.json"))
    assert sum(split["num_records"] for split in source["splits"].values()) == 80
    name = "support.csv" if recipe["dataset"] == "support" else "mine.jsonl"
    assert name in workspace.read("reports/index.es.html")
    assert json.loads(workspace.read("reports/metrics/tuned.json"))["loss"] > 0


def check_masks(root: Path) -> None:
    """Trained is the answer and its end token, as the records say, whoever made the ids."""
    facts: dict[str, Any] = json.loads((root / "data/formatted/chat.json").read_text())
    chat = ChatFormat.load(
        (root / "data/formatted/chat_template.jinja").read_text(encoding="utf-8"),
        root / "data/models/tokenizer",
        facts["date_string"],
        facts["system"],
        facts["allowed_tokens"],
    )
    records = list(read_records(root / "data/formatted/train.parquet", FORMATTED))
    assert len(records) > 40
    for record in records:
        trained = [label for label in record["labels"] if label != IGNORE_INDEX]
        assert chat.decode(trained) == record["reference"].strip() + facts["end_token"]
        assert "xquad" not in record["metadata"]
