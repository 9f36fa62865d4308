"""The stages from `fetch` to `format`, run in a folder on the shipped configuration with overrides."""

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import REPOSITORY
from shipped import composed

from capas.core.dag import StageSpec
from capas.core.params import Params, select
from capas.core.records import FORMATTED, RAW, SPLITS, read_records
from capas.core.stage import Stage
from capas.hub.sources import folder_revision
from stages import fetch_dataset, fetch_tokenizer, format_chat, tokenize_messages

MAINS = {
    "fetch": fetch_dataset.main,
    "fetch_tokenizer": fetch_tokenizer.main,
    "tokenize": tokenize_messages.main,
    "format": format_chat.main,
}
SHRUNK = ("dataset.num_train=24", "dataset.num_validation=4", "dataset.num_test_per_kind=2")


class DataSide:
    """One workspace. `root/tokenizer` stands for a model's folder."""

    def __init__(self, root: Path, tokenizer: Path) -> None:
        self.root = root
        shutil.copy(REPOSITORY / "dvc.yaml", root / "dvc.yaml")
        shutil.copytree(tokenizer, root / "tokenizer")
        (root / "data/own").mkdir(parents=True)

    def run(self, *names: str, overrides: tuple[str, ...] = ()) -> "DataSide":
        """Run stages (all of them where none is named) with Hydra overrides."""
        local = f"model.revision='{folder_revision(self.root / 'tokenizer')}'"
        values = composed([*SHRUNK, "model.model_name_or_path=tokenizer", local, *overrides])
        template = self.root / "data/composed/chat_template.jinja"
        template.parent.mkdir(parents=True, exist_ok=True)
        path = values["chat_template"]["path"]
        template.write_text("" if path.startswith("model") else (REPOSITORY / path).read_text())
        for name in names or MAINS:
            spec = StageSpec.read(name, self.root)
            stage = Stage(spec, self.root)
            MAINS[name](Params(select(values, spec.keys)), stage)
            stage.finish()
        return self

    def json(self, path: str) -> Any:
        return json.loads((self.root / path).read_text(encoding="utf-8"))

    def own(self, name: str, *rows: Any) -> str:
        """Rows as a JSONL file in data/own; its name for dataset.data_files."""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self.root / "data/own" / name).write_text(lines)
        return f"data/own/{name}"

    def raw(self) -> dict[str, list[dict[str, Any]]]:
        files = {split: self.root / f"data/raw/{split}.parquet" for split in SPLITS}
        return {split: list(read_records(file, RAW)) for split, file in files.items()}

    def formatted(self, split: str) -> list[dict[str, Any]]:
        return list(read_records(self.root / f"data/formatted/{split}.parquet", FORMATTED))

    def files(self) -> dict[str, bytes]:
        """Everything that the stages wrote."""
        made = [f for top in ("data", "reports") for f in sorted((self.root / top).rglob("*"))]
        return {str(f.relative_to(self.root)): f.read_bytes() for f in made if f.is_file()}
