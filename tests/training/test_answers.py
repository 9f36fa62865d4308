"""trainer.metric_for_best_model of answers: which step is kept, and that the training stays the same."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, read_json, run_stage, write_pairs
from trainings import ADAPTER, history, prepared, results, stopped_once, train

from capas.core.errors import CapasError
from capas.training.answers import undisturbed
from stages import train_lora

pytestmark = pytest.mark.usefixtures("without_estimate")

CHRF = ("trainer.metric_for_best_model=chrf", "trainer.metric_records=5")


def of_own(root: Path, source: str, *overrides: str) -> Path:
    """A training whose metric is the function `own` of a file of the user's."""
    prepared(root, "trainer.metric_for_best_model=conf/x.py:own", *overrides)
    composed = root / "data/composed/checkpoint_metric.json"
    composed.write_text(json.dumps({"sources": {"conf/x.py": source}}))
    run_stage("train", train_lora.main, root)
    return root


# Short answers are learned first, and are others in the validation split. The long one is learned last.
SHORT, LONG = [(n, n) for n in (3, 4, 5, 6, 7)], (11, 9051728364)
OVERFITTED = (
    *("trainer.load_best_model_at_end=true", "trainer.max_steps=50", "trainer.eval_steps=10"),
    *("trainer.save_steps=10", "trainer.learning_rate=0.005", "trainer.max_grad_norm=0.3"),
    *("trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "lora.r=16"),
)


def overfit(root: Path, *overrides: str) -> Path:
    prepared(root, *OVERFITTED, *overrides)
    write_pairs(root, "train", [*SHORT, LONG])
    write_pairs(root, "validation", [*((asked, told + 1) for asked, told in 3 * SHORT), LONG])
    for name in ("base", "quantized"):  # of larger weights: it can be sure of itself
        make_model(initializer_range=0.3).save_pretrained(root / f"data/models/{name}")
    run_stage("train", train_lora.main, root)
    return root


@pytest.fixture(scope="module")
def by_answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lora, "check_memory", lambda *args: None)
        options = ("trainer.metric_for_best_model=exact_match", "trainer.metric_max_new_tokens=40")
        return overfit(tmp_path_factory.mktemp("by_answers"), *options)


def kept(root: Path) -> int:
    return int(read_json(root / "reports/train.json")["kept_step"])


def test_loss_and_answers_disagree_on_the_best_step(by_answers: Path, tmp_path: Path) -> None:
    by_loss = overfit(tmp_path)
    rows = {row["step"]: row for row in history(by_answers, "validation")}
    early, late = rows[kept(by_loss)], rows[kept(by_answers)]
    assert early["step"] < late["step"]
    assert early["loss"] < late["loss"] and early["exact_match"] < late["exact_match"]
    assert early["loss"] == min(row["loss"] for row in rows.values())
    assert late["exact_match"] == max(row["exact_match"] for row in rows.values())
    losses = [{k: v for k, v in row.items() if k != "exact_match"} for row in rows.values()]
    assert history(by_loss, "validation") == losses


def test_the_saved_adapter_is_that_of_the_kept_step(by_answers: Path) -> None:
    name = f"checkpoint-{kept(by_answers)}/adapter_model.safetensors"
    (checkpoint,) = (by_answers / ".dvc/tmp/checkpoints").glob(f"*/{name}")
    saved, there = load_file(by_answers / ADAPTER), load_file(checkpoint)
    assert saved.keys() == there.keys()
    assert all(torch.equal(saved[key], there[key]) for key in saved)


def test_the_reports_tell_the_metric_and_the_score_of_the_kept_step(by_answers: Path) -> None:
    facts = read_json(by_answers / "reports/train.json")
    assert facts["answers"] == {"metric": "exact_match", "num_records": 16, "max_new_tokens": 40}
    assert facts["validation_exact_match"] == 0.0625
    headline = read_json(by_answers / "reports/metrics/train.json")
    assert headline["validation_exact_match"] == 0.0625


DRAWING = """
import random, numpy, torch
calls = 0

def own(completion, reference, record):
    global calls
    calls += 1
    random.seed(calls), numpy.random.seed(calls), torch.manual_seed(calls)
    return calls / 1000
"""


def test_the_adapter_is_the_same_with_and_without_answers(tmp_path: Path) -> None:
    """The last step is the best one; the metric draws from every generator, dropout from torch's."""
    options = ("lora.lora_dropout=0.1", "trainer.save_steps=2", "trainer.eval_steps=2")
    plain = train(tmp_path / "plain", *options)
    best = "trainer.load_best_model_at_end=true"
    scored = of_own(tmp_path / "scored", DRAWING, best, *options)
    assert kept(scored) == kept(plain) == 6
    assert (scored / ADAPTER).read_bytes() == (plain / ADAPTER).read_bytes()
    assert history(scored) == history(plain)
    own = [row["own"] for row in history(scored, "validation")]
    assert own == sorted(own) and len(own) == 4


def test_stopped_and_resumed_it_gives_the_same_bytes(tmp_path: Path) -> None:
    options = (*CHRF, "trainer.load_best_model_at_end=true", "trainer.save_steps=2")
    options += ("trainer.eval_steps=2", "lora.lora_dropout=0.1")
    whole = train(tmp_path / "whole", *options)
    assert results(stopped_once(tmp_path / "stopped", 3, *options)) == results(whole)


WORSE = """
calls = 0

def own(completion, reference, record):
    global calls
    calls += 1
    return 1 / calls
"""


def test_it_stops_early_where_the_answers_get_no_better(tmp_path: Path) -> None:
    options = ("trainer.early_stopping_patience=2", "trainer.save_steps=5", "trainer.eval_steps=2")
    root = of_own(tmp_path, WORSE, *options, "trainer.max_steps=20")
    facts = read_json(root / "reports/train.json")
    assert facts["num_steps"] == facts["kept_step"] == 6


@pytest.mark.parametrize(
    "options",
    [
        ("quantization=nf4",),
        ("lora=none", "lora.r=null"),
        pytest.param(
            (
                "trainer.packing_length=256",
                "trainer.bf16=true",
                "trainer.gradient_checkpointing=true",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_whatever_is_trained_its_answers_are_scored(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Also where they decide nothing: load_best_model_at_end is false."""
    root = train(tmp_path, *CHRF, *options, quantize="quantization=nf4" in options)
    scores = [row["chrf"] for row in history(root, "validation")]
    assert len(scores) == 3 and 0 <= min(scores) < max(scores) <= 1


def test_the_log_tells_how_many_answers_and_how_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="capas"):
        train(tmp_path, *CHRF, "trainer.max_steps=2")
    (told,) = (text for text in caplog.messages if "is scored at every evaluation" in text)
    assert "answers to 5 of 6 validation records, up to 28 tokens each" in told
    assert any(text.startswith("step 0: chrf 0.") for text in caplog.messages)


def test_a_function_that_fails_names_key_record_and_line(tmp_path: Path) -> None:
    with pytest.raises(
        CapasError, match=r"trainer.metric_for_best_model: conf/x.py:own, validation"
    ):
        of_own(tmp_path, "def own(completion, reference, record):\n    return record['tone']\n")


def test_references_without_a_number_are_told_before_the_training(tmp_path: Path) -> None:
    root = prepared(tmp_path, "trainer.metric_for_best_model=final_number")
    write_pairs(root, "validation", [(1, "none")])
    with pytest.raises(CapasError, match=r"the reference of validation record validation-0 has no"):
        run_stage("train", train_lora.main, root)


def test_undisturbed_restores_generators_and_mode_after_a_failure(tmp_path: Path) -> None:
    def drawn() -> list[Any]:
        return [random.random(), np.random.random(), torch.rand(()).item()]

    model = torch.nn.Dropout().train()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    with pytest.raises(CapasError), undisturbed(model):
        assert not model.training
        drawn()
        raise CapasError("a metric failed")
    assert model.training and drawn() == expected
