"""A workspace with a tiny random model in it, as it stands before `quantize`, `train`, `evaluate` or `sample`.

The configuration is the shipped one, composed with a few overrides.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from capas.composition import composer, dump
from capas.dag import StageSpec, read_yaml
from capas.params import Params, select
from capas.records import FORMATTED, write_records
from capas.stage import Stage

REPOSITORY = Path(__file__).resolve().parents[1]
CONTROLS = ["<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SHRUNK = (
    "trainer.max_steps=6",
    "trainer.logging_steps=2",
    "trainer.eval_steps=4",
    "trainer.save_steps=2",
    "trainer.per_device_train_batch_size=4",
    "lora.r=4",
    "tracking=none",
    "evaluation.batch_size=4",
    "evaluation.max_new_tokens=8",
    "evaluation.bootstrap_resamples=100",
    "generation.num_prompts=2",
    "generation.num_return_sequences=2",
    "generation.max_new_tokens=6",
)
KINDS = ("seen", "values")


def write_tokenizer(folder: Path) -> Tokenizer:
    """Byte-level, without merges: any text, 256 tokens and the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROLS])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def make_model(family: str = "qwen2", seed: int = 0, **config: Any) -> PreTrainedModel:
    """Random weights, 2 layers of width 64, 262 tokens."""
    torch.manual_seed(seed)
    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    make_config, make = kinds[family]
    sizes = {"vocab_size": 262, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return make(make_config(**{**sizes, **heads, "tie_word_embeddings": True, "use_cache": True, **config}))


def write_workspace(root: Path, overrides: Iterable[str] = (), quantized: str = "base") -> Path:
    """dvc.yaml, params.yaml, records and models; data/models/quantized is a copy of data/models/base."""
    for name in ("dvc.yaml", "environment.yaml"):
        shutil.copy(REPOSITORY / name, root / name)
    for name in ("capas", "stages"):  # deps: they are hashed into the key of the checkpoints
        (root / name).symlink_to(REPOSITORY / name)
    with composer(REPOSITORY / "conf") as compose:
        (root / "params.yaml").write_text(dump(compose([*SHRUNK, "quantization=none", *overrides])))
    tokenizer = write_tokenizer(root / "data/models/tokenizer")
    make_model().save_pretrained(root / "data/models/base")
    shutil.copytree(root / "data/models" / quantized, root / "data/models/quantized")
    _write_formatted(root / "data/formatted", tokenizer)
    _record(root)
    return root


def run_stage(name: str, main: Callable[[Params, Stage], None], root: Path) -> None:
    """Run a stage's `main` in `root` and move its outputs into place, as `capas.stage.run` does."""
    stage = Stage(StageSpec.read(name, root), root)
    main(read_params(name, root), stage)
    stage.finish()


def read_params(name: str, root: Path) -> Params:
    keys = StageSpec.read(name, root).params["params.yaml"]
    return Params(select(read_yaml(root / "params.yaml"), keys))


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def messages(number: int) -> list[dict[str, str]]:
    answer = json.dumps({"minutes": number})
    return [{"role": "user", "content": f"timer {number}"}, {"role": "assistant", "content": answer}]


def _write_formatted(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True)
    end = tokenizer.token_to_id("<|im_end|>")
    chat = {"preset": "chatml", "bos_token_id": None, "pad_token_id": 256, "end_token": "<|im_end|>"}
    (folder / "chat.json").write_text(json.dumps({**chat, "end_token_id": end, "stop_token_ids": [end]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    rng = random.Random(0)
    for split, count in (("train", 40), ("validation", 6), ("test", 10)):
        rows = [_row(f"{split}-{i}", rng.randrange(10 ** rng.randrange(1, 6)), tokenizer) for i in range(count)]
        write_records(folder / f"{split}.parquet", FORMATTED, rows)


def _row(name: str, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    (user, assistant), (start, end) = messages(number), (257, 258)
    prompt = [start, *tokenizer.encode(f"user\n{user['content']}").ids, end, start]
    prompt += tokenizer.encode("assistant\n").ids
    answer = [*tokenizer.encode(assistant["content"]).ids, end]
    kind = KINDS[number % len(KINDS)]
    return {
        "id": name,
        "input_ids": prompt + answer,
        "attention_mask": [1] * len(prompt + answer),
        "labels": [-100] * len(prompt) + answer,
        "prompt_ids": prompt,
        "reference": assistant["content"],
        "metadata": json.dumps({"function": "timer", "kind": kind, "language": "en", "turns": 1}),
    }


def _record(root: Path) -> None:
    """dvc.lock as if the stages before had run: `Stage.key` asks for the hashes of folders."""
    stages = read_yaml(root / "dvc.yaml")["stages"]
    outs = [out if isinstance(out, str) else next(iter(out)) for s in stages.values() for out in s["outs"]]
    lock = {"stages": {"earlier": {"outs": [{"path": out, "md5": "0" * 32} for out in outs]}}}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
