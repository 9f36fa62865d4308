"""LoRA on 4-bit layers in fewer passes: the sum is PEFT's, and so are the gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, read_json
from trainings import history, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from capas.core.errors import CapasError
from capas.training import fused

pytestmark = pytest.mark.usefixtures("without_estimate")


def make(folder: Path, checkpointing: bool = False, **lora: Any) -> Any:
    """A Llama in NF4 and bfloat16, its B not zero."""
    make_model("llama", hidden_size=128, intermediate_size=256).save_pretrained(folder)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.bfloat16
    )
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **lora
    )
    torch.manual_seed(0)
    model = get_peft_model(base.requires_grad_(False), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch."""
    ids = torch.randint(262, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_peft(tmp_path: Path, checkpointing: bool) -> None:
    model = make(tmp_path, checkpointing)
    loss, gradients = step(model)
    assert not fused.is_fused(model)
    fused.fuse(model)
    assert fused.is_fused(model)
    fused_loss, fused_gradients = step(model)
    assert fused_loss == pytest.approx(loss, rel=1e-3)
    assert gradients.keys() == fused_gradients.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        assert fused_gradients[name].dtype == torch.float32
        difference = (fused_gradients[name] - gradient).norm() / gradient.norm()
        assert difference < 0.03, name  # bfloat16 has 8 bits


def test_the_last_product_of_a_block_is_not_computed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tmp_path, checkpointing=True)
    fused.fuse(model)
    shapes = []
    original = fused._dequantized

    def counted(weight: Any, dtype: torch.dtype) -> torch.Tensor:
        found = original(weight, dtype)
        shapes.append(tuple(found.shape))
        return found

    monkeypatch.setattr(fused, "_dequantized", counted)
    monkeypatch.setattr(model.config, "use_cache", False)
    step(model)
    times = {shape: shapes.count(shape) for shape in set(shapes)}
    thrice, twice = 2 * 3, 2 * 2  # layers; forward, again, and backward
    query_and_output, key_and_value, gate_and_up, down = (
        *((128, 128), (64, 128)),
        *((256, 128), (128, 256)),
    )
    assert times == {
        query_and_output: 2 * thrice,
        key_and_value: 2 * thrice,
        gate_and_up: 2 * thrice,
        down: twice,
    }


def test_without_gradients_it_is_peft_to_the_bit(tmp_path: Path) -> None:
    model = make(tmp_path).eval()
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        before = model(ids).logits
        fused.fuse(model)
        assert torch.equal(model(ids).logits, before)
        with model.disable_adapter():
            base = model(ids).logits
    assert not torch.equal(base, before)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_another_sum_is_refused(tmp_path: Path, lora: dict[str, Any]) -> None:
    with pytest.raises(CapasError, match="is not a plain LoRA layer on a 4-bit weight"):
        fused.fuse(make(tmp_path, **lora))


def test_a_stage_trains_with_it_as_without(tmp_path: Path) -> None:
    """Qwen 2, whose query, key and value have a bias."""
    options = ("quantization=nf4", "trainer.bf16=true", "trainer.gradient_checkpointing=true")
    plain = train(tmp_path / "plain", *options, quantize=True)
    other = train(tmp_path / "fused", *options, "trainer.fused_lora=true", quantize=True)
    used = [read_json(root / "reports/train.json")["used"]["fused_lora"] for root in (plain, other)]
    assert used == [False, True]
    losses = [[row["loss"] for row in history(root)] for root in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
