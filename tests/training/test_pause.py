"""A training that pauses after a fraction of its steps ends in the bytes of one that did not."""

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import read_json, run_stage
from trainings import ADAPTER, history, prepared, results, run_in_process, train

from capas.core.errors import EXIT_PAUSED, CapasError, Paused
from capas.training import live_rows, pause
from stages import train_lora

pytestmark = pytest.mark.usefixtures("without_estimate")

OPTIONS = (
    *("trainer.max_steps=18", "trainer.eval_steps=6", "trainer.save_steps=20"),
    *("trainer.logging_steps=7", "lora.lora_dropout=0.1"),
)


def until(root: Path, fraction: str) -> dict[str, float]:
    """Train until a pause, and return the scores there."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Paused, match=f"={fraction}. A "):
        patch.setenv(pause.VARIABLE, fraction)
        run_stage("train", train_lora.main, root)
    (file,) = root.glob(f".dvc/tmp/checkpoints/*/{pause.score_file(Fraction(fraction))}")
    found: dict[str, float] = read_json(file)
    return found


def test_paused_twice_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """Pauses at step 2, where nothing else is due, and at step 6, where the validation split is scored."""
    undisturbed = train(tmp_path / "undisturbed", *OPTIONS)
    root = prepared(tmp_path / "paused", *OPTIONS)
    first, second = until(root, "1/9"), until(root, "1/3")
    assert not (root / ADAPTER).exists()
    run_stage("train", train_lora.main, root)
    assert results(root) == results(undisturbed)
    assert (first["step"], second["step"], first["num_steps"]) == (2, 6, 18)
    curve = {row["step"]: row for row in history(root, "validation")}
    assert set(curve) == {0, 6, 12, 18}  # the pause at step 2 left no row
    assert second["validation_loss"] == curve[6]["loss"]
    assert second["validation_token_accuracy"] == curve[6]["token_accuracy"]
    assert curve[0]["loss"] > first["validation_loss"] > second["validation_loss"]


def test_a_pause_beside_the_log_has_the_score_that_the_log_would_have(tmp_path: Path) -> None:
    scored = train(tmp_path / "scored", *OPTIONS, "trainer.eval_steps=2")
    found = until(prepared(tmp_path / "paused", *OPTIONS), "1/9")
    (row,) = (row for row in history(scored, "validation") if row["step"] == 2)
    assert found["validation_loss"] == row["loss"]


def test_a_later_checkpoint_is_kept_and_scored(tmp_path: Path) -> None:
    root = prepared(tmp_path, *OPTIONS)
    assert until(root, "1/2")["step"] == 9
    assert until(root, "1/9")["step"] == 9


def test_a_score_at_the_pause_outlives_later_checkpoints(tmp_path: Path) -> None:
    root = prepared(tmp_path, *OPTIONS)
    first = until(root, "1/9")
    until(root, "1/2")
    assert until(root, "1/9") == first


def test_the_best_checkpoint_is_the_same_with_pauses(tmp_path: Path) -> None:
    options = (
        *("trainer.max_steps=12", "trainer.eval_steps=4", "trainer.save_steps=4"),
        "trainer.load_best_model_at_end=true",
    )
    undisturbed = train(tmp_path / "undisturbed", *options)
    root = prepared(tmp_path / "paused", *options)
    until(root, "5/12")
    run_stage("train", train_lora.main, root)
    assert results(root) == results(undisturbed)


@pytest.mark.parametrize("text", ["1", "0", "-1/3", "half", "1/0", ""])
def test_only_a_fraction_below_one_is_a_pause(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pause.VARIABLE, text)
    with pytest.raises(CapasError, match=r"between 0 and 1, such as 1/9"):
        pause.requested()


def test_the_rows_of_a_paused_training_end_with_the_pause(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Paused):
        patch.setattr(live_rows, "_follow", lambda *args: SimpleNamespace(stdin=None))
        with live_rows.tracker(tmp_path, "key", enabled=True):
            raise Paused
    (rows,) = tmp_path.glob(".dvc/tmp/live/*.jsonl")
    assert json.loads(rows.read_text().splitlines()[-1]) == {"event": "paused"}


@pytest.mark.slow
def test_a_process_that_pauses_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    root = prepared(tmp_path, "trainer.max_steps=3")
    process = run_in_process(root, **{pause.VARIABLE: "1/3"})
    printed = process.communicate()[0]
    assert process.returncode == EXIT_PAUSED, printed
    assert "train: paused at step 1 of 3, because CAPAS_TRAIN_UNTIL=1/3" in printed
    assert "Traceback" not in printed
