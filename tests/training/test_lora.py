"""LoRA layers as they stand before the first step."""

import torch
from shipped import composed
from tiny import make_model

from capas.core.params import Params
from stages import train_lora


def lora_weights(*overrides: str) -> dict[str, torch.Tensor]:
    """A and B of every layer of the same base, whatever was drawn before."""
    model = train_lora.add_lora(make_model(), Params(composed(overrides)))
    return {name: weight for name, weight in model.state_dict().items() if "lora_" in name}


def test_b_is_zero_and_a_is_not() -> None:
    weights = lora_weights()
    assert {name.split(".")[-3] for name in weights} == {"lora_A", "lora_B"}
    assert all(bool(w.any()) is ("lora_A" in name) for name, w in weights.items())


def test_a_is_drawn_with_the_seed_of_the_training() -> None:
    first, again = lora_weights("trainer.seed=1"), lora_weights("trainer.seed=1")
    other = lora_weights("trainer.seed=2")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
