"""The estimate of a training's memory: every part against what really takes it, and what it leads to."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SIZES, whole
from shipped import composed
from tiny import REPOSITORY, make_model, read_params, run_stage, write_workspace
from transformers import AutoConfig, LlamaConfig, Trainer, TrainingArguments

from capas import __main__ as cli
from capas.core.dag import StageSpec
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.stage import Stage
from capas.models.loading import load_model
from capas.training import activations, capacity, malloc_heap, memory, optimizers
from capas.training.activations import Alive, Batch, Phase
from capas.training.memory import Estimate, Workload
from stages import train_lora

CPU = torch.device("cpu")


def compose(*overrides: str) -> Params:
    return Params(composed(["quantization=none", *overrides]))


def save(folder: Path, **config: Any) -> Path:
    make_model("llama", **config).save_pretrained(folder)
    return folder


def estimate(folder: Path, *overrides: str, records: int = 4, tokens: int = 48) -> Estimate:
    params = compose(*overrides)
    batch = Batch(records, tokens)
    workload = Workload(batch, batch, batch, on_cpu=False)
    quantization = params.quantization.without("preset")
    groups = params.model, params.lora, params.trainer
    return memory.estimate(folder, *groups, workload, quantization)


@pytest.mark.parametrize("preset", sorted(SIZES))
def test_weights_are_counted_as_the_hub_counts_them(preset: str) -> None:
    params = compose(f"model={preset}")
    config = AutoConfig.for_model(**whole(preset))
    model = activations.build(config, params.model, params.lora, None)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == SIZES[preset][-1]
    assert len(SIZES) == 11


@pytest.mark.parametrize("preset", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double", [True, False])
def test_bits_and_scales_are_those_that_bitsandbytes_keeps(
    preset: str, double: bool, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    params = compose(f"quantization={preset}", f"quantization.bnb_4bit_use_double_quant={double}")
    how = BitsAndBytesConfig(**params.quantization.without("preset"))
    save(tmp_path, tie_word_embeddings=False)
    model = load_model(tmp_path, Params({"dtype": "bfloat16"}), CPU, quantization_config=how)
    found = estimate(
        tmp_path, "model.dtype=bfloat16", f"quantization={preset}",
        f"quantization.bnb_4bit_use_double_quant={double}",
    )  # fmt: skip
    tensors = model.state_dict()
    tables = ("quant_map", "quant_state", "weight_format")  # a few hundred bytes a layer
    kept = sum(t.nbytes for name, t in tensors.items() if not any(x in name for x in tables))
    assert found.parts["weights"] + found.parts["quantization_state"] == kept
    assert found.parts["quantization_state"] > 0


@pytest.mark.parametrize("optim", sorted(optimizers.OPTIMIZERS))
def test_optimizers_keep_what_the_table_says(optim: str, tmp_path: Path) -> None:
    paged = optim.startswith("paged_")
    if paged and not torch.cuda.is_available():
        pytest.skip("a paged optimizer needs a GPU; it keeps what the one without pages keeps")
    device = "cuda" if paged else "cpu"
    # 8,192 weights and 64 biases: 8-bit AdamW leaves the small in float32.
    layer = torch.nn.Linear(128, 64, device=device)
    folder = str(tmp_path)
    args = TrainingArguments(output_dir=folder, optim=optim, use_cpu=not paged, report_to="none")
    make, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = make(layer.parameters(), **kwargs)
    layer(torch.ones(2, 128, device=device)).sum().backward()
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    kept = sum(v.nbytes for v in state if v.numel() not in (1, 256) or v.shape == (64,))
    shapes = [tuple(p.shape) for p in layer.parameters()]
    assert optimizers.state_bytes(optim, shapes) == kept


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adamw_8bit", "rmsprop"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_have_gradients_and_optimizer(optim: str, dtype: str, tmp_path: Path) -> None:
    """A step of a real model against the estimate; tied weights count once."""
    folder = save(tmp_path, tie_word_embeddings=True)
    found = estimate(folder, "lora=none", f"trainer.optim={optim}", f"model.dtype={dtype}").parts
    model: Any = load_model(folder, Params({"dtype": dtype}), CPU)
    model.requires_grad_(True)
    args = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True, report_to="none")
    make, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = make(model.parameters(), **kwargs)
    ids = torch.ones(1, 4, dtype=torch.long)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    weights = list(model.parameters())
    state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    kept = sum(v.nbytes for v in state if v.dim() and v.shape != (256,))  # a table of 8 bits
    assert found["weights"] == sum(p.nbytes for p in weights)
    assert found["gradients"] == sum(p.grad.nbytes for p in weights)
    assert found["optimizer"] == kept
    assert (found["adapter"], found["update"]) == (0, max(0, found["update"]))
    assert found["activations"] > 0


def test_ways_out_of_a_full_training_lead_to_lora(tmp_path: Path) -> None:
    params, folder = compose("lora=none"), save(tmp_path, hidden_size=512)
    batch = Batch(1, 8)
    workload = Workload(batch, batch, batch, on_cpu=True)
    found = memory.estimate(folder, params.model, params.lora, params.trainer, workload)
    ways = memory.ways_out(found, workload, params.trainer)
    assert ways[0] == "lora=all_linear quantization=nf4 instead of lora=none"
    assert ways[-1] == "trainer.optim=adamw_8bit instead of adamw_torch_fused"


def test_every_optimizer_of_the_schema_is_in_the_table() -> None:
    from typing import get_args

    from capas.config.schema import Trainer as Schema

    assert set(get_args(Schema.model_fields["optim"].annotation)) == set(optimizers.OPTIMIZERS)


def activations_of(layers: int, batch: Batch, *overrides: str, **config: Any) -> int:
    params = compose(*overrides)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 262, **config}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    made = LlamaConfig(num_hidden_layers=layers, **sizes, **heads)
    model = activations.build(made, params.model, params.lora, None)
    phase = Phase("training", batch, True, params.trainer.gradient_checkpointing, False)
    return activations.measure(model, [phase], of_heap=False)[0]["training"]


def test_a_layer_keeps_what_the_sum_by_hand_gives() -> None:
    """Float32 a token: both norms' inputs and outputs, query, key, value, attention, four times the MLP.

    As in Korthikanti et al. 2022, section 4.1, less the inputs that a frozen weight does not need; LoRA needs
    them for its A, and its own outputs of r. A norm keeps a number, attention one for each head.
    """
    n, h, f, r, heads = 96, 64, 160, 16, 4
    by_hand = 4 * n * (2 * h + 2 * h + 3 * h + h + 4 * f + 7 * r + 2 + heads)
    added = activations_of(5, Batch(1, n)) - activations_of(4, Batch(1, n))
    assert added == pytest.approx(by_hand, rel=0.01)


def test_checkpointing_keeps_one_vector_a_token_and_layer() -> None:
    n, h, on = 96, 64, "trainer.gradient_checkpointing=true"
    added = activations_of(5, Batch(1, n), on) - activations_of(4, Batch(1, n), on)
    assert added == pytest.approx(4 * n * h, rel=0.01)


def test_more_layers_are_extrapolated_exactly() -> None:
    few = [activations_of(layers, Batch(2, 32)) for layers in (5, 6, 12)]
    assert few[2] == few[1] + 6 * (few[1] - few[0])


def test_a_large_vocabulary_is_three_times_its_logits() -> None:
    """Log-probabilities and two gradients, all float32, when the loss goes backward."""
    small, large = (activations_of(2, Batch(2, 64), vocab_size=v) for v in (20000, 30000))
    assert large - small == pytest.approx(3 * 4 * 2 * 64 * 10000, rel=0.02)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_fake_tensors_take_what_real_ones_take(
    attention: str, checkpointing: bool, tmp_path: Path
) -> None:
    params = compose(f"model.attn_implementation={attention}")
    folder = save(tmp_path)
    base = load_model(folder, Params({"attn_implementation": attention}), CPU)
    model = train_lora.add_lora(base, Params({"lora": params.lora, "trainer": params.trainer}))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    ids = torch.arange(4 * 48).view(4, 48) % 262
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    with Alive() as alive:
        model(input_ids=ids, attention_mask=mask, labels=ids.clone()).loss.backward()
    found = estimate(
        folder, f"model.attn_implementation={attention}",
        f"trainer.gradient_checkpointing={checkpointing}",
    )  # fmt: skip
    assert found.phase == "training"
    assert found.parts["activations"] == pytest.approx(alive.most, rel=0.02)


def test_mixed_precision_and_dora_and_every_quantization_are_followed(tmp_path: Path) -> None:
    folder = save(tmp_path)
    plain = estimate(folder).parts
    for overrides in (
        ("trainer.bf16=true",),
        ("lora.use_dora=true",),
        ("quantization=nf4", "trainer.bf16=true"),
        ("quantization=int8",),
    ):
        assert estimate(folder, *overrides).parts["activations"] > 0
    assert estimate(folder, "lora.r=32").parts["adapter"] == 2 * plain["adapter"]
    assert estimate(folder, records=8).parts["activations"] > 1.8 * plain["activations"]


def test_what_several_processes_add_and_divide(tmp_path: Path) -> None:
    params, batch, folder = compose(), Batch(4, 48), save(tmp_path, num_hidden_layers=6)
    groups = params.model, params.lora, params.trainer
    found = []
    for several in ({}, {"num_processes": 3}, {"num_processes": 3, "divided": True}):
        workload = Workload(batch, batch, batch, on_cpu=False, **several)
        found.append(memory.estimate(folder, *groups, workload).parts)
    alone, ddp, fsdp2 = found
    assert ddp == alone | {"gradient_buckets": alone["adapter"]}
    for name in ("weights", "adapter", "gradients", "optimizer"):
        assert fsdp2[name] == -(-alone[name] // 3)
    assert fsdp2["activations"] == alone["activations"]
    # Two of six layers, which hold nearly all weights.
    expected = (alone["weights"] + alone["adapter"]) / 3
    assert fsdp2["gathered_weights"] == pytest.approx(expected, rel=0.1)
    ways = memory.ways_out(Estimate(fsdp2, "training"), workload, params.trainer)
    assert "hardware.num_processes above 3" in ways and "quantization=nf4" not in ways


def test_a_large_evaluation_decides(tmp_path: Path) -> None:
    params = compose()
    workload = Workload(Batch(1, 8), Batch(64, 64), Batch(2, 8), on_cpu=False)
    found = memory.estimate(save(tmp_path), params.model, params.lora, params.trainer, workload)
    assert found.phase == "evaluation"
    ways = memory.ways_out(found, workload, params.trainer)
    assert ways[0] == "trainer.per_device_eval_batch_size below 50"


def test_what_cannot_be_followed_is_an_error_of_its_own(tmp_path: Path) -> None:
    config = {"architectures": ["NopeForCausalLM"], "model_type": "nope"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        memory.EstimateError, match="NopeForCausalLM cannot be estimated: ValueError"
    ):
        estimate(tmp_path)


FOUND = Estimate(
    {"weights": 600 * 2**20, "activations": 300 * 2**20, "quantization_state": 0}, "training"
)


def test_what_does_not_fit_is_refused_with_its_parts_and_the_keys_to_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(memory.CHECK, raising=False)
    workload = Workload(Batch(16, 256), Batch(50, 256), Batch(2, 128), on_cpu=True)
    ways = memory.ways_out(FOUND, workload, compose().trainer)
    with pytest.raises(CapasError) as caught:
        memory.check(FOUND, 100 * 2**20, 800 * 2**20, ways)
    text = str(caught.value)
    assert "needs about 1,000 MiB of memory, and 900 MiB are available: weights 600 MiB" in text
    assert "activations of the training 300 MiB, Python and its libraries 100 MiB" in text
    for key in (
        *("quantization=nf4", "trainer.per_device_train_batch_size below 16", "lora.r"),
        *("trainer.gradient_checkpointing=true", "dataset.max_length below 256", memory.CHECK),
    ):
        assert key in text
    monkeypatch.setenv(memory.CHECK, "warn")
    with caplog.at_level(logging.WARNING, "capas"):
        memory.check(FOUND, 100 * 2**20, 800 * 2**20, ways)
    assert "To need less: quantization=nf4" in caplog.text


@pytest.mark.parametrize(("free", "warned"), [(950, True), (1050, False)])
def test_above_nine_tenths_it_warns(
    free: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "capas"):
        memory.check(FOUND, 0, free * 2**20, [])
    assert bool(caplog.records) is warned


def prepared(root: Path, *overrides: str) -> tuple[Params, Stage]:
    write_workspace(root, overrides)
    return read_params("train", root), Stage(StageSpec.read("train", root), root)


def test_the_stage_stops_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(memory.CHECK, raising=False)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(
        "capas.models.loading.load_model", lambda *args: pytest.fail("it was loaded")
    )
    with pytest.raises(CapasError, match="training needs about"):
        train_lora.main(*prepared(tmp_path))


FULL = ("lora=none", "lora.r=null", "trainer.learning_rate=1.0e-3")


@pytest.mark.parametrize(
    "options", [(), (*FULL, "trainer.packing_length=64", "trainer.gradient_checkpointing=true")]
)
def test_the_estimate_stands_beside_the_measured_peak(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]
) -> None:
    params, stage = prepared(tmp_path, "trainer.max_steps=2", *options)
    with caplog.at_level(logging.INFO, "capas"):
        train_lora.main(params, stage)
    parts = stage.costs["estimated_memory_parts"]
    assert stage.costs["estimated_memory_bytes"] == sum(parts.values())
    assert parts["process"] > 100 * 2**20
    assert "training needs about" in caplog.text


def test_a_training_that_cannot_be_estimated_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> Any:
        raise memory.EstimateError("the memory of Odd cannot be estimated: no reason")

    monkeypatch.setattr(memory, "estimate", fail)
    write_workspace(tmp_path, ["trainer.max_steps=2"])
    run_stage("train", train_lora.main, tmp_path)
    assert "the memory of Odd cannot be estimated" in caplog.text
    assert (tmp_path / "reports/train.json").exists()


def test_free_memory_is_that_of_the_tightest_control_group(tmp_path: Path) -> None:
    own, job = tmp_path / "cgroup", tmp_path / "tree/slurm/job"
    job.mkdir(parents=True)
    own.write_text("0::/slurm/job\n")
    for group, limit, used, inactive in ((job.parent, "9000", "1000", "0"), (job, "max", "1", "0")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
    assert capacity.cgroup_free_bytes(tmp_path / "tree", own) == [8000]
    (job / "memory.max").write_text("5000\n")
    (job / "memory.current").write_text("4000\n")
    (job / "memory.stat").write_text("inactive_file 3000\n")
    assert capacity.cgroup_free_bytes(tmp_path / "tree", own) == [4000, 8000]


def test_version_1_of_control_groups_and_machines_without_them(tmp_path: Path) -> None:
    own, top = tmp_path / "cgroup", tmp_path / "tree/memory"
    top.mkdir(parents=True)
    own.write_text("5:cpu:/docker/x\n4:memory:/docker/x\n")
    (top / "memory.limit_in_bytes").write_text("700\n")
    (top / "memory.usage_in_bytes").write_text("300\n")
    (top / "memory.stat").write_text("total_inactive_file 100\n")
    assert capacity.cgroup_free_bytes(tmp_path / "tree", own) == [500]
    assert capacity.cgroup_free_bytes(tmp_path / "tree", tmp_path / "none") == []
    assert 0 < capacity.free_bytes(CPU) < 2**50


@pytest.mark.skipif(not malloc_heap.is_known(), reason="malloc is not glibc's: nothing to ask")
def test_malloc_is_asked_and_large_blocks_go_back_at_once() -> None:
    size = 16 * 2**20

    def work() -> tuple[int, ...]:
        malloc = malloc_heap.Heap()
        blocks = [malloc.take(size) for _ in range(64)]
        small = malloc.most
        for give_back in blocks:
            give_back()
        for _ in range(8):
            malloc.take(2 * size)()
        return small, malloc.most

    small, most = malloc_heap.in_child(work)
    assert small >= 32 * size, "this process may have some free already"
    assert small <= most <= small + 2 * size


def test_what_fails_in_the_child_is_told() -> None:
    assert malloc_heap.in_child(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        malloc_heap.in_child(lambda: 1 // 0)


def run_command(*arguments: str) -> int:
    return cli.main(["memory", *arguments])


def in_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("conf", "data/embedded"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(root)


def test_the_command_prints_the_parts_and_what_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_repository(tmp_path, monkeypatch)
    assert run_command("--tokens", "64", "lora.r=8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "of the evaluation: 50 records of 64 tokens" in "".join(lines)
    assert lines[-1].startswith("total") and "available" in lines[-1]
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 2**20)
    assert run_command("quantization=none") == 1
    assert "To need less: trainer.per_device" in capsys.readouterr().out


def test_without_a_network_the_command_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_repository(tmp_path, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run_command("model=qwen3_4b") == 2
    text = capsys.readouterr().err
    assert "The estimate only needs config.json" in text
    assert "model.model_name_or_path=FOLDER" in text


def test_a_folder_with_config_json_alone_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_repository(tmp_path, monkeypatch)
    save(tmp_path / "mine")
    (tmp_path / "mine/model.safetensors").unlink()
    assert run_command("model.model_name_or_path=mine", "--tokens", "16") == 0
    assert run_command("hardware=gpu", "model.model_name_or_path=mine", "--tokens", "16") == 0
    if not torch.cuda.is_available():
        assert "this machine has no GPU to compare with" in capsys.readouterr().out


def test_wrong_arguments_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command() == 2
    assert "has no conf/" in capsys.readouterr().err
    in_repository(tmp_path, monkeypatch)
    assert run_command("--tokens", "0") == 2
    assert run_command("lora.r=0", "lora=all_liner") == 2
    err = capsys.readouterr().err
    assert "lora.r=0: input" in err and "lora=all_liner: no such option; did you mean" in err
