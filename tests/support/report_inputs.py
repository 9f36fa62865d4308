"""Every file that the report and publish read, small but with the schemas of the real pipeline."""

import csv
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file
from shipped import composed, composed_text
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from capas.core.dag import StageSpec, read_yaml, recorded_key
from capas.core.params import Params, flatten, select
from capas.core.records import RAW, write_records
from capas.core.stage import Stage
from capas.evaluation import gate
from capas.evaluation.names import (
    BINARY,
    LABEL_SCORES,
    compares_labels,
    generates,
    name_of,
)
from capas.report.plots import MAX_TOKENS
from stages import build_report

REPOSITORY = Path(__file__).parents[2]
KINDS = ("seen", "values", "phrasings", "combinations", "both")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SYSTEM = "Turn the request into one function call in JSON."
SOURCE: dict[str, Any] = {
    "path": "embedded",
    "revision": None,
    "licence": "apache-2.0",
    "sources": [
        {
            "path": "embedded",
            "name": None,
            "revision": None,
            "licence": "apache-2.0",
            "weight": None,
        }
        | {"files": [], "num_records": 25}
    ],
    "num_read": 25,
    "dropped": {},
    "repaired": {},
    "kept": {},
    "near_duplicates": None,
    "left_out": {},
}
LAYERS = [
    f"model.layers.{i}.{part}"
    for i in range(2)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]


def write_inputs(root: Path, overrides: Iterable[str] = (), **texts: str) -> Path:
    """A workspace as it stands when `report` runs; `overrides` as on Hydra's command line."""
    made = _made(tuple(overrides), tuple(sorted(texts.items())))
    shutil.copytree(made.name, root, dirs_exist_ok=True)
    return root


@cache
def _made(
    overrides: tuple[str, ...], texts: tuple[tuple[str, str], ...]
) -> tempfile.TemporaryDirectory[str]:
    """The workspace, written once a process; the folder goes with its object."""
    folder = tempfile.TemporaryDirectory(prefix="capas-report-inputs-")
    _write_workspace(Path(folder.name), overrides, **dict(texts))
    return folder


def _write_workspace(root: Path, overrides: tuple[str, ...], **texts: str) -> None:
    for name in ("dvc.yaml", "code.yaml"):
        shutil.copy(REPOSITORY / name, root / name)
    shutil.copytree(REPOSITORY / "capas", root / "capas", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copytree(REPOSITORY / "conf/chat_template", root / "conf/chat_template")
    _write(root / "conf/overrides.yaml", "# Nothing overridden.\n")
    (root / "stages").mkdir(exist_ok=True)
    params = composed(overrides)
    _write(root / "params.yaml", composed_text(overrides))
    _write(root / "environment.yaml", _environment())
    records = [_record(i, **texts) for i in range(25)]
    tokenizer = _tokenizer(root, records)
    _raw(root, records)
    _formatted(root, tokenizer, records)
    _models(root, tokenizer)
    _reports(root, params)
    _predictions(root, records, params["evaluation"]["metrics"])
    _samples(root, params, records[0], tokenizer, **texts)
    _write(root / "reports/index.html", "<!doctype html><title>report</title>")
    _write(root / "reports/index.es.html", "<!doctype html><title>informe</title>")
    _lock(root)


def _lock(root: Path) -> None:
    """dvc.lock as DVC would have written it, and the key of its training in train.json."""
    stages = {}
    for name, spec in StageSpec.read_all(root).items():
        params = {file: flatten(values) for file, values in spec.values(root).items()}
        deps = [{"path": dep, "md5": _md5(dep)} for dep in spec.deps]
        outs = [{"path": out, "md5": _md5(out)} for out in spec.outs]
        stages[name] = {"cmd": spec.cmd, "deps": deps, "params": params, "outs": outs}
    _write(root / "dvc.lock", yaml.safe_dump({"schema": "2.0", "stages": stages}))
    _json(root / "reports/train.json", _train(recorded_key(stages["train"])))
    _json(root / "reports/certificate.json", {"adapter_sha256": "0" * 64, "checks": {}})


def _md5(path: str) -> str:
    digest = hashlib.md5(path.encode(), usedforsecurity=False).hexdigest()
    return digest if "." in path.split("/")[-1] else f"{digest}.dir"


def _environment() -> str:
    packages = (
        "accelerate bitsandbytes datasets datasketch jinja2 matplotlib numpy peft pyarrow "
        "rouge-score sacrebleu safetensors scikit-learn tokenizers torch transformers"
    )
    return yaml.safe_dump(dict.fromkeys(packages.split(), "1.2.3"))


def _record(number: int, request: str = "Set a timer for {n} minutes.", **_: str) -> dict[str, Any]:
    spanish = number % 2 == 1
    text = f"Pon un temporizador de {number + 5} minutos." if spanish else request
    call = {"name": "set_timer", "arguments": {"minutes": number + 5}}
    return {
        "id": f"r{number:03}",
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text.replace("{n}", str(number + 5))},
            {"role": "assistant", "content": json.dumps(call)},
        ],
        "metadata": {
            "function": "set_timer",
            "kind": KINDS[number % 5],
            "language": "es" if spanish else "en",
            "turns": "single",
        },
    }


def _tokenizer(root: Path, records: list[dict[str, Any]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[AddedToken(token, special=True) for token in CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for record in records for message in record["messages"])
    tokenizer.train_from_iterator(texts, trainer)
    folder = root / "data/models/tokenizer"
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    return tokenizer


def _split(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {"train": records[:12], "validation": records[12:15], "test": records[15:]}


def _raw(root: Path, records: list[dict[str, Any]]) -> None:
    splits = _split(records)
    for split, rows in splits.items():
        file = root / f"data/raw/{split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_records(file, RAW, [_stored(row) for row in rows])
    facts = {
        split: {"num_records": len(rows), "sha256": "0" * 64} for split, rows in splits.items()
    }
    _json(root / "data/raw/source.json", {**SOURCE, "splits": facts})


def _stored(record: dict[str, Any]) -> dict[str, Any]:
    messages = [{**message, "extra": "", "train": True} for message in record["messages"]]
    return {**record, "messages": messages, "tools": "", "metadata": json.dumps(record["metadata"])}


def _chat(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def _formatted(root: Path, tokenizer: Tokenizer, records: list[dict[str, Any]]) -> None:
    for split, rows in _split(records).items():
        _parquet(root / f"data/formatted/{split}.parquet", [_encode(tokenizer, r) for r in rows])
    end = tokenizer.token_to_id("<|im_end|>")
    chat = {
        "preset": "chatml",
        "template_sha256": "1" * 64,
        "bos_token_id": None,
        "pad_token_id": end,
        "end_token": "<|im_end|>",
        "end_token_id": end,
        "stop_token_ids": [end],
        "probes_sha256": "2" * 64,
    }
    _json(root / "data/formatted/chat.json", chat)


def _encode(tokenizer: Tokenizer, record: dict[str, Any]) -> dict[str, Any]:
    *before, answer = record["messages"]
    prompt = tokenizer.encode(_chat(before) + "<|im_start|>assistant\n").ids
    trained = tokenizer.encode(answer["content"] + "<|im_end|>").ids
    rest = tokenizer.encode("\n").ids
    input_ids = prompt + trained + rest
    return {
        "id": record["id"],
        "input_ids": input_ids,
        "labels": [-100] * len(prompt) + trained + [-100] * len(rest),
        "prompt_ids": prompt,
        "reference": answer["content"],
        "metadata": json.dumps(record["metadata"]),
    }


def _models(root: Path, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(tokenizer.get_vocab_size(), 8)).astype(np.float32)
    base, adapter = root / "data/models/base", root / "data/models/adapter"
    base.mkdir(parents=True)
    adapter.mkdir(parents=True)
    save_file({"model.embed_tokens.weight": embedding}, base / "model.safetensors")
    config = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    _json(base / "config.json", {**config, "vocab_size": tokenizer.get_vocab_size()})
    shutil.copytree(base, root / "data/models/quantized")
    names = [f"base_model.model.{layer}.lora_{ab}.weight" for layer in LAYERS for ab in "AB"]
    save_file(dict.fromkeys(names, embedding[:2]), adapter / "adapter_model.safetensors")
    targets = ["down_proj", "q_proj", "up_proj", "v_proj"]
    _json(adapter / "adapter_config.json", {"r": 16, "lora_alpha": 32, "target_modules": targets})


def _scores(exact: float, loss: float, metrics: list[str]) -> dict[str, Any]:
    """All metrics have the same score, those of own functions one beyond 1."""
    rate = (lambda value: value) if generates(metrics) else (lambda value: None)
    scores = {name_of(name): 10 * exact if ":" in name else exact for name in metrics}
    part = {"num_records": 2, **scores}
    return {
        "num_records": 10,
        "loss": loss,
        "perplexity": round(math.exp(loss), 6),
        "token_accuracy": 0.5 + exact / 2,
        **scores,
        "stop_rate": rate(0.9),
        "empty_rate": rate(0.0),
        "control_token_rate": rate(0.0),
        "copied_value_rate": rate(exact),
        "num_copied": 6 if generates(metrics) else 0,
        "max_new_tokens": rate(96),
        "by": {
            "kind": dict.fromkeys(KINDS, part),
            "language": {"en": part, "es": part},
            "function": {"set_timer": part},
            "turns": {"single": part},
            **({"distance": {"twin": part, "far": part}} if metrics else {}),
        },
    }


def _label_scores(right: int, exact: float) -> dict[str, Any]:
    """Scores of ten records, of which `right` are right; no test record has the last label."""
    confusion = [[right, 8 - right, 0], [0, 2, 0], [0, 0, 0]]
    part = {"low": 0.6, "high": 0.7, "num_records": 10, "confidence": 0.65, "accuracy": exact}
    return {
        **{"label_balanced_accuracy": exact, "label_macro_f1": exact / 2, "label_log_loss": 0.7},
        "label_calibration_error": 0.15,
        "labels": {
            "names": ["ham", "spam", "phishing"],
            "num_train": [9, 2, 1],
            "origin": "the answers of the training split",
            "confusion": confusion,
            "calibration": [part],
        },
    }


def _with_labels(base: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Add what the evaluation of labels adds."""
    base |= _label_scores(2, 0.2)
    base["nearest"] |= {"label_balanced_accuracy": 0.4, "label_macro_f1": 0.3}
    always = {"label_accuracy": 0.8, "label_balanced_accuracy": 0.5, "label_macro_f1": 0.444}
    base["majority"] = {"label": "ham", "train_fraction": 0.75, "num_records": 10, **always}
    evaluation["tuned"] |= _label_scores(6, 0.5)
    gain = {"mean": 0.1, "low": -0.1, "high": 0.3, "num_records_needed": None}
    gain["verdict"] = "no difference seen"
    evaluation["difference"] |= dict.fromkeys(LABEL_SCORES, gain)
    evaluation["difference_to_majority"] = {"label_balanced_accuracy": gain}
    evaluation["shares"] += [name for name in LABEL_SCORES if name != "label_log_loss"]


def _reports(root: Path, params: dict[str, Any]) -> None:
    reports, metrics = root / "reports", params["evaluation"]["metrics"]
    names = [name_of(metric) for metric in metrics]
    base = {**_scores(0.0, 3.2, metrics), "full_precision": {"loss": 3.1, "perplexity": 22.2}}
    copied = _scores(0.1, 0.0, metrics) | {"similarity": 0.7}
    base["nearest"] = copied if metrics else None
    better = {"verdict": "better", "num_records_needed": 12}
    difference = dict.fromkeys(names, {"mean": 0.5, "low": 0.3, "high": 0.7} | better)
    difference["loss"] = {"mean": -3.0, "low": -3.2, "high": -2.8} | better
    _json(reports / "evaluation_base.json", base)
    evaluation: dict[str, Any] = {"tuned": _scores(0.5, 0.2, metrics), "difference": difference}
    over = {"mean": 0.4, "low": 0.2, "high": 0.6} | better
    evaluation["difference_to_nearest"] = dict.fromkeys(names, over)
    evaluation |= {"metrics": names, "shares": [name for name in metrics if ":" not in name]}
    evaluation |= {"confidence_fraction": 0.95, "power_fraction": 0.8, "bootstrap_resamples": 2000}
    change = {"mean": 0.7, "low": 0.6, "high": 0.8, "verdict": "worse", "num_records_needed": 3}
    losses = {w: {"loss": n, "perplexity": 9.0} for w, n in (("base", 5.1), ("tuned", 5.8))}
    evaluation["general"] = {"num_records": 40, **losses, "difference": change}
    shift = {"mean": 0.0, "low": 0.0, "high": 0.0}
    noise = {"num_records": 5, "num_changed_answers": {"base": 2, "tuned": 1}, "shift": shift}
    evaluation["noise"] = {**noise, "chance": 0.1, "noise": 0.1} if names else None
    evaluation["length_ratio"] = (
        {"mean": 1.0, "low": 0.9, "high": 1.2} if generates(metrics) else None
    )
    if compares_labels(metrics):
        _with_labels(base, evaluation)
        _json(reports / "evaluation_base.json", base)
    evaluation["gate"] = gate.judge(base, evaluation, params["evaluation"]["gate"])
    _json(reports / "evaluation.json", evaluation)
    rows = [(k, m, names[0], s) for k in KINDS for m, s in (("base", 0), ("tuned", 0.5)) if names]
    _csv(reports / "before_after.csv", "kind,model,metric,score", rows)
    steps = range(10, 101, 10)
    history = [(s, s / 25, 3 / s, 0.004 * (1 - s / 100), 1 / s) for s in steps]
    _csv(reports / "history.csv", "step,epoch,loss,learning_rate,grad_norm", history)
    validation = [(50, 2.0, 0.4, 0.8), (100, 4.0, 0.2, 0.9)]
    _csv(reports / "validation.csv", "step,epoch,loss,token_accuracy", validation)
    _json(reports / "format.json", _format())
    lengths = [("train", 48, 7), ("train", 56, 5), ("validation", 48, 3), ("test", 48, 10)]
    _csv(reports / "lengths.csv", "split,num_tokens,num_records", lengths)
    _quantization(reports, params["quantization"]["preset"])


def _train(key: str) -> dict[str, Any]:
    return {
        "train_key": key,
        "num_steps": 100,
        "global_batch_size": 16,
        "packing": None,
        "answers": None,
        "kept_step": 100,
        "num_epochs": 4.0,
        "num_train_tokens": 2880,
        "num_supervised_tokens": 900,
        "num_trainable_parameters": 1000,
        "num_parameters": 20000,
        "train_loss": 0.3,
        "validation_loss": 0.2,
        "validation_token_accuracy": 0.9,
        "learning_rate": 0.0,
        "used": {
            "device": "cpu",
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "optimizer": "AdamW",
            "quantization": "nf4",
            "model_class": "Qwen2ForCausalLM",
            "adapter_dtype": "float32",
            "accelerate": {"distributed_type": "NO", "num_processes": 1},
        },
    }


def _format() -> dict[str, Any]:
    split = {
        "num_records": 12,
        "num_tokens": 720,
        "num_supervised_tokens": 225,
        "supervised_fraction": 0.3125,
        "max_tokens": 61,
        "median_tokens": 60,
        "truncated": 0,
        "dropped": 0,
        "supervised_tokens_lost": 0,
        "stop_tokens_lost": 0,
        "refused": 0,
        "trailing_messages_cut": 0,
        "contents_trimmed": 3,
        "thoughts_dropped": 0,
        "control_tokens_in_content": 0,
    }
    splits = {name: dict(split) for name in ("train", "validation", "test")}
    example = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    facts = {"splits": splits, "dropped": {}, "end_token": "<|im_end|>", "refused": []}
    return {**facts, "chat_template": "chatml", "example": example}


def _quantization(reports: Path, method: str) -> None:
    none = method == "none"
    facts = {
        "method": method,
        "came_quantized": False,
        "num_parameters": 20000,
        "num_quantized_parameters": 0 if none else 12000,
        "bytes_before": 80000,
        "bytes_after": 80000 if none else 40000,
        "relative_error_mean": 0.0 if none else 0.09,
        "relative_error_max": 0.0 if none else 0.11,
        "skipped_modules": ["lm_head"],
    }
    _json(reports / "quantization.json", facts)
    rows = [] if none else [(layer, 0.08 + i / 300, 4) for i, layer in enumerate(LAYERS)]
    _csv(reports / "quantization_error.csv", "layer,relative_error,bits", rows)


def _predictions(root: Path, records: list[dict[str, Any]], metrics: list[str]) -> None:
    """Half of the tuned model's answers are right, all of the base's wrong."""
    for name, right in (("predictions_base", ()), ("predictions", range(0, 10, 2))):
        rows = []
        for i, record in enumerate(_split(records)["test"]):
            reference = record["messages"][-1]["content"]
            rows.append(
                {
                    "id": record["id"],
                    "metadata": json.dumps(record["metadata"]),
                    "prompt": _chat(record["messages"][:-1]),
                    "reference": reference,
                    "completion": (reference if i in right else "Okay.") if metrics else None,
                    "loss": 0.2,
                    "num_supervised_tokens": 20,
                    "token_accuracy": 0.9,
                    **{name_of(m): _score(m, i in right, i) for m in metrics},
                    "stopped": True,
                    "empty": False,
                }
            )
        _parquet(root / f"reports/{name}.parquet", rows)
    copied = [
        {k: v for k, v in row.items() if k not in ("loss", "token_accuracy")}
        | {"nearest_id": "r000", "similarity": (0.95, 0.7, 0.3)[i % 3]}
        | {name_of(metric): _score(metric, False, i) for metric in metrics}
        for i, row in enumerate(rows)
    ]
    schema = pa.Table.from_pylist(copied).schema
    kept = copied if metrics else []
    file = root / "reports/predictions_nearest.parquet"
    pq.write_table(pa.Table.from_pylist(kept, schema=schema), file)


def _score(metric: str, right: bool, i: int) -> float | bool:
    if ":" in metric:
        return 10.0 * right
    return right if metric in BINARY else 0.8 * right + i / 100


def _samples(
    root: Path,
    params: dict[str, Any],
    record: dict[str, Any],
    tokenizer: Tokenizer,
    completion: str = "Okay.",
    **_: str,
) -> None:
    settings, wrong = params["generation"]["settings"], params["generation"]["wrong_chat_template"]
    *messages, answer = record["messages"]
    common = {"prompt_id": record["id"], "messages": messages, "reference": answer["content"]}
    lines: list[dict[str, Any]] = []
    rates: dict[tuple[str, str], dict[str, Any]] = {}
    grid = [(setting, "right") for setting in settings] + ([("greedy", "wrong")] if wrong else [])
    for setting, template in grid:
        for model, text in (("base", completion), ("tuned", answer["content"])):
            texts = [text] if setting == "greedy" else [text, text, text + " "]
            facts = {"setting": setting, "model": model, "template": template}
            lines.append({**common, **facts, "completions": texts, "num_distinct": len(set(texts))})
            rate = {"distinct_completion_rate": len(set(texts)) / 3, "score": 0.5}
            rates.setdefault((setting, template), {})[model] = rate
    jsonl = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    _write(root / "reports/samples.jsonl", jsonl)
    _write(root / "reports/samples.md", "# Samples\n")
    for name in ("mask.html", "mask.es.html"):
        _write(root / "reports" / name, "<!doctype html><title>mask</title>")
    summary = {setting: rates[setting, "right"] for setting in settings}
    position = {"prompt_id": record["id"], "position": 0, "text_before": "assistant\n"}
    position["tokens"] = [{"token": token} for token in ('{"', " the", "$a_b$", "<b>")]
    wrong_row = rates["greedy", "wrong"] if wrong else None
    metrics = params["evaluation"]["metrics"]
    summary = {"metric": name_of(metrics[0]) if metrics else None, "settings": summary}
    facts = {**summary, "wrong_template": wrong_row, "next_token": position}
    _json(root / "reports/samples.json", facts)
    compared = {"used": "sdpa", "num_tokens": 40, "num_same_next_token": 39, "skipped": None}
    compared |= {"largest_logit": 12.5, "largest_logit_difference": 2e-5}
    _json(root / "reports/attention.json", compared)
    losses = [(record["id"], token, 3.0, 0.1) for token in ('{"', "$a_b$", "<|im_end|>")]
    _csv(root / "reports/answer_loss.csv", "record_id,token,base,tuned", losses)
    rows = [
        (setting, model, token["token"], 1 / 2 ** (i + 1))
        for setting in ("unchanged", *(name for name in settings if name != "greedy"))
        for model in ("base", "tuned")
        for i, token in enumerate(position["tokens"])
    ]
    _csv(root / "reports/next_token.csv", "setting,model,token,probability", rows)


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _csv(path: Path, header: str, rows: Iterable[tuple[Any, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header.split(","), *rows])


def _json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def build(root: Path, *languages: str) -> dict[str, str]:
    """The pages by language, of those named or of all."""
    spec = StageSpec.read("report", root)
    values = select(read_yaml(root / "params.yaml"), spec.params["params.yaml"])
    stage, pages = Stage(spec, root), build_report.LANGUAGES
    chosen = {code: pages[code] for code in languages or pages}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_report, "LANGUAGES", chosen)
        build_report.main(Params(values), stage)
    return {code: stage.out(page).read_text() for code, page in chosen.items()}


def build_words(root: Path, plots: bool = False) -> str:
    """The English page, with no more than the places of its plots: they take seconds.

    Args:
        plots: compose the plots, because their data is of another kind than the default run's; not drawn.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_report, "to_svg", lambda *_: "<svg></svg>")
        if not plots:
            patch.setattr(build_report, "plots", Mock(MAX_TOKENS=MAX_TOKENS))
            patch.setattr(build_report, "pipeline", Mock())
        return build(root, "en")["en"]
