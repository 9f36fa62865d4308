"""Batched generation is one-by-one generation, only faster."""

import random

import pytest
import torch
from tiny import make_model

from capas.core.errors import CapasError
from capas.evaluation.generation import (
    Completion,
    _until_stop,
    complete,
    generation_config,
    pad_left,
)

CHAT = {"bos_token_id": None, "pad_token_id": 256, "stop_token_ids": [258, 261]}


def prompts(count: int = 12) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(256) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batched_equals_one_by_one(attention: str) -> None:
    model = make_model(attn_implementation=attention, initializer_range=0.3).eval()
    config = generation_config(CHAT, max_new_tokens=12)
    batched = complete(model, prompts(), config, batch_size=5)
    alone = [complete(model, [prompt], config, batch_size=1)[0] for prompt in prompts()]
    assert batched == alone
    assert len({tuple(found[0].input_ids) for found in batched}) > 6, (
        "the model answers prompts differently"
    )


def test_an_answer_beyond_the_models_positions_is_refused_before_the_first() -> None:
    model = make_model(max_position_embeddings=16).eval()
    model.generate = None  # nothing is generated
    told = (
        r"prompt 2 of 3 has 10 tokens .* may have 7, .*context is 16 tokens: set max_new_tokens=6"
    )
    with pytest.raises(CapasError, match=told):
        complete(model, [[5], [6] * 10, [7]], generation_config(CHAT, 7), batch_size=1)
    with pytest.raises(CapasError, match="shorten the prompts"):
        complete(model, [[6] * 16], generation_config(CHAT, 1), batch_size=1)
    whole = make_model(max_position_embeddings=16).eval()
    assert complete(whole, [[6] * 10], generation_config(CHAT, 6), batch_size=1)


def test_pad_token_may_be_a_token_of_the_prompt() -> None:
    """Padding is masked by position: with another pad token the completions are the same."""
    model = make_model(initializer_range=0.3).eval()
    texts = [[256, 7, 256, 9], [256], [5, 6]]
    found = [
        complete(model, texts, generation_config({**CHAT, "pad_token_id": pad}, 6), batch_size=3)
        for pad in (256, 3)
    ]
    assert found[0] == found[1]


def test_padding_is_on_the_left() -> None:
    ids, mask = pad_left([[5], [6, 7, 8]], pad_token_id=0)
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_completion_ends_before_the_stop_token() -> None:
    assert _until_stop([4, 261, 258, 256], [258, 261]) == Completion([4], stopped=True)
    assert _until_stop([4, 5], [258]) == Completion([4, 5], stopped=False)


def test_sequences_are_grouped_by_prompt() -> None:
    torch.manual_seed(0)
    config = generation_config(
        CHAT, 5, do_sample=True, temperature=1.5, top_k=0, num_return_sequences=3
    )
    found = complete(make_model().eval(), prompts(4), config, batch_size=2)
    assert [len(group) for group in found] == [3, 3, 3, 3]
    assert len({tuple(c.input_ids) for c in found[0]}) > 1


def test_what_is_not_given_is_not_applied() -> None:
    """transformers would fill in a top_k of 50, and a model's own generation_config.json anything."""
    model = make_model().eval()
    model.generation_config.repetition_penalty = 9.0
    config = generation_config(CHAT, 1, do_sample=True, temperature=None)
    assert (config.temperature, config.top_k, config.top_p) == (1.0, 0, 1.0)
    before = complete(make_model().eval(), prompts(), generation_config(CHAT, 9), batch_size=4)
    assert complete(model, prompts(), generation_config(CHAT, 9), batch_size=4) == before


def test_settings_reach_the_sampler() -> None:
    """top_k=1 leaves one token to draw from: sampling is then greedy."""
    model = make_model(initializer_range=0.3).eval()
    greedy = complete(model, prompts(), generation_config(CHAT, 6), batch_size=4)
    drawn = complete(
        model, prompts(), generation_config(CHAT, 6, do_sample=True, top_k=1), batch_size=4
    )
    assert drawn == greedy
