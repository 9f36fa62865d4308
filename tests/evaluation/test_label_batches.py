"""The likelihoods of labels after a prompt that is computed once are those of whole sequences."""

import random
from typing import Any

import pytest
import torch
from architectures import small
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from capas.evaluation import label_batches
from capas.evaluation.label_batches import (
    score_after_prompt,
    score_labels,
    score_whole,
    shares_prompts,
)
from capas.evaluation.prefix import prefix_of
from capas.training import batches
from capas.training.batches import Collator

VOCABULARY, PAD = 262, 256
ENDINGS = [([3, 250], [3, 250]), ([3, 4, 5, 250], [3, 4, 5, 250]), ([9, 250], [-100, 250])]


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**small(name, VOCABULARY))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def records(*lengths: int) -> list[dict[str, Any]]:
    rng = random.Random(2)
    return [{"prompt_ids": [rng.randrange(200) for _ in range(n)]} for n in lengths]


@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize(
    "name", ["llama_3.2_1b_instruct", "qwen2.5_0.5b", "qwen3_4b", "smollm2_135m_instruct"]
)
def test_a_prompt_is_computed_once(name: str, batch_size: int) -> None:
    model, some = make(name), records(1, 2, 30, 17)
    assert shares_prompts(model)
    expected = score_whole(model, some, ENDINGS, Collator(PAD), 4)
    computed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = score_after_prompt(model, some, ENDINGS, Collator(PAD), batch_size)
    hook.remove()
    assert found.shape == (4, 3) and torch.allclose(found, expected, rtol=1e-4)
    assert len({round(float(value), 3) for value in found.flatten()}) == 12
    rows = 3 * 5 if batch_size == 64 else 2 * 3 + 5  # tokens of a record's endings, with padding
    assert sum(computed) == (0 + 1 + 29 + 16) + 4 * rows


def test_long_prompts_are_copied_for_fewer_labels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = make("qwen2.5_0.5b"), records(30)
    expected = score_after_prompt(model, some, ENDINGS, Collator(PAD), 64)
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    copied = 2 * prefix_of(model, some[0]["prompt_ids"][:-1]).num_bytes
    monkeypatch.setattr(label_batches, "_MOST_COPIED", copied)
    found = score_after_prompt(model, some, ENDINGS, Collator(PAD), 64)
    assert rows == [1, 1, 2, 1] and torch.allclose(found, expected, rtol=1e-4)


def test_with_an_adapter_in_training_it_stays_in_training() -> None:
    model: Any = get_peft_model(make("qwen2.5_0.5b"), LoraConfig(init_lora_weights=False))
    model.train()
    found = score_after_prompt(model, records(12), ENDINGS, Collator(PAD), 8)
    assert model.training
    assert torch.allclose(
        found, score_whole(model, records(12), ENDINGS, Collator(PAD), 8), rtol=1e-4
    )


def test_a_long_label_widens_no_batch_of_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch's logits stay within their limit, as those of whole sequences."""
    model, some = make("qwen2.5_0.5b"), records(9)
    long = ([7] * 40, [7] * 40)
    tokens: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    monkeypatch.setattr(batches, "_MOST_LOGITS", 60 * VOCABULARY)
    found = score_after_prompt(model, some, [*ENDINGS, long, *ENDINGS], Collator(PAD), 64)
    assert max(tokens) <= 60 and len(tokens) == 1 + 2
    assert torch.allclose(found[0, :3], found[0, 4:], rtol=1e-5)


def test_few_labels_are_scored_as_whole_sequences() -> None:
    model, some = make("qwen2.5_0.5b"), records(30, 31)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(0))
    few = score_labels(model, some, ENDINGS, PAD, 64)
    assert len(calls) == 1
    more = score_labels(model, some, [*ENDINGS, ENDINGS[0]], PAD, 64)
    assert len(calls) == 1 + 1 + 2 * 2  # the second is the question whether the model has a cache
    assert torch.allclose(more[:, :3], few, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma_2_2b_it", "gemma_3_1b_it"])
def test_windows_are_computed_whole(name: str) -> None:
    assert not shares_prompts(make(name))


def test_without_a_cache_sequences_are_whole() -> None:
    """OpenAI GPT is the one family of transformers with a language model and no cache."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "openai-gpt", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, pad_token_id=PAD
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not shares_prompts(model)
    found = score_labels(model, records(5), ENDINGS * 2, PAD, 64)
    assert found.shape == (1, 6) and bool(found.isfinite().all())
