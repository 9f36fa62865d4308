"""Rows that have ended leave a greedy batch, and a shared prefix is computed once: the texts are the same."""

import random
from typing import Any

import pytest
import torch
from architectures import small
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from capas.evaluation import greedy
from capas.evaluation.generation import complete, generation_config, pad_left
from capas.evaluation.prefix import shared_length, shared_prefix

VOCABULARY, LIMIT = 262, 12
STOPS = list(range(190, 250))  # many, so that a random model's answers end at different tokens
CHAT = {"bos_token_id": None, "pad_token_id": 256, "stop_token_ids": STOPS}
HEAD = [7, 8, 9, 10, 11]
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "pad_token_id": 256}
RECURRENT = {  # their rows cannot leave: not all of their state is in keys and values
    "mamba": {"state_size": 8},
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "recurrent_gemma": {"num_attention_heads": 4, "intermediate_size": 128},
}


def prompts(count: int = 14, head: list[int] = HEAD) -> list[list[int]]:
    rng = random.Random(1)
    return [head + [rng.randrange(200) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


def make(config: Any) -> PreTrainedModel:
    """Weights so large that the next token depends on the prompt."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def preset(name: str) -> PreTrainedModel:
    return make(AutoConfig.for_model(**small(name, VOCABULARY)))


def steps_of(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return a list that grows by (rows, columns) with every forward pass."""
    steps: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        steps.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return steps


def alone(model: PreTrainedModel, texts: list[list[int]], config: GenerationConfig) -> Any:
    return [complete(model, [text], config, batch_size=1)[0] for text in texts]


@pytest.mark.parametrize(
    "name", ["llama_3.2_1b_instruct", "qwen2.5_0.5b", "qwen3_4b", "gemma_2_2b_it", "gemma_3_1b_it"]
)
def test_rows_leave_and_the_texts_stay(name: str) -> None:
    """Gemma's windows are shorter than the prompts."""
    model, config = preset(name), generation_config(CHAT, LIMIT)
    expected = alone(model, prompts(), config)
    steps = steps_of(model)
    assert complete(model, prompts(), config, batch_size=8) == expected
    assert len({len(found[0].input_ids) for found in expected}) > 3, "answers end differently"
    assert len({rows for rows, _ in steps}) > 3, "batches have shrunk"


@pytest.mark.parametrize("kind", RECURRENT)
def test_rows_stay_where_the_cache_holds_more_than_keys_and_values(kind: str) -> None:
    model = make(AutoConfig.for_model(kind, **SIZES, **RECURRENT[kind]))
    config = generation_config(CHAT, LIMIT)
    assert not greedy.keeps_rows_apart(model)
    assert complete(model, prompts(6), config, batch_size=6) == alone(model, prompts(6), config)


def test_rows_stay_in_a_model_of_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules may keep a state of their own, as those of RecurrentGemma do."""
    model, config = preset("qwen3_4b"), generation_config(CHAT, LIMIT)
    assert greedy.keeps_rows_apart(model)
    monkeypatch.setattr(type(model), "is_remote_code", classmethod(lambda cls: True))
    steps = steps_of(model)
    complete(model, prompts(8), config, batch_size=8)
    assert {rows for rows, _ in steps} == {8}


def test_a_round_goes_on_where_the_model_does_not_use_the_cache() -> None:
    """Phi-3 makes another one when its text becomes long."""
    model, config = preset("qwen3_4b"), generation_config(CHAT, LIMIT)
    few_left = greedy._FewLeft(greedy.new_cache(model), torch.tensor(STOPS))
    ids = torch.tensor([[5, 200], [5, 200], [5, 6]])
    assert not few_left(ids, None).any()
    few_left.cache.update(torch.zeros(3, 1, 1, 4), torch.zeros(3, 1, 1, 4), 0)
    assert few_left(ids, None).all()
    assert not few_left(torch.tensor([[5, 6], [5, 6], [5, 6]])[:, :1], None).any()
    assert config.max_new_tokens == LIMIT, "a round changes a copy of the settings"


def test_all_rows_end_at_once_or_none_does() -> None:
    model = preset("qwen3_4b")
    at_once = generation_config({**CHAT, "stop_token_ids": list(range(VOCABULARY))}, LIMIT)
    found = complete(model, prompts(5), at_once, batch_size=5)
    assert [(group[0].input_ids, group[0].stopped) for group in found] == [([], True)] * 5
    never = generation_config({**CHAT, "stop_token_ids": [261]}, 3)
    found = complete(model, prompts(5), never, batch_size=5)
    assert [(len(group[0].input_ids), group[0].stopped) for group in found] == [(3, False)] * 5


def test_no_prompt_and_a_single_one() -> None:
    model, config = preset("qwen3_4b"), generation_config(CHAT, LIMIT)
    assert complete(model, [], config, batch_size=8) == []
    assert complete(model, prompts(1), config, batch_size=8) == alone(model, prompts(1), config)


def test_a_repetition_penalty_looks_at_the_tokens_of_all_rounds() -> None:
    model, config = preset("qwen3_4b"), generation_config(CHAT, LIMIT, repetition_penalty=1.5)
    assert complete(model, prompts(), config, batch_size=8) == alone(model, prompts(), config)


def test_sampling_draws_what_generate_draws() -> None:
    """A draw takes random numbers for all rows, ended ones included: no row leaves."""
    model = make_model(initializer_range=0.3).eval()
    config = generation_config(CHAT, LIMIT, do_sample=True, temperature=1.5)
    texts = sorted(prompts(4), key=len)
    ids, mask = pad_left(texts, 256)
    torch.manual_seed(3)
    rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[
        :, ids.shape[1] :
    ]
    torch.manual_seed(3)
    found = [group[0].input_ids for group in complete(model, texts, config, batch_size=4)]
    assert found == [row[: len(answer)] for row, answer in zip(rows.tolist(), found, strict=True)]
    assert len({len(answer) for answer in found}) > 1, "rows ended before others"


def test_the_prefix_is_computed_once() -> None:
    model, config = preset("qwen3_4b"), generation_config(CHAT, LIMIT)
    texts = prompts(8)
    steps = steps_of(model)
    complete(model, texts, config, batch_size=8)
    assert steps[:2] == [(1, len(HEAD)), (8, max(map(len, texts)) - len(HEAD))]


def test_a_row_with_more_padding_than_prefix_computes_all_of_its_prompt() -> None:
    model, config = preset("qwen3_4b"), generation_config(CHAT, LIMIT)
    texts = [[7, 8, 9], [7, 8, *range(10, 40)], [7, 8, 9, 10]]
    assert complete(model, texts, config, batch_size=3) == alone(model, texts, config)
    prefix = shared_prefix(model, texts, config)
    assert prefix is not None and prefix.num_tokens == 2
    keys = prefix.cache_of([0, 1, 29]).layers[0].keys
    assert keys.shape[2] == 2
    assert torch.equal(keys[1, :, 1], keys[0, :, 0]), "moved by its padding"
    assert not keys[2].any(), "padding alone"


def test_a_prefix_leaves_each_prompt_a_token() -> None:
    assert shared_length([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert shared_length([[1, 2], [1, 2, 3]]) == 1
    assert shared_length([[1, 2], [1, 2]]) == 1
    assert shared_length([[1], [2]]) == 0


@pytest.mark.parametrize("name", ["gemma_2_2b_it", "dynamic"])
def test_no_prefix_where_a_copy_would_differ(name: str) -> None:
    """A window of Gemma drops tokens; dynamic rotary angles depend on the length of the whole text."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make_model("llama", rope_parameters=rope) if name == "dynamic" else preset(name)
    assert shared_prefix(model, prompts(), generation_config(CHAT, LIMIT)) is None
    plain = make_model("llama").eval()
    assert shared_prefix(plain, prompts(), generation_config(CHAT, LIMIT)) is not None
