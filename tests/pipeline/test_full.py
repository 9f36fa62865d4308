"""Full fine-tuning: all weights of a tiny model are trained, and every stage takes the whole model."""

import hashlib
import io
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import test_recipes
import torch
from safetensors.torch import load_file
from tiny import make_model, read_json, read_params, run_stage, write_workspace
from trainings import history, run_in_process, stopped_once, train, wait_for
from transformers import AutoModelForCausalLM

from capas import __main__ as cli
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.models.loading import TunedModel, load_model
from capas.training import certificate, used_settings
from capas.training.batches import Collator
from stages import train_lora

pytestmark = pytest.mark.usefixtures("without_estimate")

FULL = (
    "lora=none",
    "lora.r=null",
    "trainer.learning_rate=1.0e-3",
)  # the tiny workspace sets lora.r
PLAIN, CPU = Params({"dtype": "float32"}), torch.device("cpu")
IDS = torch.arange(40).view(2, 20)
BATCH = Collator(256)([{"input_ids": torch.arange(20), "labels": torch.arange(20)}])
RESULTS = ("model.safetensors", "config.json", "generation_config.json")


def full(root: Path, *overrides: str) -> Path:
    return train(root, *FULL, *overrides)


def results(root: Path) -> dict[str, bytes]:
    files = [f"data/models/adapter/{name}" for name in RESULTS]
    files += [f"reports/{name}" for name in ("train.json", "history.csv", "validation.csv")]
    return {name: (root / name).read_bytes() for name in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full(tmp_path_factory.mktemp("full"))


def test_every_weight_moves_and_the_loss_falls(trained: Path) -> None:
    before, after = (
        load_file(trained / f"data/models/{name}/model.safetensors") for name in ("base", "adapter")
    )
    assert before.keys() == after.keys()
    assert not [name for name in before if before[name].equal(after[name])]
    losses = [row["loss"] for row in history(trained, "validation")]
    assert losses == sorted(losses, reverse=True)


def test_the_folder_is_a_model_that_transformers_loads(trained: Path) -> None:
    folder = trained / "data/models/adapter"
    assert {file.name for file in folder.iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (folder / "config.json").read_bytes() == (
        trained / "data/models/base/config.json"
    ).read_bytes()
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [258]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded = load_model(folder, PLAIN, CPU)
    with torch.inference_mode():
        assert torch.equal(model.eval()(IDS).logits, loaded(IDS).logits)


def test_facts_are_those_of_the_run(trained: Path) -> None:
    facts = read_json(trained / "reports/train.json")
    number = make_model().num_parameters()
    assert facts["num_trainable_parameters"] == facts["num_parameters"] == number
    assert facts["used"]["model_class"] == "Qwen2ForCausalLM"
    assert "adapter_dtype" not in facts["used"]


def test_the_certificate_says_what_was_checked(trained: Path) -> None:
    facts, file = read_json(trained / "reports/certificate.json"), "adapter/model.safetensors"
    weights = (trained / "data/models" / file).read_bytes()
    assert facts["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert "adapter_sha256" not in facts
    checks = facts["checks"]
    assert checks["weights_changed"] and checks["all_finite"]
    assert checks["reloaded_logit_difference"] == 0.0
    assert checks["num_weights"] == make_model().num_parameters()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_written_once(tmp_path: Path, tied: bool) -> None:
    root = full_with(tmp_path, make_model("llama", tie_word_embeddings=tied))
    names = load_file(root / "data/models/adapter/model.safetensors").keys()
    assert ("lm_head.weight" in names) is not tied
    model = load_model(root / "data/models/adapter", PLAIN, CPU)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def full_with(root: Path, model: Any, *overrides: str) -> Path:
    """A training of another model."""
    root.mkdir(exist_ok=True)
    write_workspace(root, [*FULL, "trainer.max_steps=2", *overrides])
    for name in ("base", "quantized"):
        model.save_pretrained(root / "data/models" / name)
    run_stage("train", train_lora.main, root)
    return root


def test_a_large_model_is_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capas.models.loading.MAX_SHARD_SIZE", "200KB")
    root = full_with(tmp_path, make_model())
    folder = root / "data/models/adapter"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    index = read_json(folder / "model.safetensors.index.json")["weight_map"]
    for shard in shards:
        assert {index[name] for name in load_file(shard)} == {shard.name}
    lines = "".join(f"{hashlib.sha256(s.read_bytes()).hexdigest()}  {s.name}\n" for s in shards)
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert read_json(root / "reports/certificate.json")["model_sha256"] == expected


@pytest.mark.parametrize(
    "override",
    [
        *("trainer.gradient_checkpointing=true", "trainer.bf16=true", "trainer.optim=adamw_8bit"),
        *("trainer.packing_length=64", "model.dtype=bfloat16"),
    ],
)
def test_options_of_the_trainer_go_through(tmp_path: Path, override: str) -> None:
    """The certificate compares what was saved outside of mixed precision."""
    root = tmp_path / "root"
    model = make_model().to(torch.bfloat16) if "dtype" in override else make_model()
    full_with(root, model, override)
    checks = read_json(root / "reports/certificate.json")["checks"]
    assert checks["reloaded_logit_difference"] == 0.0


def test_the_best_evaluation_is_kept(tmp_path: Path) -> None:
    options = ("trainer.load_best_model_at_end=true", "trainer.max_steps=12")
    rates = ("trainer.learning_rate=0.1", "trainer.divergence_factor=null")
    root = full(tmp_path, *options, *rates, "trainer.eval_steps=2", "trainer.save_steps=2")
    rows = history(root, "validation")[1:]
    best = min(row["loss"] for row in rows)
    facts = read_json(root / "reports/train.json")
    assert facts["validation_loss"] == pytest.approx(best)
    assert facts["kept_step"] == next(row["step"] for row in rows if row["loss"] == best)


def test_a_second_run_and_a_stopped_one_give_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    assert results(full(tmp_path / "again")) == results(trained)
    assert results(stopped_once(tmp_path / "stopped", 4, *FULL)) == results(trained)


@pytest.mark.slow
def test_killed_and_told_to_end_it_ends_the_same(tmp_path: Path) -> None:
    """SIGKILL while a checkpoint of the whole model is written, then SIGTERM."""
    options = (*FULL, "trainer.max_steps=40", "trainer.save_steps=3", "trainer.logging_steps=7")
    undisturbed = train(tmp_path / "undisturbed", *options)
    root = tmp_path / "killed"
    root.mkdir()
    write_workspace(root, options)
    checkpoints = root / ".dvc/tmp/checkpoints"
    ends = {"checkpoint-9/model.safetensors": signal.SIGKILL}
    ends["checkpoint-18/complete.json"] = signal.SIGTERM
    for name, end in ends.items():
        process = run_in_process(root)
        wait_for(lambda name=name: any(checkpoints.glob(f"*/{name}")), process)
        process.send_signal(end)
        said = process.communicate()[0]
        assert process.returncode != 0, said
    last = run_in_process(root)
    assert re.search(r"resuming from checkpoint-(18|19|2\d)", last.communicate()[0])
    assert results(root) == results(undisturbed)


def test_a_model_that_is_wrong_is_refused(trained: Path, tmp_path: Path) -> None:
    def check(model: Any, base: str, saved: Any) -> dict[str, Any]:
        saved.save_pretrained(tmp_path)
        return certificate.check_whole(model, tmp_path, BATCH, base, lambda: saved)

    model, other = make_model(), make_model(seed=1)
    before = certificate.fingerprint(other)
    assert check(model, before, model)["weights_changed"]
    with pytest.raises(CapasError, match="no weight changed"):
        check(model, certificate.fingerprint(model), model)
    with pytest.raises(
        CapasError, match="the saved model does not reproduce the logits of the trained model"
    ):
        check(model, before, other)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(CapasError, match=r"NaN or infinite weights: model\.norm\.weight"):
        check(model, before, model)


def test_weights_that_are_left_out_are_refused(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=1.0)
    trainer: Any = type("Trainer", (), {"model": model, "optimizer": optimizer})
    with pytest.raises(CapasError, match=r"would not update \d+ weights, e\.g\. model\.layers"):
        used_settings.check_trained(trainer, all_weights=True)
    with pytest.raises(CapasError, match="training would change 1 weights of the base"):
        used_settings.check_trained(trainer, all_weights=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, from a user's records to the report, as `-S lora=none -S trainer=full` has them."""
    root = tmp_path_factory.mktemp("journey")
    options = ("lora=none", "quantization=none", "trainer=full", "model.dtype=float32")
    test_recipes.write_tiny("qwen2.5_0.5b_instruct", root, *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage, main in test_recipes.STAGES.items():
            run_stage(stage, main, root)
    lock = {"train": {"cmd": "", "outs": [], "params": {}}}
    (root / "dvc.lock").write_text(json.dumps({"stages": lock}))
    return root


def test_every_stage_takes_the_whole_model(made: Path) -> None:
    found, base = (read_json(made / f"reports/{n}.json") for n in ("evaluation", "evaluation_base"))
    assert found["tuned"]["loss"] != base["loss"]
    assert found["general"]["base"]["loss"] != found["general"]["tuned"]["loss"]
    lines = [json.loads(line) for line in (made / "reports/samples.jsonl").read_text().splitlines()]
    assert {line["model"] for line in lines} == {"base", "tuned"}
    for page, words in {
        "index": "all weights are trained",
        "index.es": "se entrenan todos",
    }.items():
        text = (made / f"reports/{page}.html").read_text()
        assert words in text and "r = " not in text


def test_it_is_talked_to_and_its_base_too(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(made)

    def heard(text: bytes) -> tuple[int, Any]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        return cli.main(["chat", "--max-new-tokens", "4"]), capsys.readouterr()

    code, said = heard(b"timer 5\n/base\n")
    assert (code, len(said.out.splitlines()) >= 2) == (0, True)
    code, said = heard(b"timer 5\n/nothing\n")
    assert code == 2 and "there is no /nothing" in said.err
    code, said = heard("timer 5\nm\xfasica\n".encode("latin1"))
    assert code == 2 and said.out
    assert "capas: line 2 of standard input is not UTF-8 (invalid start byte at byte 1)" in said.err


def test_it_needs_no_merging(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(made)
    assert cli.main(["merge", "merged"]) == 2
    assert "AutoModelForCausalLM.from_pretrained: data/models/adapter" in capsys.readouterr().err
    assert not (made / "merged").exists()


def test_the_base_is_there_beside_the_whole_model(trained: Path) -> None:
    params = read_params("evaluate", trained).model
    base = load_model(trained / "data/models/quantized", params, CPU)
    tuned = TunedModel(trained / "data/models/adapter", params, CPU, lambda: base)
    state = torch.get_rng_state()
    with torch.inference_mode(), tuned.base() as before:
        assert torch.equal(before(IDS).logits, base(IDS).logits)
        assert not torch.equal(tuned.model(IDS).logits, base(IDS).logits)
    assert torch.equal(torch.get_rng_state(), state)
