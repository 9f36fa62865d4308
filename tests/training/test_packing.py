"""Records in one row: none is lost, none sees another, and they train as they would alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import REAL, small
from tiny import make_model, read_json
from trainings import history, results, stopped_once, train
from transformers import AutoConfig, AutoModelForCausalLM

from capas.core.errors import CapasError
from capas.training import packing
from capas.training.batches import Collator, Example, score_tokens

pytestmark = pytest.mark.usefixtures("without_estimate")

LENGTHS = [7, 3, 12, 5, 9, 4, 2, 11]


def examples(lengths: list[int] = LENGTHS, vocabulary: int = 262) -> list[Example]:
    """Random records; their first token and every third one carry no loss."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate(lengths):
        ids = torch.randint(vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[::3] = -100
        made.append({"input_ids": ids, "labels": labels, "id": f"r{index}"})
    return made


def test_the_longest_goes_first_and_each_where_least_is_left() -> None:
    assert packing.best_fit_decreasing([5, 6, 3, 4, 2], 10) == [[0, 2, 4], [1, 3]]
    assert packing.best_fit_decreasing([10, 10], 10) == [[0], [1]]


@pytest.mark.parametrize("seed", range(4))
def test_every_record_has_a_place_and_little_is_left(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 100) for _ in range(2000)]
    rows = packing.best_fit_decreasing(lengths, 256)
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert max(sizes) <= 256
    assert len(rows) <= -(-sum(lengths) // 256) * 11 // 9 + 1  # Johnson's bound
    assert sum(sizes) / (256 * len(rows)) > 0.99


def test_a_record_that_is_longer_than_a_row_is_refused() -> None:
    with pytest.raises(CapasError, match=r"packing_length=10.* has 12 tokens.*max_length=10"):
        packing.best_fit_decreasing(LENGTHS, 10)


def test_positions_start_anew_and_no_record_predicts_the_next() -> None:
    first, second = examples([2, 3])
    second["labels"][0] = 9
    row = packing.join([first, second])
    assert row["position_ids"].tolist() == [0, 1, 0, 1, 2]
    assert row["labels"][2] == -100
    assert row["input_ids"].tolist() == [
        *first["input_ids"].tolist(),
        *second["input_ids"].tolist(),
    ]
    assert row["ids"] == ["r0", "r1"]


def test_rows_in_a_batch_have_positions_instead_of_a_mask() -> None:
    rows = [packing.join(examples([2, 3])), packing.join(examples([1, 1]))]
    batch = Collator(pad_token_id=7)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]]
    assert batch["input_ids"][1, 2:].tolist() == [7, 7, 7]
    assert batch["labels"][1, 2:].tolist() == [-100] * 3
    assert "attention_mask" not in batch
    flat = Collator(pad_token_id=7, flatten=True)(rows)
    assert flat["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 0]]


def small_model(preset: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**small(preset, 262), attn_implementation=attention)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", sorted(REAL))
def test_no_model_of_the_presets_looks_over_the_end_of_a_record(
    preset: str, attention: str
) -> None:
    """Records are longer than the windows of Gemma (16)."""
    records = examples([40, 23, 5, 31, 18, 9])
    model, rows = small_model(preset, attention), packing.pack(records, 64)
    assert max(len(row["ids"]) for row in rows) > 1
    assert packing.check_isolation(model, records, rows, Collator(0)) < 1e-5


@pytest.mark.parametrize("flatten", [False, True])
def test_the_proof_covers_every_record_of_the_batch(
    flatten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, seen = examples(), []
    rows, each = packing.pack(records, 20), packing._each_record
    monkeypatch.setattr(
        packing, "_each_record", lambda *a, **k: (seen.append(f) or f for f in each(*a, **k))
    )
    model = make_model().eval()
    assert packing.check_isolation(model, records, rows, Collator(0, flatten), len(rows)) < 1e-5
    assert sorted(name for name, _ in seen) == [record["id"] for record in records]
    lengths = {record["id"]: len(record["input_ids"]) for record in records}
    assert {name: len(logits) for name, logits in seen} == lengths


class Leaking(Collator):
    """Rows as one long text."""

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        batch = super().__call__(examples)
        if "position_ids" in batch:
            size = batch["position_ids"].shape
            batch["position_ids"] = torch.arange(size[1]).expand(size)
        return batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_record_that_sees_another_is_found(attention: str) -> None:
    records = examples()
    model = make_model(attn_implementation=attention).eval()
    with pytest.raises(
        CapasError, match=r"packed records attend to each other.*packing_length=null"
    ):
        packing.check_isolation(model, records, packing.pack(records, 20), Leaking(0))


def test_packed_records_have_the_loss_and_the_gradients_of_padded_ones() -> None:
    records, model = examples(), make_model()
    found = []
    for batch in (Collator(0)(records), Collator(0)(packing.pack(records, 20))):
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        total, _, count = score_tokens(logits.detach(), labels).sum(0).tolist()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        model.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(total / count, rel=1e-5)
        found.append((count, loss.item(), [p.grad.clone() for p in model.parameters()]))
    (count, loss, gradients), (packed_count, packed_loss, packed_gradients) = found
    assert packed_count == count - sum(record["labels"][0] != -100 for record in records) == count
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_a_packed_training_counts_its_tokens_and_proves_its_isolation(tmp_path: Path) -> None:
    root = train(
        tmp_path, "trainer.packing_length=256", "trainer.num_train_epochs=1", "trainer.max_steps=-1"
    )
    facts = read_json(root / "reports/train.json")
    packed = facts["packing"]
    assert packed["num_rows"] < packed["num_records"] == 40
    assert packed["isolation_difference"] < 1e-5
    filled = facts["num_train_tokens"] / (packed["num_rows"] * 256)
    assert filled == pytest.approx(packed["filled_fraction"], abs=1e-6)
    assert facts["validation_loss"] < history(root, "validation")[0]["loss"]


def test_a_packed_training_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    options = ("trainer.packing_length=128", "trainer.loraplus_lr_ratio=4", "trainer.save_steps=3")
    undisturbed = train(tmp_path / "undisturbed", *options)
    assert results(stopped_once(tmp_path / "stopped", 4, *options)) == results(undisturbed)


def test_a_row_that_is_too_short_stops_the_stage(tmp_path: Path) -> None:
    with pytest.raises(CapasError, match=r"packing_length=8, but the longest training record"):
        train(tmp_path, "trainer.packing_length=8")
