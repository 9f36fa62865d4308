"""A workspace with a tiny random model in it, as it stands before quantize, train, evaluate or sample.

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
from conftest import stored
from shipped import composed_text
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from capas.chat.format import ChatFormat
from capas.chat.recorded import recorded_format
from capas.core.dag import StageSpec, read_yaml
from capas.core.params import Params, select
from capas.core.records import FORMATTED, RAW, write_records
from capas.core.stage import Stage

REPOSITORY = Path(__file__).resolve().parents[2]
CONTROLS = [
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
NAMED = {"pad_token": "<pad>", "eos_token": "<|im_end|>"}
SHRUNK = (
    "hardware.num_threads=1",
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


def write_tokenizer(
    folder: Path, controls: Iterable[str] = CONTROLS, named: dict[str, str] = NAMED
) -> Tokenizer:
    """Byte-level, without merges: any text, 256 tokens and the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in controls]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def make_model(family: str = "qwen2", seed: int = 0, **config: Any) -> PreTrainedModel:
    """Random weights, 2 layers of width 64, 262 tokens."""
    torch.manual_seed(seed)
    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    make_config, make = kinds[family]
    sizes = {"vocab_size": 262, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return make(
        make_config(**{**sizes, **heads, "tie_word_embeddings": True, "use_cache": True, **config})
    )


def write_workspace(root: Path, overrides: Iterable[str] = (), quantized: str = "base") -> Path:
    """dvc.yaml, params.yaml, records and models; data/models/quantized is a copy of data/models/base."""
    link_code(root)
    (root / "params.yaml").write_text(composed_text([*SHRUNK, "quantization=none", *overrides]))
    write_tokenizer(root / "data/models/tokenizer")
    make_model().save_pretrained(root / "data/models/base")
    shutil.copytree(root / "data/models" / quantized, root / "data/models/quantized")
    write_origin(root)
    _write_data(root)
    write_lock(root)
    return root


def write_origin(root: Path) -> None:
    """data/models/initial_adapter where the training starts from none."""
    (root / "data/models/initial_adapter").mkdir()
    origin = {"adapter_name_or_path": None, "adapter_revision": None}
    (root / "data/models/initial_adapter/origin.json").write_text(json.dumps(origin))


def link_code(root: Path) -> None:
    """dvc.yaml, code.yaml, environment.yaml, the code, and data that ships."""
    for name in ("dvc.yaml", "code.yaml", "environment.yaml"):
        shutil.copy(REPOSITORY / name, root / name)
    (root / "data").mkdir(exist_ok=True)
    for name in ("capas", "stages", "data/general"):
        (root / name).symlink_to(REPOSITORY / name)


def run_stage(name: str, main: Callable[[Params, Stage], None], root: Path) -> None:
    """Run a stage's `main` in `root` and move its outputs into place, as `capas.core.stage.run` does."""
    stage = Stage(StageSpec.read(name, root), root)
    main(read_params(name, root), stage)
    stage.finish()


def read_params(name: str, root: Path) -> Params:
    keys = StageSpec.read(name, root).keys
    return Params(select(read_yaml(root / "params.yaml"), keys))


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_data(root: Path) -> None:
    """data/composed, data/raw and data/formatted, as compose, fetch and format would write them."""
    composed, formatted = root / "data/composed", root / "data/formatted"
    for folder in (composed, formatted):
        folder.mkdir(parents=True)
    right, wrong = (
        (REPOSITORY / f"conf/chat_template/{name}.jinja").read_text()
        for name in ("chatml", "llama3")
    )
    for name in ("checkpoint_metric", "metrics"):
        (composed / f"{name}.json").write_text('{"sources": {}}')
    (composed / "harness.json").write_text('{"version": null, "files": {}}')
    (composed / "prompts.json").write_text('{"prompts": null}')
    (composed / "wrong_chat_template.jinja").write_text(wrong)
    for folder in (composed, formatted):
        (folder / "chat_template.jinja").write_text(right)
    chat = ChatFormat.load(right, root / "data/models/tokenizer", "26 Jul 2024")
    names = ("bos_token_id", "pad_token_id", "end_token", "end_token_id", "stop_token_ids")
    facts = {name: getattr(chat, name) for name in names} | {"probes_sha256": chat.probes_sha256()}
    facts |= {"date_string": "26 Jul 2024", "system": "template", "allowed_tokens": []}
    (formatted / "chat.json").write_text(json.dumps(facts))
    for split, records in write_raw(root, {"train": 40, "validation": 6, "test": 10}).items():
        write_records(
            formatted / f"{split}.parquet", FORMATTED, [_format(record, chat) for record in records]
        )


def write_pairs(root: Path, split: str, pairs: Iterable[tuple[int, int | str]]) -> None:
    """Another data/formatted/{split}.parquet: requests 'timer ASKED', answers {"minutes": TOLD}."""
    chat = recorded_format(root / "data/formatted", root / "data/models/tokenizer")
    records = [_record(f"{split}-{i}", *pair) for i, pair in enumerate(pairs)]
    file = root / f"data/formatted/{split}.parquet"
    write_records(file, FORMATTED, [_format(record, chat) for record in records])


def write_raw(root: Path, counts: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """data/raw with that many records a split."""
    rng, written = random.Random(0), {}
    (root / "data/raw").mkdir(parents=True)
    for split, count in counts.items():
        numbers = [rng.randrange(10 ** rng.randrange(1, 6)) for _ in range(count)]
        written[split] = [_record(f"{split}-{i}", number) for i, number in enumerate(numbers)]
        write_records(root / f"data/raw/{split}.parquet", RAW, written[split])
    return written


def _record(name: str, number: int, told: int | str | None = None) -> dict[str, Any]:
    answer = json.dumps({"minutes": number if told is None else told})
    messages = [
        {"role": "user", "content": f"timer {number}"},
        {"role": "assistant", "content": answer},
    ]
    facts = {"function": "timer", "kind": KINDS[number % len(KINDS)], "language": "en", "turns": 1}
    return stored({"id": name, "messages": messages, "metadata": json.dumps(facts)})


def _format(record: dict[str, Any], chat: ChatFormat) -> dict[str, Any]:
    encoded = chat.encode(record["messages"])
    return {
        "id": record["id"],
        "input_ids": encoded.input_ids,
        "labels": encoded.labels,
        "prompt_ids": chat.prompt_ids(record["messages"][:-1]),
        "reference": record["messages"][-1]["content"],
        "metadata": record["metadata"],
    }


def write_lock(root: Path) -> None:
    """dvc.lock as if the stages before had run: `Stage.key` asks for the hashes of folders."""
    stages = read_yaml(root / "dvc.yaml")["stages"]
    outs = [
        out if isinstance(out, str) else next(iter(out))
        for s in stages.values()
        for out in s["outs"]
    ]
    lock = {"stages": {"earlier": {"outs": [{"path": out, "md5": "0" * 32} for out in outs]}}}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
