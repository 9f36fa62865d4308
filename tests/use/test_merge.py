import argparse
import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from capas.core.errors import CapasError
from capas.models.coverage import quantized_linears
from capas.models.loading import dequantize
from capas.use import merge, tuned_model
from capas.use.merge import INT8_TOLERANCE, TOLERANCE, compare, difference, logits, merged

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"load_in_8bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_use_double_quant": True,
    },
}
DORA = {"use_dora": True}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    DORA,
    {"bias": "all"},
    {"target_modules": ["q_proj", "down_proj"]},
    {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}},
]
# PEFT's DoRA cannot go through an int8 layer: compose refuses it.
KINDS = [(m, v) for m in METHODS for v in VARIANTS if (m, v) != ("int8", DORA)]
IDS = [[5, 40, 77, 130, 9, 260, 31, 8], [100, 3, 3, 250]]


def adapted(folder: Path, method: str, **lora: Any) -> Any:
    """A model with an adapter that changes it: B is not zero."""
    how = METHODS[method]
    quantized = {"quantization_config": BitsAndBytesConfig(**how)} if how else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **quantized).eval()
    config = LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    )
    model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name or (weight.requires_grad and name.endswith("bias")):
            torch.nn.init.normal_(weight, std=0.1)
    return model


def reloaded(plain: Any, folder: Path) -> Any:
    plain.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def largest_difference(model: Any, expected: list[torch.Tensor]) -> float:
    found = [logits(model, ids) for ids in IDS]
    biggest = max(float(row.abs().max()) for row in expected)
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs) / biggest


@pytest.mark.parametrize(("method", "variant"), KINDS, ids=str)
def test_the_merged_model_is_the_adapted_one(
    tiny_model_dir: Path, tmp_path: Path, method: str, variant: dict[str, Any]
) -> None:
    model = adapted(tiny_model_dir, method, **variant)
    expected = [logits(model, ids) for ids in IDS]
    with model.disable_adapter():
        base = [logits(model, ids) for ids in IDS]
    plain = reloaded(merged(model, torch.float32, False), tmp_path)
    tolerance = INT8_TOLERANCE if method == "int8" else TOLERANCE["float32"]
    assert largest_difference(plain, expected) < tolerance
    assert largest_difference(plain, base) > tolerance
    assert not hasattr(plain.config, "quantization_config")


def test_a_sum_that_is_quantized_again_is_refused(tiny_model_dir: Path) -> None:
    """What `merge_and_unload` does by itself."""
    model = adapted(tiny_model_dir, "nf4")
    expected = [logits(model, ids) for ids in IDS]
    assert largest_difference(model.merge_and_unload(), expected) > TOLERANCE["float32"]


def test_layers_without_adapter_are_dequantized(tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir, "nf4", target_modules=["q_proj"])
    wanted = {
        n: dequantize(m) for n, m in quantized_linears(model.get_base_model()) if "up_proj" in n
    }
    plain = merged(model, torch.float32, False)
    assert len(wanted) == 2
    for name, weight in wanted.items():
        assert torch.equal(plain.get_submodule(name).weight, weight)


def test_the_layers_of_gpt2(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4)).save_pretrained(
        tmp_path
    )
    model = adapted(tmp_path, "none", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    expected = [logits(model, ids) for ids in IDS]
    plain = reloaded(merged(model, torch.float32, False), tmp_path / "merged")
    assert largest_difference(plain, expected) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_written_is_compared(tiny_model_dir: Path, tmp_path: Path, dtype: str) -> None:
    model = adapted(tiny_model_dir, "nf4")
    expected = [logits(model, ids) for ids in IDS]
    merged(model, getattr(torch, dtype), False).save_pretrained(tmp_path)
    facts = compare(tmp_path, dtype, False, IDS, expected)
    assert 0 < facts["difference"] < TOLERANCE[dtype]
    assert facts["num_tokens"] == sum(map(len, IDS))
    wrong = compare(tmp_path, dtype, False, IDS, [-row for row in expected])
    assert wrong["difference"] > 1


def test_a_weight_that_is_no_number_is_named(tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir, "nf4")
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    torch.nn.init.constant_(layer.lora_B["default"].weight, float("nan"))
    with pytest.raises(CapasError, match=r"model\.layers\.1\.mlp\.up_proj cannot be merged"):
        merged(model, torch.float32, False)


def test_logits_that_are_no_numbers_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Also where the first prompt has none of them."""
    model = adapted(tiny_model_dir, "none")
    expected = [logits(model, ids) for ids in IDS]
    plain = merged(model, torch.float32, False)
    with torch.no_grad():
        plain.get_input_embeddings().weight[250] = float("nan")
    plain.save_pretrained(tmp_path)
    with pytest.raises(
        CapasError, match=r"has NaN or infinite logits in float16, .* --dtype bfloat16"
    ):
        compare(tmp_path, "float16", False, IDS, expected)
    found = [expected[0], expected[1] * float("nan")]
    assert math.isnan(difference(found, expected))


@pytest.mark.parametrize(("difference", "code"), [(0.1, 0), (0.3, 1), (float("nan"), 1)])
def test_a_model_that_differs_is_not_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    difference: float,
    code: int,
) -> None:
    facts = {"difference": difference, "tolerance": 0.2, "adapter_difference": 1.0, "max_logit": 9}
    facts |= {"dtype": "bfloat16", "num_same_next_token": 3, "num_tokens": 4}

    def write(_: Any, folder: Path, *options: Any) -> dict[str, Any]:
        folder.mkdir()
        return facts

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").touch()
    source = SimpleNamespace(folder=tmp_path, name="the result", run_id=None)
    monkeypatch.setattr(merge, "merge", write)
    monkeypatch.setattr(tuned_model, "tuned", lambda *_: contextlib.nullcontext(source))
    options = {"folder": tmp_path / "merged", "run": None, "dtype": None, "tolerance": None}
    assert merge.command(argparse.Namespace(**options)) == code
    assert [file.name for file in tmp_path.iterdir() if "merged" in file.name] == ["merged"][code:]
    assert ("try --dtype float32" in capsys.readouterr().err) is (code == 1)
