"""Training a tiny random model: what is trained, what is not, and that equal inputs give equal bytes."""

import hashlib
import logging
import math
import os
import random
import re
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shipped import composed
from tiny import make_model, read_json, read_params, run_stage
from trainings import (
    ADAPTER,
    history,
    prepared,
    results,
    run_in_process,
    run_until,
    stopped_once,
    train,
    wait_for,
)
from transformers import EvalPrediction, GPT2Config, GPT2LMHeadModel

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.records import IGNORE_INDEX, read_records
from capas.models.loading import attach_adapter, load_model
from capas.training import certificate, checkpoints, record_scores, trainer, used_settings
from capas.training.batches import (
    Collator,
    LengthGroupedSampler,
    batches_by_length,
    read_examples,
    score_examples,
    score_tokens,
    tails,
)
from capas.training.checkpoints import Checkpoints, last_checkpoint
from capas.training.early_stopping import EarlyStopping, waited
from capas.training.fit import check_lengths
from capas.training.lora import check_target_modules, check_untied
from capas.training.objective import AnswerTokens
from capas.training.record_scores import RecordScores
from stages import train_lora

pytestmark = pytest.mark.usefixtures("without_estimate")

PLAIN, CPU = Params({"dtype": "float32"}), torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), "quantization=nf4", quantize=True)


def test_b_is_zero_at_first_and_not_in_the_end(trained: Path) -> None:
    params = read_params("train", trained)
    base = load_model(trained / "data/models/quantized", params.model, CPU)
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        before = base(ids).logits
        untrained = train_lora.add_lora(base, params).eval()
        assert torch.equal(untrained(ids).logits, before)
    weights = load_file(trained / ADAPTER)
    assert all(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)


def test_training_leaves_the_base_bit_identical(tmp_path: Path) -> None:
    """The weights that live in the model after the last step, not those on disk."""
    kept: dict[str, Any] = {}
    original = train_lora.save_tuned

    def keep(model: Any, *args: Any) -> None:
        kept.update({k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k})
        original(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lora, "save_tuned", keep)
        train(tmp_path, "quantization=nf4", quantize=True)
    fresh = train_lora.add_lora(
        load_model(tmp_path / "data/models/quantized", PLAIN, CPU), read_params("train", tmp_path)
    ).state_dict()
    assert kept and all(torch.equal(kept[name], fresh[name]) for name in kept)


def test_facts_are_those_of_the_run(trained: Path) -> None:
    facts = read_json(trained / "reports/train.json")
    used = facts["used"]
    assert (used["device"], used["quantization"], used["attn_implementation"]) == (
        "cpu",
        "nf4",
        "sdpa",
    )
    assert used["linear_kernel"] == "bitsandbytes.matmul_4bit"
    assert used["accelerate"]["distributed_type"] == "NO"
    assert facts["num_steps"] == 6
    assert facts["num_trainable_parameters"] == sum(
        w.numel() for w in load_file(trained / ADAPTER).values()
    )


def test_curves_begin_with_the_base_and_end_with_the_last_step(trained: Path) -> None:
    assert [row["step"] for row in history(trained)] == [2, 4, 6]
    validation = history(trained, "validation")
    assert [row["step"] for row in validation] == [0, 4, 6]
    assert validation[-1]["loss"] < validation[0]["loss"]
    facts = read_json(trained / "reports/train.json")
    assert facts["train_loss"] == pytest.approx(
        sum(row["loss"] for row in history(trained)) / 3, rel=1e-5
    )


def test_an_objective_of_another_kind_has_its_loss_and_its_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop takes loss, scores and columns from the objective alone."""

    losses = []

    class SmallLogits(AnswerTokens):
        curve = ("loss", "records")

        @staticmethod
        def loss(outputs: Any, labels: Any, **_: Any) -> torch.Tensor:
            losses.append(outputs.logits.pow(2).mean())
            return losses[-1]

        def summarize(self, prediction: EvalPrediction) -> dict[str, float]:
            means = super().summarize(prediction)
            return {**means, "records": float(len(prediction.predictions))}

    monkeypatch.setattr("capas.training.objective.AnswerTokens", SmallLogits)
    root = train(tmp_path, "trainer.max_steps=2", "trainer.logging_steps=1")
    assert history(root)[0]["loss"] in [pytest.approx(loss.item(), abs=1e-6) for loss in losses]
    assert history(root)[0]["loss"] < 1 < history(root, "validation")[0]["loss"]
    assert history(root, "validation")[0]["records"] > 1


def test_validation_loss_is_the_mean_over_supervised_tokens(trained: Path) -> None:
    base = load_model(trained / "data/models/quantized", PLAIN, CPU)
    tuned = attach_adapter(base, trained / "data/models/adapter")
    examples = read_examples(trained / "data/formatted/validation.parquet")
    loss, hits, count = (
        score_examples(tuned, examples, Collator(256), batch_size=1).sum(dim=0).tolist()
    )
    last = history(trained, "validation")[-1]
    assert last["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert last["token_accuracy"] == pytest.approx(hits / count, rel=1e-5)


def test_each_validation_record_has_its_own_score(trained: Path) -> None:
    """In the order of the split, which is not that of the evaluation: it sorts by length."""
    base = load_model(trained / "data/models/quantized", PLAIN, CPU)
    tuned = attach_adapter(base, trained / "data/models/adapter")
    examples = read_examples(trained / "data/formatted/validation.parquet")
    scores = score_examples(tuned, examples, Collator(256), batch_size=1)
    rows = record_rows(trained)
    assert [row["id"] for row in rows] == [example["id"] for example in examples]
    assert [row["loss_sum"] for row in rows] == pytest.approx(scores[:, 0].tolist(), rel=1e-4)
    counts = [[row["num_hits"], row["num_supervised_tokens"]] for row in rows]
    assert counts == scores[:, 1:].int().tolist()
    assert len({round(row["loss_sum"], 6) for row in rows}) > 1
    assert mean_loss(rows) == pytest.approx(told(trained), rel=1e-5)


def record_rows(root: Path) -> list[dict[str, Any]]:
    return list(read_records(root / record_scores.FILE, record_scores.SCHEMA))


def mean_loss(rows: list[dict[str, Any]]) -> float:
    tokens = sum(row["num_supervised_tokens"] for row in rows)
    return float(sum(row["loss_sum"] for row in rows) / tokens)


def told(root: Path) -> float:
    return float(read_json(root / "reports/train.json")["validation_loss"])


def test_scores_of_records_go_back_to_the_order_of_the_split() -> None:
    evaluated = [[0.5, 1, 2], [0.1, 3, 3], [0.9, 0, 4]]
    assert record_scores.in_data_order(evaluated, [2, 0, 1]) == [
        [0.1, 3, 3],
        [0.9, 0, 4],
        [0.5, 1, 2],
    ]
    with pytest.raises(ValueError, match="shorter than argument 1"):
        record_scores.in_data_order(evaluated[:2], [2, 0, 1])


def test_a_checkpoint_holds_the_scores_of_the_last_evaluation_and_of_the_best(
    tmp_path: Path,
) -> None:
    kept = RecordScores()
    for step, best in ((0, None), (2, None), (4, 2), (6, 2)):
        kept.add(step, [[step / 3, 1, 2]], best)
    kept.write(tmp_path)
    resumed = RecordScores()
    resumed.read(tmp_path)
    assert [resumed.of(step) for step in (2, 6)] == [[[2 / 3, 1, 2]], [[2.0, 1, 2]]]
    with pytest.raises(KeyError):
        resumed.of(4)


def test_adapter_is_portable(trained: Path) -> None:
    folder = trained / "data/models/adapter"
    config = read_json(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == "data/embedded"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [258]
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_adapter_folder_speaks_the_chat_format(trained: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained / "data/models/adapter")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("other", [{"num_hidden_layers": 1}, {"intermediate_size": 96}])
def test_adapter_of_another_base_is_refused(
    trained: Path, tmp_path: Path, other: dict[str, int]
) -> None:
    make_model(**other).save_pretrained(tmp_path)
    with pytest.raises(CapasError, match="does not fit the base model"):
        attach_adapter(load_model(tmp_path, PLAIN, CPU), trained / "data/models/adapter")


def test_second_run_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    assert results(train(tmp_path, "quantization=nf4", quantize=True)) == results(trained)


def test_seed_moves_the_adapter(trained: Path, tmp_path: Path) -> None:
    other = train(tmp_path, "quantization=nf4", "seed=1", quantize=True)
    assert (other / ADAPTER).read_bytes() != (trained / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    "override",
    ["trainer.gradient_accumulation_steps=2", "trainer.gradient_checkpointing=true"],
)
def test_how_a_batch_is_computed_does_not_matter(
    trained: Path, tmp_path: Path, override: str
) -> None:
    """2 x 2 records are the 1 x 4 of the other run; checkpointed activations are computed twice, equally."""
    size = 2 if "accumulation" in override else 4
    other = train(
        tmp_path,
        "quantization=nf4",
        override,
        f"trainer.per_device_train_batch_size={size}",
        quantize=True,
    )
    losses = [[row["loss"] for row in history(root)] for root in (trained, other)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_dora_trains_and_its_adapter_is_found_again(tmp_path: Path) -> None:
    root = train(tmp_path, "lora.use_dora=true", "trainer.max_steps=2")
    base = load_model(root / "data/models/base", PLAIN, CPU)
    tuned = attach_adapter(base, root / "data/models/adapter")
    assert any("lora_magnitude" in name for name, _ in tuned.named_parameters())


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_other_initial_values_change_nothing_at_first(tmp_path: Path, kind: str) -> None:
    root = train(tmp_path, f"lora.init_lora_weights={kind}", "trainer.max_steps=2")
    params, ids = read_params("train", root), torch.arange(40).view(2, 20)
    base = load_model(root / "data/models/base", params.model, CPU)
    with torch.inference_mode():
        before = base(ids).logits
        untrained = train_lora.add_lora(base, params).eval()
        torch.testing.assert_close(untrained(ids).logits, before)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "sgd"])
def test_b_learns_faster_than_a(tmp_path: Path, optim: str) -> None:
    common = (f"trainer.optim={optim}", "trainer.max_steps=2")
    plain = train(tmp_path / "plain", *common)
    faster = train(tmp_path / "faster", *common, "trainer.loraplus_lr_ratio=16")
    ratios = [
        read_json(r / "reports/train.json")["used"]["loraplus_lr_ratio"] for r in (plain, faster)
    ]
    assert ratios == [1.0, 16.0]
    moved = [
        sum(w.norm() for name, w in load_file(r / ADAPTER).items() if "lora_B" in name)
        for r in (plain, faster)
    ]
    assert moved[1] > 4 * moved[0]
    assert history(faster)[0]["learning_rate"] == history(plain)[0]["learning_rate"]


def test_the_loss_falls_with_sgd(tmp_path: Path) -> None:
    train(tmp_path, "trainer.optim=sgd", "trainer.learning_rate=0.9", "trainer.max_steps=30")
    losses = [row["loss"] for row in history(tmp_path)]
    assert len(losses) == 15
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2, losses


def test_adamw_without_weight_decay_is_adam() -> None:
    """The answer to trainer.optim=adam says so."""
    start, found = torch.linspace(-1, 1, 12), []
    for make in (torch.optim.Adam, torch.optim.AdamW):
        weight = start.clone().requires_grad_()
        optimizer = make([weight], lr=0.01, weight_decay=0.0, fused=True)
        for _ in range(5):
            optimizer.zero_grad()
            (weight**4).sum().backward()
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], start)


def test_a_record_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    make_model().config.save_pretrained(tmp_path)
    check_lengths(tmp_path, [512, 3], trust_remote_code=False)
    with pytest.raises(CapasError, match=r"513 tokens, .*context is 512 tokens\. .*max_length=512"):
        check_lengths(tmp_path, [3, 513], trust_remote_code=False)


def test_the_linear_layers_of_gpt2_are_found() -> None:
    sizes = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    check_target_modules(model, ["c_attn"])
    with pytest.raises(
        CapasError, match="no linear layer is called q_proj; there are: c_attn, c_proj"
    ):
        check_target_modules(model, ["q_proj"])
    with pytest.raises(CapasError, match="no linear layer is called mlp"):
        check_target_modules(model, ["c_attn", "mlp"])


@pytest.mark.parametrize("asked", [".*", r".*\.(mlp|q_proj)"])
def test_modules_that_are_no_linear_layers_are_told_shortly_and_by_name(asked: Any) -> None:
    model = make_model()
    with pytest.raises(
        CapasError, match=r"matches \d+ modules .*mlp \(Qwen2MLP\).*q_proj,v_proj"
    ) as told:
        check_target_modules(model, asked)
    assert len(str(told.value)) < 500
    for right in (r".*\.(q|v)_proj", ["q_proj", "layers.0.mlp.up_proj"], "all-linear"):
        check_target_modules(model, right)


def test_a_head_that_is_the_embedding_gets_no_lora() -> None:
    """Merged, it would change the embedding, too."""
    model = make_model(tie_word_embeddings=True)
    lora = {"r": 2, "task_type": "CAUSAL_LM"}
    with pytest.raises(CapasError, match=r"target_modules: lm_head is tied to the embedding"):
        check_untied(
            get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], **lora))
        )
    check_untied(
        get_peft_model(
            make_model(tie_word_embeddings=False), LoraConfig(target_modules=["lm_head"], **lora)
        )
    )


@pytest.mark.parametrize(
    ("supervised", "start", "end"),
    [([0, 299], 172, 300), ([100], 0, 101), ([200], 172, 300), ([171], 44, 172), ([250], 172, 300)],
)
def test_a_tail_holds_tokens_with_loss(supervised: list[int], start: int, end: int) -> None:
    """The first label predicts nothing, so that one is needed behind it."""
    labels = torch.full((300,), IGNORE_INDEX)
    labels[supervised] = 1
    (tail,) = tails([{"input_ids": torch.arange(300), "labels": labels, "id": "a"}])
    assert tail["input_ids"].tolist() == list(range(start, end))
    assert (tail["labels"][1:] != IGNORE_INDEX).any()


def test_batches_of_similar_length_keep_to_their_tokens() -> None:
    lengths = [9, 2, 2, 30, 3, 2, 3]
    assert list(batches_by_length(lengths, 3, 10)) == [[1, 2, 5], [4, 6], [0], [3]]
    assert list(batches_by_length(lengths, 64, 10**9)) == [[1, 2, 5, 4, 6, 0, 3]]
    assert list(batches_by_length([], 3, 10)) == []


def asked(*overrides: str) -> Params:
    return Params(composed(["hardware.num_threads=1", "trainer.optim=adamw_8bit", *overrides]))


USED = {
    "device": "cpu",
    "num_threads": 1,
    "deterministic_algorithms": True,
    "attn_implementation": "sdpa",
    "optimizer": "bitsandbytes.optim.adamw.AdamW",
    "optimizer_fused": False,
    "optimizer_paged": False,
    "optimizer_bits": 8,
    "loraplus_lr_ratio": 1.0,
    "lr_scheduler_type": "linear",
    "gradient_checkpointing": False,
    "fused_lora": False,
    "liger_kernel": None,
    "accelerate": {
        "mixed_precision": "no",
        "num_gpus_in_process": 0,
        "num_processes": 1,
        "distributed_type": "NO",
    },
}


@pytest.mark.parametrize("name", [*USED, *USED["accelerate"]])
def test_whatever_is_used_and_not_asked_for_stops_the_training(name: str) -> None:
    used_settings.check(USED, asked())
    accelerate = USED["accelerate"]
    if name in accelerate:
        changed = {**USED, "accelerate": {**accelerate, name: 2}}
    elif name == "accelerate":
        changed = {**USED, "accelerate": {**accelerate, "mixed_precision": "bf16"}}
    else:
        changed = {**USED, name: "other"}
    with pytest.raises(CapasError, match="would not use the requested settings"):
        used_settings.check(changed, asked())


def test_tf32_is_compared_on_a_gpu() -> None:
    params, used = asked("hardware=gpu", "hardware.num_threads=1"), {**USED, "device": "cuda"}
    used_settings.check({**used, "tf32": True}, params)
    with pytest.raises(CapasError, match="tf32 is False, not True"):
        used_settings.check({**used, "tf32": False}, params)


def test_a_validation_loss_that_is_no_number_stops_the_training() -> None:
    with pytest.raises(CapasError, match="the validation loss is nan"):
        AnswerTokens().summarize(EvalPrediction(np.array([[np.nan, 0.0, 3.0]]), np.zeros(1)))


def test_names_of_optimizers_and_schedules_go_through(tmp_path: Path) -> None:
    options = (
        "optim=adamw_8bit",
        "lr_scheduler_type=cosine_with_min_lr",
        "lr_scheduler_kwargs={min_lr: 1.0e-3}",
    )
    root = train(tmp_path, *(f"+trainer.{o}" if "kwargs" in o else f"trainer.{o}" for o in options))
    used = read_json(root / "reports/train.json")["used"]
    assert used["optimizer"] == "bitsandbytes.optim.adamw.AdamW"
    assert used["lr_scheduler_type"] == "cosine_with_min_lr"
    assert history(root)[-1]["learning_rate"] >= 1e-3


@pytest.mark.parametrize("preset", ["int8", "fp4"])
def test_other_quantizations_train(tmp_path: Path, preset: str) -> None:
    root = train(tmp_path, f"quantization={preset}", quantize=True)
    assert read_json(root / "reports/train.json")["used"]["quantization"] == preset
    losses = [row["loss"] for row in history(root, "validation")]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.learning_rate=1.0e+30",
            r"the loss is nan at step \d, in the batch with the records train-\d+, ",
        ),
        (
            "trainer.divergence_factor=1.001",
            r"training diverges: the loss is [\d.]+ at step \d, up from [\d.]+ at first. Records of",
        ),
        (
            "lora.target_modules=[q_proj,query]",
            "no linear layer is called query; there are: q_proj, k_proj",
        ),
        (
            "lora.target_modules=nothing",
            r"'nothing' matches no linear layer .*; there are",
        ),
        ("lora.target_modules='*'", r"'\*' is not a valid regular expression: nothing to repeat"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(CapasError, match=message):
        train(tmp_path, "trainer.logging_steps=1", override)


def test_a_schedule_that_never_reaches_its_peak_is_told_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, "trainer.warmup_steps=10")
    (told,) = (text for text in caplog.messages if "warm-up steps of 6" in text)
    assert "peaks at 0.002 and never reaches trainer.learning_rate=0.004" in told
    with pytest.raises(CapasError, match=r"is 0 for 1 of 1 steps.*Set trainer.warmup_steps=0"):
        train(tmp_path / "one", "trainer.max_steps=1")


BEST = (
    *("trainer.load_best_model_at_end=true", "trainer.learning_rate=10.0", "trainer.max_steps=24"),
    *("trainer.eval_steps=2", "trainer.save_steps=2", "trainer.divergence_factor=null"),
)


def scored(root: Path) -> tuple[float, float]:
    """Validation loss of the adapter in `root`, and the one that train.json tells."""
    base = load_model(root / "data/models/base", PLAIN, CPU)
    tuned = attach_adapter(base, root / "data/models/adapter")
    examples = read_examples(root / "data/formatted/validation.parquet")
    loss, _, count = score_examples(tuned, examples, Collator(256), batch_size=50).sum(0).tolist()
    return loss / count, read_json(root / "reports/train.json")["validation_loss"]


@pytest.mark.parametrize("metric", ["loss", "token_accuracy"])
def test_the_best_evaluation_is_kept(tmp_path: Path, metric: str) -> None:
    root = train(tmp_path, *BEST, f"trainer.metric_for_best_model={metric}")
    rows = history(root, "validation")[1:]
    best = (min if metric == "loss" else max)(row[metric] for row in rows)
    expected = next(row["step"] for row in rows if row[metric] == best)
    assert read_json(root / "reports/train.json")["kept_step"] == expected < 24
    found, reported = scored(root)
    assert found == pytest.approx(reported, rel=1e-5)
    assert mean_loss(record_rows(root)) == pytest.approx(reported, rel=1e-5)


def test_the_last_step_may_be_the_best(tmp_path: Path) -> None:
    root = train(tmp_path, *BEST, "trainer.learning_rate=1.0e-4")
    assert read_json(root / "reports/train.json")["kept_step"] == 24
    found, reported = scored(root)
    assert found == pytest.approx(reported, rel=1e-5)


def test_it_stops_where_nothing_gets_better(tmp_path: Path) -> None:
    root = train(tmp_path, *BEST, "trainer.early_stopping_patience=2")
    facts = read_json(root / "reports/train.json")
    assert facts["num_steps"] == facts["kept_step"] + 4 < 24
    before = results(root)
    run_stage("train", train_lora.main, root)  # killed before DVC recorded the outputs
    assert results(root) == before


def test_sigterm_in_the_evaluation_that_stops_it_is_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", *BEST, "trainer.early_stopping_patience=2")
    last = read_json(whole / "reports/train.json")["num_steps"]
    evaluate = EarlyStopping.on_evaluate

    def ended(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate(self, args, state, *rest, **kwargs)

    monkeypatch.setattr(EarlyStopping, "on_evaluate", ended)
    root = train(tmp_path / "ended", *BEST, "trainer.early_stopping_patience=2")
    assert results(root) == results(whole)


def test_a_training_shorter_than_a_row_of_the_log_has_one(tmp_path: Path) -> None:
    root = train(
        tmp_path, "trainer.logging_steps=10", "trainer.eval_steps=50", "trainer.max_steps=5"
    )
    assert [row["step"] for row in history(root)] == [5]
    assert read_json(root / "reports/train.json")["train_loss"] == history(root)[0]["loss"]


def test_the_last_complete_checkpoint_outlives_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while that is not marked as complete yet, a training goes on from the one before."""
    seen: list[list[str]] = []
    digests = checkpoints._digests

    def noted(folder: Path) -> dict[str, str]:
        seen.append(sorted(mark.parent.name for mark in folder.parent.glob("*/complete.json")))
        return digests(folder)

    monkeypatch.setattr(checkpoints, "_digests", noted)
    train(tmp_path, "trainer.max_steps=8", "trainer.save_steps=2", "trainer.eval_steps=4")
    assert seen == [[], ["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]


@pytest.mark.parametrize(
    ("scores", "greater", "threshold", "expected"),
    [
        ([], False, 0.0, 0),
        ([3.0, 2.0, 1.0], False, 0.0, 0),
        ([3.0, 2.0, 2.0, 2.5], False, 0.0, 2),
        ([3.0, 2.0, 1.9, 1.8], False, 0.5, 2),
        ([0.1, 0.3, 0.2], True, 0.0, 1),
    ],
)
def test_evaluations_without_a_better_one(
    scores: list[float], greater: bool, threshold: float, expected: int
) -> None:
    assert waited(scores, greater, threshold) == expected


def test_the_certificate_says_what_was_checked(trained: Path) -> None:
    facts = read_json(trained / "reports/certificate.json")
    checks = facts["checks"]
    weights = load_file(trained / ADAPTER)
    assert facts["adapter_sha256"] == hashlib.sha256((trained / ADAPTER).read_bytes()).hexdigest()
    assert checks["num_weights"] == sum(w.numel() for w in weights.values())
    assert checks["num_lora_b"] == sum("lora_B" in name for name in weights) > 10
    assert (checks["num_lora_b_zero"], checks["reloaded_logit_difference"]) == (0, 0.0)
    assert facts["params"]["lora"]["r"] == 4
    assert facts["packages"]["peft"]
    assert "data/models/quantized" in facts["inputs"]


@pytest.fixture
def adapted(trained: Path, tmp_path: Path) -> tuple[Any, Path, str]:
    """A trained model in memory, its adapter saved, and the fingerprint of its base."""
    base = load_model(trained / "data/models/quantized", PLAIN, CPU)
    model: Any = train_lora.add_lora(base, read_params("train", trained))
    sha256 = certificate.fingerprint(model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path)
    return model, tmp_path, sha256


BATCH = Collator(256)([{"input_ids": torch.arange(20), "labels": torch.arange(20)}])


def test_an_adapter_that_is_right_passes(adapted: tuple[Any, Path, str]) -> None:
    model, folder, sha256 = adapted
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert certificate.check_adapter(model, folder, BATCH, sha256)["base_unchanged"]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.active_adapters == ["default"]


def test_an_adapter_that_is_wrong_is_refused(adapted: tuple[Any, Path, str]) -> None:
    model, folder, sha256 = adapted
    file = folder / certificate.WEIGHTS
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)

    def saved(**changes: torch.Tensor) -> None:
        save_file({**weights, **changes}, file)

    saved(**{name: weights[name] * float("nan")})
    with pytest.raises(CapasError, match=f"NaN or infinite weights: {re.escape(name)}"):
        certificate.check_adapter(model, folder, BATCH, sha256)
    saved(**{name: weights[name] * 2})
    with pytest.raises(CapasError, match="does not reproduce the logits of the trained model"):
        certificate.check_adapter(model, folder, BATCH, sha256)
    saved(**{n: torch.zeros_like(w) for n, w in weights.items() if "lora_B" in n})
    with pytest.raises(CapasError, match="nothing was learned: every lora_B is still zero"):
        certificate.check_adapter(model, folder, BATCH, sha256)
    saved()
    head = model.get_base_model().lm_head.weight
    whole = head.data.clone()
    head.data[:] = float("inf")
    with pytest.raises(CapasError, match="does not reproduce the logits of the trained model"):
        certificate.check_adapter(model, folder, BATCH, certificate.fingerprint(model))
    head.data[:] = whole
    model.get_base_model().model.norm.weight.data[0] += 1e-6
    with pytest.raises(CapasError, match="changed weights of the base"):
        certificate.check_adapter(model, folder, BATCH, sha256)


def test_bf16_is_used_where_it_is_asked_for(tmp_path: Path) -> None:
    root = train(tmp_path, "trainer.bf16=true", "trainer.max_steps=2")
    assert read_json(root / "reports/train.json")["used"]["accelerate"]["mixed_precision"] == "bf16"


@pytest.mark.slow
def test_killed_in_a_step_and_in_a_save_it_ends_the_same(tmp_path: Path) -> None:
    """Killed twice: the first time in the middle of writing a checkpoint, the second one between two."""
    options = ("trainer.max_steps=40", "trainer.save_steps=3", "lora.lora_dropout=0.1")
    undisturbed = train(tmp_path / "undisturbed", *options)
    root = prepared(tmp_path / "killed", *options)

    def saving(step: int) -> bool:
        return any(
            (root / ".dvc/tmp/checkpoints").glob(f"*/checkpoint-{step}/adapter_model.safetensors")
        )

    def saved(step: int) -> bool:
        return any((root / ".dvc/tmp/checkpoints").glob(f"*/checkpoint-{step}/complete.json"))

    for condition in (partial(saving, 9), partial(saved, 24)):
        process = run_in_process(root)
        wait_for(condition, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = run_in_process(root, PYTHONHASHSEED="7")
    assert "resuming from checkpoint-" in last.communicate()[0]
    assert last.returncode == 0
    assert results(root) == results(undisturbed)


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_told_to_end_it_saves_its_step_and_goes_on(
    number: signal.Signals, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A signal between two checkpoints and between two rows of the log."""
    options = ("trainer.max_steps=16", "trainer.save_steps=20", "trainer.logging_steps=7")
    undisturbed = train(tmp_path / "undisturbed", *options)
    root, step = prepared(tmp_path / "preempted", *options), trainer.Trainer.training_step

    def ended(self: Any, *args: Any) -> torch.Tensor:
        if self.state.global_step == 9:
            os.kill(os.getpid(), number)
        return step(self, *args)

    saved = pytest.raises(
        CapasError, match=f"stopped by {name} at step 10 of 16. A checkpoint was saved"
    )
    with pytest.MonkeyPatch.context() as patch, saved:
        patch.setattr(trainer.Trainer, "training_step", ended)
        run_stage("train", train_lora.main, root)
    assert not (root / ADAPTER).exists()
    with caplog.at_level(logging.INFO, "capas"):
        run_stage("train", train_lora.main, root)
    assert "resuming from checkpoint-10" in caplog.text
    assert results(root) == results(undisturbed)


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(tmp_path: Path) -> None:
    root, step = prepared(tmp_path, "trainer.max_steps=4"), trainer.Trainer.training_step

    def interrupted(self: Any, *args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "training_step", interrupted)
        run_stage("train", train_lora.main, root)
    assert not list(root.glob(".dvc/tmp/checkpoints/*/checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    """`nohup dvc repro` goes on."""
    root, step = prepared(tmp_path, "trainer.max_steps=3"), trainer.Trainer.training_step

    def interrupted(self: Any, *args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.Trainer, "training_step", interrupted)
            run_stage("train", train_lora.main, root)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (root / ADAPTER).exists()


@pytest.mark.slow
def test_a_process_that_is_told_to_end_does_the_same(tmp_path: Path) -> None:
    options = ("trainer.max_steps=60", "trainer.save_steps=50", "trainer.logging_steps=7")
    undisturbed = train(tmp_path / "undisturbed", *options)
    root = prepared(tmp_path / "preempted", *options)
    process = run_until(root, 15)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 1
    assert "stopped by SIGTERM at step 16 of 60. A checkpoint was saved" in said
    assert not (root / ADAPTER).exists()
    again = run_in_process(root)
    assert "resuming from checkpoint-16" in again.communicate()[0]
    assert results(root) == results(undisturbed)


@pytest.mark.slow
def test_ended_twenty_times_at_random_it_ends_the_same(tmp_path: Path) -> None:
    """SIGKILL and SIGTERM in turns, after a random time, also while a checkpoint is written."""
    options = (
        *("trainer.max_steps=400", "trainer.save_steps=10", "trainer.logging_steps=7"),
        *("trainer.eval_steps=10", "trainer.load_best_model_at_end=true", "lora.lora_dropout=0.1"),
    )
    undisturbed = train(tmp_path / "undisturbed", *options)
    root = prepared(tmp_path / "ended", *options)
    rng, ended = random.Random(0), 0
    checkpoints = root / ".dvc/tmp/checkpoints"
    for turn in range(20):
        process = run_in_process(root)
        before = set(checkpoints.glob("*/checkpoint-*"))

        def begun(before: set[Path] = before) -> bool:
            return bool(set(checkpoints.glob("*/checkpoint-*")) - before)

        wait_for(begun, process)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGTERM if turn % 2 else signal.SIGKILL)
        process.communicate()
        ended += process.returncode != 0
    assert ended == 20
    last = run_in_process(root)
    assert "resuming from checkpoint-" in last.communicate()[0]
    assert results(root) == results(undisturbed)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_resumed_in_the_second_epoch_it_sees_the_same_batches(
    tmp_path: Path, strategy: str
) -> None:
    """10 steps an epoch: checkpoint 13 stands in the middle of the second."""
    options = (
        *(f"trainer.train_sampling_strategy={strategy}", "trainer.max_steps=18"),
        *("trainer.save_steps=13", "trainer.eval_steps=9"),
    )
    undisturbed = train(tmp_path / "undisturbed", *options)
    assert results(stopped_once(tmp_path / "stopped", 14, *options)) == results(undisturbed)


def test_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """A file that is missing, cut short, or not yet accounted for."""
    for step in (5, 10, 15, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"state")
        accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
        trainer: Any = SimpleNamespace(
            open_row=dict, accelerator=accelerator, record_scores=RecordScores()
        )
        Checkpoints(trainer).on_save(
            SimpleNamespace(output_dir=tmp_path),
            SimpleNamespace(
                global_step=step, is_world_process_zero=True, best_model_checkpoint=None
            ),
            None,
        )  # type: ignore[arg-type]
    (tmp_path / "checkpoint-20/complete.json").unlink()
    (tmp_path / "checkpoint-15/optimizer.pt").write_bytes(b"sta")
    (tmp_path / "checkpoint-10/optimizer.pt").unlink()
    assert last_checkpoint(tmp_path, resume=True) == tmp_path / "checkpoint-5"
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-5"]
    assert last_checkpoint(tmp_path, resume=False) is None


def test_padding_carries_no_loss_and_is_masked_by_position() -> None:
    examples = [
        {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 0, 7], [0])
    ]
    batch = Collator(pad_token_id=0)(examples)
    assert batch["input_ids"].tolist() == [[5, 0, 7], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 0, 7], [0, -100, -100]]


def test_token_scores_by_hand() -> None:
    """Two tokens, p = 3/4 and 1/4: the second record's only supervised token is the improbable one."""
    logits = torch.tensor([math.log(3), 0.0]).expand(2, 3, 2)
    labels = torch.tensor([[-100, 0, 0], [-100, -100, 1]])
    expected = [[2 * math.log(4 / 3), 2, 2], [math.log(4), 0, 1]]
    torch.testing.assert_close(
        score_tokens(logits, labels), torch.tensor(expected, dtype=torch.float64)
    )


def test_batches_are_alike_in_length_and_all_records_are_seen() -> None:
    lengths = [(37 * i) % 101 for i in range(500)]
    order = list(LengthGroupedSampler(lengths, batch_size=10, seed=0))
    spreads = [
        max(lengths[i] for i in b) - min(lengths[i] for i in b)
        for b in zip(*[iter(order)] * 10, strict=True)
    ]
    assert sorted(order) == list(range(500))
    assert sum(spreads) / len(spreads) < 15, "a random batch spreads over about 80"


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(list(range(40)), 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
