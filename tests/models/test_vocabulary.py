"""A tokenizer with more tokens than its model has an embedding of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CONTROLS, run_stage, write_tokenizer, write_workspace

from capas.core.errors import CapasError
from capas.models.vocabulary import check_ids, num_rows
from stages import evaluate_model, sample_outputs, train_lora
from stages.fetch_tokenizer import warn_of_tokens_without_row

STAGES: dict[str, Callable[..., Any]] = {
    "train": train_lora.main,
    "evaluate_base": lambda params, stage: evaluate_model.main("base", params, stage),
    "sample": sample_outputs.main,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of 262 tokens, and a model of 261 rows."""
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"vocab_size": 261}')
    return tmp_path / "model"


def test_ids_without_a_row_are_named(folder: Path) -> None:
    check_ids([[0, 260], np.array([5])], (0,), folder, folder)
    for records, others in (([[0], np.array([1, 261])], ()), ([], (261,))):
        with pytest.raises(
            CapasError, match=r"261 rows .* ids 0 to 260, .*'<\|eot_id\|>' \(id 261\)"
        ):
            check_ids(records, others, folder, folder)


def test_where_the_rows_stand(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 7}}))
    assert num_rows(folder) == 7
    (folder / "config.json").write_text("{}")
    assert num_rows(folder) is None
    check_ids([[999]], (), folder, folder)


def test_fetch_tokenizer_warns(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_tokens_without_row(folder, "mymodel")
    assert (
        "mymodel: its tokenizer has '<|eot_id|>' (id 261), and its embedding has 261" in caplog.text
    )
    caplog.clear()
    for config in ('{"vocab_size": 262}', "{}"):
        (folder / "config.json").write_text(config)
        warn_of_tokens_without_row(folder, "mymodel")
    assert not caplog.records


@pytest.mark.parametrize("name", STAGES)
def test_stages_that_compute_stop_before_they_load_a_model(name: str, tmp_path: Path) -> None:
    write_workspace(tmp_path)
    quantized = tmp_path / "data/models/quantized"
    config = json.loads((quantized / "config.json").read_text())
    end = 256 + CONTROLS.index("<|im_end|>")
    (quantized / "config.json").write_text(json.dumps(config | {"vocab_size": end}))
    (quantized / "model.safetensors").unlink()
    if name == "sample":
        (tmp_path / "data/models/adapter").mkdir()
    with pytest.raises(CapasError, match=rf"use '<\|im_end\|>' \(id {end}\)"):
        run_stage(name, STAGES[name], tmp_path)
