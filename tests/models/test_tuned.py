"""The values with which the stages of a dvc.lock ran."""

from copy import deepcopy
from typing import Any

from capas.use.tuned_model import ran_with

LOCK: dict[str, Any] = {
    "train": {
        "params": {"params.yaml": {"lora.r": 8}},
        "outs": [{"path": "adapter"}],
    },
    "report": {
        "deps": [{"path": "adapter"}],
        "params": {"params.yaml": {"lora": {"preset": "old", "r": 4, "lora_alpha": 16}}},
        "outs": [{"path": "page"}],
    },
}


def test_an_earlier_stage_counts_where_a_later_one_has_not_run_since() -> None:
    before = deepcopy(LOCK)
    found = ran_with({"lora": {"preset": "new", "r": 8, "lora_alpha": 16}, "seed": 1}, LOCK)
    assert found == {"lora": {"preset": "new", "r": 8, "lora_alpha": 16}, "seed": 1}
    assert before == LOCK


def test_an_options_name_goes_with_its_values() -> None:
    found = ran_with({"lora": {"preset": "new", "r": 64, "lora_alpha": 16}}, LOCK)
    assert found == {"lora": {"preset": "old", "r": 8, "lora_alpha": 16}}
