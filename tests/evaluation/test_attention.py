"""Eager attention against sdpa: both are computed, and the model is left as it was."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, read_json
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from capas.evaluation.attention import MAX_SEQUENCES, MAX_TOKENS, Comparison, compare
from stages.sample_outputs import compare_attention

SEQUENCES = [list(range(1, 60)), list(range(100, 120))]


def compared(**config: Any) -> Comparison:
    return compare(make_model(initializer_range=0.3, **config).eval(), SEQUENCES)


def test_the_implementations_round_differently_and_agree() -> None:
    found = compared()
    facts = found.facts
    assert (facts["used"], facts["dtype"], facts["device"]) == ("sdpa", "float32", "cpu")
    assert (facts["num_sequences"], facts["num_tokens"]) == (2, 79)
    assert facts["num_same_next_token"] == 79
    assert 0 < facts["largest_logit_difference"] < 1e-5 * facts["largest_logit"]
    assert set(found.seconds) == {"eager", "sdpa"} and min(found.seconds.values()) > 0
    assert compared().facts == facts


def test_the_function_of_each_implementation_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return original(*args, **kwargs)[0] * 0.5, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", wrong)
    facts = compared().facts
    assert facts["largest_logit_difference"] > 0.01 * facts["largest_logit"]
    assert facts["num_same_next_token"] < 79


def test_the_model_keeps_its_own_implementation_and_its_adapter() -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).eval()
    facts = compare(adapted, SEQUENCES).facts
    assert facts["used"] == model.config._attn_implementation == "eager"
    with adapted.disable_adapter():
        assert compare(adapted, SEQUENCES).facts["largest_logit"] != facts["largest_logit"]


def test_a_few_short_sequences_are_enough() -> None:
    facts = compare(make_model().eval(), [[5] * 300] * (MAX_SEQUENCES + 1)).facts
    assert facts["num_sequences"] == MAX_SEQUENCES
    assert facts["num_tokens"] == MAX_SEQUENCES * MAX_TOKENS


def written_by_stage(model: PreTrainedModel, root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts that the stage writes, and its costs."""
    stage: Any = SimpleNamespace(out=lambda path: root / Path(path).name, costs={})
    compare_attention(model, SEQUENCES, stage)
    return read_json(root / "attention.json"), stage.costs


def test_what_cannot_be_compared_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "capas")
    facts, costs = written_by_stage(make_model(), tmp_path)
    assert facts["skipped"] is None and set(costs["attention_seconds"]) == {"eager", "sdpa"}
    assert "seconds" not in str(facts)

    capped = make_model()
    capped.config.attn_logit_softcapping = 50.0
    facts, costs = written_by_stage(capped, tmp_path)
    assert facts["skipped"] == (
        "Qwen2ForCausalLM caps the logits of its attention, which sdpa leaves out"
    )
    assert facts["largest_logit_difference"] is None and costs == {}
    assert "are not compared: Qwen2ForCausalLM caps" in caplog.text

    for change, reason in {
        "_can_set_attn_implementation": "cannot change its attention from sdpa to eager",
        "_check_and_adjust_attn_implementation": "has no eager attention: none",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, change, refuse(change))
            facts, _ = written_by_stage(make_model(), tmp_path)
        assert facts["skipped"] == f"Qwen2ForCausalLM {reason}"


def refuse(name: str) -> Any:
    def refused(self: Any, *args: Any, **kwargs: Any) -> bool:
        if name == "_can_set_attn_implementation":
            return False
        if args and args[0] == "eager" and not kwargs.get("is_init_check", True):
            raise ValueError("none")
        return args[0]  # type: ignore[no-any-return]

    return refused
