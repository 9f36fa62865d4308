"""A mixture of experts is refused, whatever its family calls its experts; a dense model is not."""

import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from capas.core.errors import CapasError
from capas.models.architecture import check_dense
from capas.models.coverage import check_modules_dense

# Families whose default configuration is dense, and what makes experts of it.
DENSE_BY_DEFAULT: dict[str, dict[str, Any]] = {
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 128},
    "gemma4": {"text_config": {"enable_moe_block": True, "num_experts": 128}},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 128},
    "hunyuan_v1_moe": {"num_experts": [64, 64]},
}
CODE = Path((find_spec("transformers") or pytest.fail()).origin or "").parent / "models"


def is_dense(config: dict[str, Any]) -> bool:
    try:
        check_dense(config, "org/name")
    except CapasError as error:
        assert "a mixture of experts" in str(error)
        return False
    return True


def default(kind: str) -> dict[str, Any] | None:
    """config.json of a family as transformers fills it in; None where it needs values."""
    try:
        return dict(AutoConfig.for_model(kind).to_dict())
    except (ValueError, StrictDataclassError):
        return None


def has_experts(kind: str) -> bool:
    """Whether the code of the family in transformers has a layer of experts."""
    files = (CODE / model_type_to_module_name(kind)).glob("modeling_*.py")
    layer = re.compile(r"^class \w*(Experts|CDMoE)\w*\(", re.MULTILINE)
    return any(layer.search(file.read_text(encoding="utf-8")) for file in files)


def test_every_family_with_experts_is_refused_and_no_other() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {kind: default(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    configs = {kind: config for kind, config in found.items() if config is not None}
    assert len(configs) > 150
    refused = {kind for kind, config in configs.items() if not is_dense(config)}
    assert refused == {kind for kind in configs if has_experts(kind)} - DENSE_BY_DEFAULT.keys()
    assert len(refused) > 40
    for kind, experts in DENSE_BY_DEFAULT.items():
        assert not is_dense(configs[kind] | experts), kind


@pytest.mark.parametrize(
    ("config", "dense"),
    [
        ({"model_type": "granitemoehybrid", "num_local_experts": 0}, True),
        ({"model_type": "jamba", "num_experts": 1, "num_experts_per_tok": 2}, True),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*"}, True),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "ME*", "num_experts": 8}, False),
        ({"model_type": "own", "n_routed_experts": 64, "num_shared_experts": 2}, False),
        ({"model_type": "own", "n_shared_experts": 2}, True),
        ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, False),
    ],
)
def test_what_counts_is_the_number_of_routed_experts(config: dict[str, Any], dense: bool) -> None:
    assert is_dense(config) is dense


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "jetmoe"])
def test_experts_that_config_json_does_not_name_are_seen_in_the_model(kind: str) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(CapasError, match=r"org/name is a mixture of experts \(.*layer .* is a"):
        check_modules_dense(model, "org/name")
