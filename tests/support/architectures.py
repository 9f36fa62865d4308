"""The presets' models in small: the layout of the config.json on the Hub, with a few random weights.

`small` keeps all that is no size: query heads for each key-value head, whether the heads are as wide as the
model, tied embeddings, biases, rotary scaling, windows, soft-capping. The keys are those of the files on the
Hub, which transformers 4 wrote.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModelForCausalLM

ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 8192
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_theta": 500000.0,
    "rope_scaling": {**ROPE, "factor": 32.0},
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "max_position_embeddings": 32768,
}
QWEN2_HALF = {
    **QWEN2,
    **{"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2},
    **{"sliding_window": 32768, "max_window_layers": 21, "tie_word_embeddings": True},
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    **{"hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
    **{"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
    **{"cache_implementation": "hybrid", "max_position_embeddings": 8192},
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    **{"hidden_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
    **{"sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10000.0},
    **{"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
    **{"cache_implementation": "hybrid", "max_position_embeddings": 32768},
    "rope_theta": 1000000.0,
}
REAL: dict[str, dict[str, Any]] = {
    "llama_3.2_1b_instruct": {
        **LLAMA,
        **{"hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64},
    },
    "llama_3.2_3b_instruct": {
        **LLAMA,
        **{"hidden_size": 3072, "num_attention_heads": 24, "head_dim": 128},
    },
    "llama_3.1_8b_instruct": {
        **LLAMA,
        **{"hidden_size": 4096, "num_attention_heads": 32, "tie_word_embeddings": False},
        "rope_scaling": {**ROPE, "factor": 8.0},
    },
    "mistral_7b_instruct_v0.3": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **{"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False},
        "max_position_embeddings": 32768,
    },
    "qwen2.5_0.5b": QWEN2_HALF,
    "qwen2.5_0.5b_instruct": QWEN2_HALF,
    "qwen2.5_7b_instruct": {
        **QWEN2,
        **{"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4},
        **{"sliding_window": 131072, "max_window_layers": 28, "tie_word_embeddings": False},
    },
    "qwen3_4b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{"hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"head_dim": 128, "rope_theta": 1000000.0, "attention_bias": False},
        **{"sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True},
        "max_position_embeddings": 40960,
    },
    "gemma_2_2b_it": GEMMA2,
    "gemma_3_1b_it": GEMMA3,
    "smollm2_135m_instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
        **{"rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    },
}
SIZES = {  # intermediate_size, num_hidden_layers, vocab_size; parameters as the Hub counts them
    "llama_3.2_1b_instruct": (8192, 16, 128256, 1_235_814_400),
    "llama_3.2_3b_instruct": (8192, 28, 128256, 3_212_749_824),
    "llama_3.1_8b_instruct": (14336, 32, 128256, 8_030_261_248),
    "mistral_7b_instruct_v0.3": (14336, 32, 32768, 7_248_023_552),
    "qwen2.5_0.5b": (4864, 24, 151936, 494_032_768),
    "qwen2.5_0.5b_instruct": (4864, 24, 151936, 494_032_768),
    "qwen2.5_7b_instruct": (18944, 28, 152064, 7_615_616_512),
    "qwen3_4b": (9728, 36, 151936, 4_022_468_096),
    "gemma_2_2b_it": (9216, 26, 256000, 2_614_341_888),
    "gemma_3_1b_it": (6912, 26, 262144, 999_885_952),
    "smollm2_135m_instruct": (1536, 30, 49152, 134_515_008),
}
HEAD, BLOCK = 32, 64  # widths in small: of a head, and what that of every layer is a multiple of


def whole(preset: str) -> dict[str, Any]:
    """config.json as on the Hub, for what needs no weights."""
    intermediate, layers, vocabulary, _ = SIZES[preset]
    sizes = {"intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**REAL[preset], **sizes, "vocab_size": vocabulary, "torch_dtype": "bfloat16"}


def write_whole(preset: str, folder: Path) -> Path:
    """A folder with that config.json and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(whole(preset)))
    return folder


def small(preset: str, vocab_size: int) -> dict[str, Any]:
    """config.json: two layers (six of Gemma 3: its sixth is the first without a window)."""
    real = REAL[preset]
    kv_heads = min(real["num_key_value_heads"], 2)
    heads = real["num_attention_heads"] // real["num_key_value_heads"] * kv_heads
    shrunk = {
        "hidden_size": -(-real["hidden_size"] * heads * HEAD // width_of_heads(real) // BLOCK)
        * BLOCK,
        "intermediate_size": 128,
        "num_hidden_layers": 6 if real["model_type"] == "gemma3_text" else 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD,
        "vocab_size": vocab_size,
    }
    if real.get("sliding_window"):
        shrunk["sliding_window"] = 16  # shorter than the records
    if "query_pre_attn_scalar" in real:
        shrunk["query_pre_attn_scalar"] = HEAD
    return {**real, **shrunk, "torch_dtype": "bfloat16"}


def width_of_heads(config: dict[str, Any]) -> int:
    """Of all query heads together; it need not be that of the model."""
    heads = config["num_attention_heads"]
    return int(config.get("head_dim", config["hidden_size"] // heads) * heads)


def write_small(preset: str, vocab_size: int, folder: Path) -> None:
    """A model's folder as on the Hub: two shards of bfloat16 weights and their index."""
    import torch

    torch.manual_seed(0)
    config = small(preset, vocab_size)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=model.num_parameters() * 2 * 2 // 3)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


# Control tokens, with the names that the tokenizer's files give them, of the families' real tokenizers.
LLAMA_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
MISTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
LLAMA_NAMED = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
QWEN_NAMED = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
GEMMA_NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
MISTRAL_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class Family(NamedTuple):
    """A family's tokenizer, and what its answers must end with and be padded with."""

    controls: tuple[str, ...]
    named: dict[str, str]
    template: str
    stops: tuple[str, ...]
    pad: str


FAMILIES = {
    "llama": Family(
        LLAMA_TOKENS, LLAMA_NAMED, "llama3", ("<|eot_id|>",), "<|finetune_right_pad_id|>"
    ),
    "mistral": Family(MISTRAL_TOKENS, MISTRAL_NAMED, "mistral", ("</s>",), "</s>"),
    "qwen": Family(QWEN_TOKENS, QWEN_NAMED, "chatml", ("<|im_end|>",), "<|endoftext|>"),
    "gemma": Family(GEMMA_TOKENS, GEMMA_NAMED, "gemma", ("<end_of_turn>", "<eos>"), "<pad>"),
    "qwen2.5_0.5b": Family(  # a base: its sequences end otherwise than its turns
        QWEN_TOKENS,
        {**QWEN_NAMED, "eos_token": "<|endoftext|>"},
        "chatml",
        ("<|im_end|>", "<|endoftext|>"),
        "<|endoftext|>",
    ),
    "smollm2": Family(  # the beginning of a text opens every turn, and the end pads
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        "chatml",
        ("<|im_end|>",),
        "<|im_end|>",
    ),
}


def family_of(preset: str) -> Family:
    return FAMILIES.get(preset) or next(f for n, f in FAMILIES.items() if preset.startswith(n))
