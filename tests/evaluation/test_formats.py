"""The same questions in one chat format or another: when an answer ends, and what it scores."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capas.evaluation.formats import Format, ask
from capas.evaluation.generation import Completion
from capas.evaluation.scorer import Scorer

CHAT = {"bos_token_id": 1, "pad_token_id": 0, "stop_token_ids": [4, 2]}
RECORDS = [{"id": name, "reference": name, "metadata": ""} for name in ("a", "b")]


def test_an_answer_ends_at_an_end_token_of_either_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[Any] = []

    def complete(model: Any, prompts: Any, config: Any, batch_size: int) -> Any:
        asked_for.append((prompts, config.eos_token_id, config.max_new_tokens, batch_size))
        return [[Completion([97], True)], [Completion([99], False)]]

    def decode_batch(rows: list[list[int]], **_: Any) -> list[str]:
        return ["".join(map(chr, row)) for row in rows]

    monkeypatch.setattr("capas.evaluation.generation.complete", complete)
    (tmp_path / "metrics.json").write_text(json.dumps({"sources": {}}))
    scorer = Scorer(["exact_match", "valid_json"], tmp_path / "metrics.json")
    asked, tokenizer = Format([[5], [6, 7]], [10, 2]), SimpleNamespace(decode_batch=decode_batch)
    found = ask(None, RECORDS, asked, CHAT, scorer, tokenizer, 9, 2)
    assert asked_for == [([[5], [6, 7]], [4, 2, 10], 9, 2)]
    assert found.completions == ["a", "c"]
    assert (found.score, found.stop_rate) == (0.5, 0.5)
