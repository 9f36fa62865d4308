"""Pretrain the embedded base: tokenizer, packed corpus, initial weights, training loop.

A model of half a million parameters that sees a few million tokens does not learn by itself to copy a
word it has never seen. Two measures make it learn this within a few hundred steps: attention heads in the
first layer that start by looking one, two and three tokens back, and rows of random tokens that repeat
themselves. Together they produce induction heads, see
https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL_TOKENS = (
    *(PAD, BOS, EOS),
    # ChatML
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    # Llama 3
    *(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    # Mistral v3
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    # Gemma
    *("<start_of_turn>", "<end_of_turn>"),
)
# ChatML, the template of the base itself; fine-tuning uses its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Merges are learned within a word, a digit, a whitespace character, or a run of punctuation that may
# include single spaces ('": "'). A word has the same ids after a space as after a quote, so that copying
# a word means copying ids.
PIECES = r"\p{L}+|\p{N}|\s|[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*"
# The finished tokenizer splits by the two patterns of SuperBPE. llama.cpp knows them by that name, so a
# GGUF file of the model tokenizes as the model does. No merge joins letters or digits with other
# characters.
SPLITS = (r"\p{N}+", r"(?=(\d{3})+(?!\d))")


@dataclass(frozen=True)
class Recipe:
    """The recipe of the base: all settings that, besides the code, determine its bytes."""

    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 320
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 1024
    row_tokens: int = 128
    batch_rows: int = 16
    num_steps: int = 5000
    warmup_steps: int = 30
    repeat_steps: int = 150  # initial steps with repeating rows only
    repeat_rows: int = 1  # repeating rows in every later batch
    learning_rate: float = 6.0e-3
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    initializer_range: float = 0.04
    embedding_range: float = 0.5
    final_norm_gain: float = 0.1
    head_strength: float = 8.0
    head_offsets: tuple[int, ...] = (1, 2, 3)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer: any text survives a round trip, and digits are never merged.

    Merges are learned within `PIECES`; afterwards texts are split by `SPLITS`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split_by(PIECES)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = split_by(*SPLITS)
    return tokenizer


def split_by(*patterns: str) -> pre_tokenizers.Sequence:
    """Return a pre-tokenizer that isolates the matches of each pattern, then maps bytes to characters."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def pack_rows(
    tokenizer: Tokenizer, texts: Iterator[str], num_rows: int, row_tokens: int
) -> torch.Tensor:
    """Return the token ids of the texts, each followed by ``<eos>``, packed: (num_rows, row_tokens).

    Raises:
        ValueError: the texts do not fill the rows.
    """
    end, needed = tokenizer.token_to_id(EOS), num_rows * row_tokens
    chunks, count = [], 0
    for encoding in encode_in_batches(tokenizer, texts):
        chunks.append(np.array([*encoding, end], dtype=np.int16))
        count += len(chunks[-1])
        if count >= needed:
            ids = np.concatenate(chunks)[:needed].reshape(num_rows, row_tokens)
            return torch.from_numpy(ids)
    raise ValueError(f"the texts hold {count} tokens, {needed} are needed")


def encode_in_batches(
    tokenizer: Tokenizer, texts: Iterator[str], size: int = 2000
) -> Iterator[list[int]]:
    """Yield the ids of each text, encoded `size` texts at a time."""
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(batch))
            batch = []
    yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(batch))


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """Return a Llama model with attention biases and the recipe's initial weights.

    It is not a Qwen 2, which has the same layout: for that model type, AutoTokenizer of transformers 5
    silently replaces the tokenizer's splitting rule by Qwen's own.
    """
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_attention_heads,
        max_position_embeddings=recipe.max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=recipe.initializer_range,
        attention_bias=True,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Large embeddings keep token identity visible; the small final gain keeps logits small.
        model.model.embed_tokens.weight.normal_(0.0, recipe.embedding_range)
        model.model.norm.weight.fill_(recipe.final_norm_gain)
        start_previous_token_heads(model, recipe.head_offsets, recipe.head_strength)
    return model


def start_previous_token_heads(
    model: LlamaForCausalLM, offsets: tuple[int, ...], strength: float
) -> None:
    """Make head i of the first layer look `offsets[i]` tokens back.

    The query and key biases alone, independently of the tokens, give the score strength^2 *
    sum(cos((distance - offset) * f)) over the rotary frequencies f. It is largest at distance == offset.
    """
    attention = model.model.layers[0].self_attn
    frequencies = model.model.rotary_emb.inv_freq.float()
    size = 2 * len(frequencies)  # dimension of one head
    for head, offset in enumerate(offsets):
        angle = -offset * frequencies
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.bias[rows] = strength * torch.cat([angle.cos(), angle.sin()])
        attention.k_proj.bias[rows] = strength * torch.cat(
            [torch.ones_like(angle), torch.zeros_like(angle)]
        )


def draw_repeating_rows(num_rows: int, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """Return rows of random tokens that repeat with a random period: (num_rows, row_tokens)."""
    shape = num_rows, recipe.row_tokens
    rows = torch.randint(len(SPECIAL_TOKENS), recipe.vocab_size, shape, generator=generator)
    periods = torch.randint(8, recipe.row_tokens // 4, (num_rows,), generator=generator)
    positions = torch.arange(recipe.row_tokens)
    return torch.stack([row[positions % period] for row, period in zip(rows, periods, strict=True)])


def split_decay(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return parameter groups: weight decay for matrices, none for biases and gains."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def scale_learning_rate(step: int, recipe: Recipe) -> float:
    """Return the factor of the learning rate at a step: linear warm-up times linear decay to zero."""
    return min(1.0, (step + 1) / recipe.warmup_steps) * (1 - step / recipe.num_steps)


def pretrain(
    model: LlamaForCausalLM,
    rows: torch.Tensor,
    recipe: Recipe,
    report: Callable[[int, float], None],
) -> None:
    """Train on `rows`, (steps * batch, tokens), each used once; call `report(step, loss)` after each step."""
    groups = split_decay(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: scale_learning_rate(step, recipe)
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    model.train()
    for step in range(recipe.num_steps):
        batch = rows[step * recipe.batch_rows : (step + 1) * recipe.batch_rows].long()
        repeating = recipe.batch_rows if step < recipe.repeat_steps else recipe.repeat_rows
        batch[:repeating] = draw_repeating_rows(repeating, recipe, generator)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(step, loss.item())
