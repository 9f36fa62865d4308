"""The shipped configuration: every option composes, every key is checked, every problem is reported."""

import copy
import inspect
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from workspace import REPOSITORY

from capas.config.advice import advice
from capas.config.composition import composer, digest, dump, word_given
from capas.config.json_schema import group_schema
from capas.config.schedules import SCHEDULES
from capas.config.schema import GROUPS
from capas.config.validation import known_keys, validate
from capas.core.errors import CapasError
from capas.core.params import flatten

CONF = REPOSITORY / "conf"
APART = (
    "smoke",
    "sweep",
)  # goes on top of an overlay (tests/pipeline/test_recipes.py); of stages/sweep.py alone
OPTIONS = sorted(
    (file.parent.name, file.stem)
    for file in CONF.glob("*/*.yaml")
    if not file.name.startswith("_") and file.parent.name not in APART
)


BESIDE = {  # what an option refuses of the default
    "gpu_fsdp2": ["quantization=none"],
    "unsloth": ["hardware=gpu", "hardware.cudnn_deterministic=false", "model.dtype=bfloat16"],
}
DIVIDED = ("hardware=gpu_fsdp2", "quantization=none")


@pytest.fixture(scope="module")
def compose() -> Any:
    """The same overrides are composed once."""
    with composer(CONF) as run:
        made = cache(lambda overrides: run(list(overrides)))
        yield lambda overrides: copy.deepcopy(made(tuple(overrides)))


def edited(compose: Callable[[list[str]], Any], overrides: list[str]) -> Any:
    """Options are composed; keys are set in the result, and what conf/ derives from them stays."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = compose([str(o.input_line) for o in parsed if o.key_or_group in GROUPS])
    for override in (o for o in parsed if o.key_or_group not in GROUPS):
        *groups, leaf = override.key_or_group.split(".")
        node = values
        for group in groups:
            node = node[group]
        if override.is_delete():
            del node[leaf]
        else:
            node[leaf] = override.value()
    return values


MORE = (
    "{path:csv,name:null,revision:null,split:null,data_files:data/own/x.csv,shape:auto,"
    "columns:null,roles:null,system:null,weight:null,licence:mit}"
)


FULL = ("lora=none", "quantization=none")


def problems(values: dict[str, Any]) -> str:
    with pytest.raises(CapasError) as caught:
        validate(values)
    return str(caught.value)


def test_there_are_as_many_options_as_we_think() -> None:
    assert len(OPTIONS) == 64
    assert {group for group, _ in OPTIONS} == set(GROUPS)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_is_valid_and_names_itself(
    compose: Callable[[list[str]], Any], group: str, option: str
) -> None:
    beside = ["quantization=none"] if (group, option) == ("lora", "none") else []
    values = compose([f"{group}={option}", *beside, *BESIDE.get(option, [])])
    validate(values)
    assert values[group]["preset"] == option


@pytest.mark.parametrize("dataset", [option for group, option in OPTIONS if group == "dataset"])
def test_a_quick_run_is_one_of_any_dataset(
    compose: Callable[[list[str]], Any], dataset: str
) -> None:
    values = compose([f"dataset={dataset}", "experiment=quick"])
    validate(values)
    assert values["dataset"]["preset"] == dataset
    assert values["dataset"]["max_records"] == 500


def test_all_options_of_a_group_have_the_same_keys(compose: Callable[[list[str]], Any]) -> None:
    keys: dict[str, set[str]] = {}
    for group, option in OPTIONS:
        found = set(compose([f"{group}={option}"])[group])
        assert found == keys.setdefault(group, found), f"{group}={option}"


def test_a_divided_model_is_one_that_is_not_quantized(
    compose: Callable[[list[str]], Any],
) -> None:
    chosen = {"fsdp2": [*DIVIDED], "ddp": ["hardware=gpu_ddp", "quantization=nf4"]}
    for kind, overrides in chosen.items():
        values = compose(overrides)
        validate(values)
        assert values["hardware"]["distributed_type"] == kind


@pytest.mark.parametrize("model", [option for group, option in OPTIONS if group == "model"])
def test_a_model_computes_in_what_its_hardware_is_fast_in(
    compose: Callable[[list[str]], Any], model: str
) -> None:
    on_cpu, on_gpu = compose([f"model={model}"]), compose([f"model={model}", "hardware=gpu"])
    assert on_cpu["hardware"]["preset"] == "cpu"
    found = [
        (v["model"]["dtype"], v["quantization"]["bnb_4bit_compute_dtype"]) for v in (on_cpu, on_gpu)
    ]
    fast = "float32" if model == "embedded" else "bfloat16"  # its file says so
    assert found == [("float32", "float32"), (fast, fast)]
    assert not advice(on_cpu)
    assert not advice(on_gpu)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["hardware.dtype=bfloat16", "model=qwen2.5_0.5b_instruct"],
            "model.dtype='bfloat16' on a CPU",
        ),
        (["trainer.bf16=true"], "trainer.bf16=True on a CPU"),
        (
            ["model.dtype=float16", "trainer.bf16=true"],
            "model.dtype='float16' and trainer.bf16=True on",
        ),
    ],
)
def test_half_precision_on_a_cpu_is_told(
    compose: Callable[[list[str]], Any], overrides: list[str], named: str
) -> None:
    values = compose(overrides)
    validate(values)
    (line,) = advice(values)
    assert line.startswith(named)


@pytest.mark.parametrize("model", [option for group, option in OPTIONS if group == "model"])
def test_only_the_embedded_model_gives_up_speed_for_the_same_bytes_everywhere(
    compose: Callable[[list[str]], Any], model: str
) -> None:
    found = compose([f"model={model}"])["hardware"]
    expected = ("portable", 2) if model == "embedded" else ("native", None)
    assert (found["instruction_set"], found["num_threads"]) == expected
    on_gpu = compose([f"model={model}", "hardware=gpu"])["hardware"]
    assert on_gpu["instruction_set"] == "native"


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adamw_8bit"])
def test_an_optimizer_whose_bytes_differ_by_vendor_is_told(
    compose: Callable[[list[str]], Any], optim: str
) -> None:
    values = compose([f"trainer.optim={optim}"])
    validate(values)
    (line,) = advice(values)
    assert line.startswith(f"trainer.optim={optim} takes square roots from oneMKL")
    assert not advice(compose([f"trainer.optim={optim}", "hardware.instruction_set=native"]))
    assert not advice(compose(["trainer.optim=sgd"]))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["generation.system='Be brief.'"], "dataset.system is none"),
        (["dataset=own_csv", "generation.system='Be brief.'"], "dataset.system is none"),
        (
            ["dataset=own_csv", "dataset.system='Be kind.'", "generation.system='Be brief.'"],
            "'Be kind.'",
        ),
        (["dataset=own_csv", "dataset.system='Be kind.'", "generation.system='Be kind.'"], None),
        (["dataset=own_csv", "dataset.system='Be kind.'"], None),
        (["dataset=own_jsonl", "generation.system='Be brief.'"], None),  # records may bring it
        (["hardware=gpu", "generation.system='Be brief.'"], "dataset.system is none"),
    ],
)
def test_a_system_prompt_that_was_not_trained_is_told(
    compose: Callable[[list[str]], Any], overrides: list[str], told: str | None
) -> None:
    lines = advice(edited(compose, overrides))
    assert [told in line for line in lines if told] == ([True] if told else [])
    assert bool(lines) is (told is not None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_files", "https://ana:hidden@host/x.csv"),
        ("data_files", ["data/own/a.csv", "https://host/x.csv?token=hidden"]),
        ("data_files", {"train": "https://bucket/x.csv?X-Amz-Signature=hidden"}),
        ("path", "https://hidden@github.com/o/r"),
        ("licence", "hf_hidden0123456789hidden"),
    ],
)
def test_a_password_or_a_token_is_refused_and_not_shown(
    compose: Callable[[list[str]], Any], key: str, value: Any
) -> None:
    values = compose(["dataset=own_csv"])
    values["dataset"][key] = value
    text = problems(values)
    assert f"dataset.{key}" in text and "holds a password or a token (***)" in text
    assert "hidden" not in text
    values = compose(["generation.system='https://ana:pass@host'"])
    validate(values)


def test_schema_and_conf_have_the_same_keys(compose: Callable[[list[str]], Any]) -> None:
    composed = {".".join(key.split(".")[:2]) for key in flatten(compose([]))}
    assert composed == set(known_keys())


def test_params_yaml_is_what_conf_composes_to(compose: Callable[[list[str]], Any]) -> None:
    assert (REPOSITORY / "params.yaml").read_text(encoding="utf-8") == dump(compose([]))


def test_params_yaml_reads_the_same_with_pyyaml(compose: Callable[[list[str]], Any]) -> None:
    values = compose(["trainer.learning_rate=1e-5", "trainer.adam_epsilon=1e-12"])
    assert flatten(yaml.safe_load(dump(values))) == flatten(values)


def test_digest_ignores_order_but_not_types() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})


def test_all_problems_are_reported_at_once(compose: Callable[[list[str]], Any]) -> None:
    text = problems(
        compose(
            [
                "+trainer.learning_rat=1",
                "lora.r=0",
                "trainer.bf16=yes",
                "dataset.overflow=cut",
                "~lora.use_dora",
                "quantization.load_in_8bit=true",
            ]
        )
    )
    assert "6 problems in the configuration" in text
    assert "trainer.learning_rat=1: no such key; did you mean trainer.learning_rate?" in text
    assert "lora.r=0: input should be greater than 0" in text
    assert "trainer.bf16='yes'" in text
    assert "dataset.overflow='cut': input should be 'error', 'drop' or 'truncate'" in text
    assert "lora.use_dora: is missing" in text
    assert (
        "load_in_4bit=True, quantization.load_in_8bit=True: expected at most one of the two" in text
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.bf16=true", "trainer.fp16=true"], "at most one of the two"),
        (["trainer.fp16=true"], "fp16 training needs a GPU"),
        (["trainer.fp16=true", "hardware=gpu", "model.dtype=float16"], "float32 weights"),
        (["trainer.optim=paged_adamw_8bit"], "paged optimizer needs a GPU"),
        (["model.attn_implementation=flash_attention_2"], "flash_attention_2 needs a GPU"),
        (["model.attn_implementation=flash_attention_2", "hardware=gpu"], "bfloat16 or float16"),
        (["hardware.allow_tf32=true"], "TF32"),
        (["hardware.device=cuda"], "native where the device is not a CPU"),
        (
            ["hardware.num_processes=3", "hardware.num_machines=2"],
            "as many processes on each machine",
        ),
        (["hardware=gpu_ddp", "hardware.num_processes=0"], "greater than 0"),
        (["hardware=gpu", "hardware.distributed_type=fsdp2"], "num_processes=2 or more"),
        (["hardware.num_processes=2", "hardware.distributed_type=fsdp2"], "ddp on a CPU"),
        (["hardware=gpu_fsdp2"], "leaves the integers of bitsandbytes whole"),
        ([*DIVIDED, "trainer.optim=adamw_8bit"], "adamw_torch_fused with fsdp2"),
        ([*DIVIDED, "lora.use_dora=true"], "lora.use_dora=false with fsdp2"),
        ([*DIVIDED, "trainer.fp16=true"], "trainer.bf16=true with fsdp2"),
        (
            [*DIVIDED, "model.attn_implementation=flash_attention_2", "trainer.packing_length=64"],
            "sdpa with fsdp2",
        ),
        (["hardware.cudnn_benchmark=true"], "differs from run to run"),
        (["hardware.cudnn_deterministic=false"], "full_determinism switches"),
        (["model.revision=main"], "the embedded base ships with the repository"),
        (["dataset.split=train"], "the embedded records are generated"),
        (["dataset.data_files=x.jsonl"], "data_files with path json, csv, parquet or text"),
        (["dataset=own_csv", "dataset.split=train"], "split with a data set of the Hub"),
        (["dataset=gsm8k", "dataset.split=null"], "split with a data set of the Hub"),
        (["dataset=gsm8k", "dataset.path=gsm8k"], "should match pattern"),
        (["dataset=own_csv", "dataset.shape=auto"], "columns with shape columns"),
        (["dataset=own_csv", "~dataset.columns.user"], "columns with shape columns"),
        (
            ["dataset=own_csv", "+dataset.columns.id=[a,b]"],
            "several columns for text",
        ),
        (["dataset=own_csv", "dataset.num_train=7"], "numbers for path embedded"),
        (["dataset=own_csv", "dataset.weight=1.0", f"dataset.mix=[{MORE}]"], "a weight for all"),
        (["dataset=own_csv", f"dataset.mix=[{MORE},{MORE.replace('csv', 'o/n')}]"], "data_files w"),
        (["dataset=own_csv", f"dataset.mix=[{MORE.replace('path:csv', 'pat:x')}]"], "mix.0.path"),
        ([f"dataset.mix=[{MORE}]"], "no mixture with the embedded records"),
        (["dataset=own_csv", "dataset.test_fraction=0.99"], "together less than 1"),
        (["dataset=own_csv", "dataset.leaks=keep"], "a budget of 0.0 where leaks are not dropped"),
        (["dataset.flaw_budget_fraction=0.1"], "a budget of 0.0 where no flaw is dropped"),
        (["dataset=own_csv", "dataset.flaws.malformed=keep"], "dataset.flaws.malformed='keep'"),
        (["+lora.bias=all"], "the model without its adapter would no longer be the base"),
        (["lora.use_dora=true", "quantization=int8"], "DoRA cannot go through int8 layers"),
        (["lora.init_lora_weights=orthogonal"], "here integers"),
        (["lora.init_lora_weights=orthogonal", "quantization=none", "lora.r=3"], "an even lora.r"),
        (["lora.init_lora_weights=pissa"], "init_lora_weights='pissa'"),
        (["trainer.use_liger_kernel=true"], "written for a GPU"),
        (["trainer.fused_lora=true", "trainer.bf16=true", "quantization=none"], "for 4-bit layers"),
        (["trainer.fused_lora=true"], "with trainer.bf16=true"),
        (["trainer.fused_lora=true", "trainer.bf16=true", "lora.lora_dropout=0.1"], "lora_dropout"),
        ([*FULL, "hardware.num_processes=2"], "one process where all weights are trained"),
        (["lora=none"], "quantization=none where all weights are trained"),
        (
            ["lora=none", "quantization=none", "lora.r=8"],
            "values for all four, or null for all four",
        ),
        (["lora.target_modules=null"], "values for all four, or null for all four"),
        (["lora=none", "quantization=none", "model.dtype=float16"], "float16 overflows"),
        (
            [*FULL, "trainer.loraplus_lr_ratio=16"],
            "no option of LoRA where all weights are trained",
        ),
        ([*FULL, "lora.use_dora=true"], "no option of LoRA where all weights are trained"),
        ([*FULL, "lora.init_lora_weights=orthogonal"], "no option of LoRA where all weights are"),
        (
            [*FULL, "lora.adapter_name_or_path=a/b"],
            "no option of LoRA where all weights are trained",
        ),
        (["lora.adapter_revision=main"], "null where the training starts from no adapter"),
        (
            ["lora.adapter_name_or_path=a/b", "lora.init_lora_weights=gaussian"],
            "the adapter that the training starts from brings its weights",
        ),
        (["trainer.packing_length=4"], "greater than or equal to 8"),
        (["trainer.loraplus_lr_ratio=0.5"], "greater than or equal to 1"),
        (["+trainer.lr_scheduler_kwargs.power=2"], "=linear has no such argument"),
        (["trainer.lr_scheduler_type=cosine_with_min_lr"], "exactly one of min_lr and min_lr_rate"),
        (["trainer.lr_scheduler_type=warmup_stable_decay"], "num_decay_steps in"),
        (["trainer.lr_scheduler_type=constant"], "no warm-up in a constant schedule"),
        (["trainer.max_steps=1"], "trainer.warmup_steps=0 with a single step"),
        (["trainer.load_best_model_at_end=true", "trainer.save_steps=50"], "equal to eval_steps"),
        (["trainer.metric_for_best_model=bleu"], "metric_for_best_model='bleu': input should be"),
        (["trainer.metric_for_best_model=bleu"], "'exact_match', 'valid_json'"),
        (["trainer.metric_for_best_model=exact_mach"], "did you mean 'exact_match'?"),
        (
            ["trainer.metric_for_best_model=label_accuracy"],
            "labels are compared after the training",
        ),
        (["evaluation.metrics=[rougel]"], "FUNCTION; did you mean 'rougeL'?"),
        (["trainer.optim=adamw_toch"], "did you mean 'adamw_torch'?"),
        (["trainer.optim=SGD"], "did you mean 'sgd'?"),
        (["trainer.metric_for_best_model=conf/x.py:chrf"], "called like no metric"),
        (["trainer.metric_for_best_model=conf/x.py:runtime"], "no key of Trainer's log"),
        (["trainer.metric_records=64"], "expected null with loss and token_accuracy"),
        (["trainer.metric_max_new_tokens=64"], "for which nothing is generated"),
        (["trainer.metric_for_best_model=chrf", "trainer.metric_records=0"], "greater than 0"),
        (
            ["trainer.metric_for_best_model=chrf", "hardware=gpu_fsdp2", "quantization=none"],
            "loss or token_accuracy with fsdp2",
        ),
        (["trainer.divergence_factor=1.0"], "greater than 1"),
        (["trainer.save_total_limit=1"], "greater than or equal to 2"),
        (["generation.wrong_chat_template=chatml"], "another template than the right one"),
        (["trainer.max_steps=0"], "-1 (epochs decide) or at least 1"),
        (["trainer.warmup_steps=1.5"], "a whole number of steps"),
        (["dataset.overflow_budget_fraction=0.1"], "overflow=error allows no record"),
        (["+generation.settings.greedy.top_k=3"], "top_k only where do_sample is true"),
        (
            ["evaluation.metrics=[rouge]"],
            "evaluation.metrics.0='rouge': input should be 'exact_match'",
        ),
        (["evaluation.metrics=[chrf,chrf]"], "each name once"),
        (["evaluation.metrics=[label_accuracy,chrf]"], "expected label_accuracy alone"),
        (["evaluation.labels=[spam,ham]"], "evaluation=labels where labels are named"),
        (["evaluation=labels", "evaluation.labels=[spam]"], "should have at least 2 items"),
        (["evaluation.metrics=[conf/x.py:label_macro_f1]"], "called like no metric and no column"),
        (["evaluation.metrics=[conf/x.py:loss]"], "called like no metric and no column"),
        (["evaluation.metrics=[conf/x.py:chrf]"], "called like no metric and no column"),
        (["evaluation.metrics=[conf/x.py:f,conf/y.py:f]"], "each name once"),
        (["evaluation.metrics=['conf/x.py:my f']"], "or a function of your own, FILE.py:FUNCTION"),
        (["lora.target_modules=3"], "valid string or input should be a valid list"),
        (["seed=-1"], "greater than or equal to 0"),
    ],
)
def test_contradictions_and_ranges(
    compose: Callable[[list[str]], Any], overrides: list[str], expected: str
) -> None:
    assert expected in problems(edited(compose, overrides))


def test_what_is_null_counts_as_not_given(compose: Callable[[list[str]], Any]) -> None:
    values = compose(["+generation.settings.greedy.top_k=null"])
    assert values["generation"]["settings"]["greedy"] == {"do_sample": False, "top_k": None}
    validate(values)


@pytest.mark.parametrize("preset", ["chatml", "llama3", "mistral", "gemma"])
def test_every_template_has_another_to_be_compared_with(
    compose: Callable[[list[str]], Any], preset: str
) -> None:
    values = compose([f"chat_template={preset}"])
    validate(values)
    assert values["generation"]["wrong_chat_template"] != preset


def test_schedules_have_the_arguments_that_transformers_gives_them() -> None:
    """The table in capas/config/schema.py against the installed version."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    fixed = ("constant", "constant_with_warmup")  # get_scheduler passes nothing on to them
    for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        if kind.value in SCHEDULES and kind.value not in fixed:
            known = set(inspect.signature(function).parameters) - given
            assert known == set(SCHEDULES[kind.value]), kind.value


@pytest.mark.parametrize(
    ("kind", "kwargs", "expected"),
    [
        ("cosine", {"num_cycles": 0}, "num_cycles=0: expected a number above 0"),
        ("cosine", {"num_cycles": "2"}, "num_cycles='2': expected a number above 0"),
        ("cosine_with_restarts", {"num_cycles": 1.5}, "num_cycles=1.5: expected a whole number of"),
        ("cosine_with_min_lr", {"min_lr": 0.004}, "below trainer.learning_rate (cosine_with_min"),
        ("cosine_with_min_lr", {"min_lr_rate": 1.5}, "at least 0 and below 1"),
        ("polynomial", {"lr_end": -1}, "lr_end=-1: expected a learning rate of at least 0"),
        (
            "polynomial",
            {"lr_end": 0.01},
            "lr_end=0.01: expected a learning rate of at least 0, below",
        ),
        ("polynomial", {"lr_end": float("nan")}, "lr_end=nan: expected a learning rate"),
        ("polynomial", {"power": 0}, "power=0: expected a number above 0"),
        ("inverse_sqrt", {"timescale": 0}, "timescale=0: expected a whole number of steps"),
        ("warmup_stable_decay", {"num_decay_steps": 1.5}, "num_decay_steps=1.5: expected a whole"),
        ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "exp"}, "cosine or 1-sqrt"),
        ("warmup_stable_decay", {"num_decay_steps": 9, "min_lr_ratio": 1}, "and below 1"),
        ("warmup_stable_decay", {"num_decay_steps": 9, "num_stable_steps": -1}, "at least 0"),
    ],
)
def test_an_argument_of_a_schedule_has_a_type_and_a_range(
    compose: Callable[[list[str]], Any], kind: str, kwargs: dict[str, Any], expected: str
) -> None:
    values = compose([f"trainer.lr_scheduler_type={kind}"])
    values["trainer"]["lr_scheduler_kwargs"] = kwargs
    text = problems(values)
    assert f"trainer.lr_scheduler_kwargs.{list(kwargs)[-1]}=" in text
    assert expected in text


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        (
            "trainer.lr_scheduler_kwargs={num_cycles: 2}",
            "trainer.lr_scheduler_kwargs.num_cycles",
            2,
        ),
        ("trainer.lr_scheduler_kwargs.num_cycles=2", "trainer.lr_scheduler_kwargs.num_cycles", 2),
        ("generation.settings.greedy.top_k=null", "generation.settings.greedy.top_k", None),
    ],
)
def test_a_mapping_that_conf_leaves_open_takes_keys_from_the_command_line(
    compose: Callable[[list[str]], Any], override: str, key: str, value: Any
) -> None:
    values = compose(["trainer.lr_scheduler_type=cosine_with_restarts", override])
    assert flatten(values)[key] == value
    validate(values)


def test_an_unknown_key_in_an_open_mapping_is_told(compose: Callable[[list[str]], Any]) -> None:
    assert "has no such argument" in problems(compose(["trainer.lr_scheduler_kwargs.cycles=2"]))
    assert "dataset.flaws.malforme" in problems(compose(["dataset.flaws.malforme=drop"]))


@pytest.mark.parametrize(
    ("word", "kind"), [("12e4567", "a number"), ("1_000", "a number"), ("true", "true or false")]
)
def test_a_word_that_is_read_as_no_text_is_told_as_it_was_given(
    compose: Callable[[list[str]], Any], tmp_path: Path, word: str, kind: str
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    file = tmp_path / "conf/model/_base.yaml"
    file.write_text(file.read_text().replace("revision: main", f"revision: {word}"))
    quoted = f"model.revision={word}: expected a text, and {word} is read as {kind}. Quote it: rev"
    override = f"model.revision={word}"
    in_conf = compose(["model=qwen3_4b"])
    in_conf["model"]["revision"] = OmegaConf.create(f"x: {word}").x
    given = (
        (word_given([override]), compose(["model=qwen3_4b", override])),
        (word_given([], tmp_path / "conf"), in_conf),
    )
    for found, values in given:
        with pytest.raises(CapasError, match=re.escape(quoted)):
            validate(values, found)


def test_a_value_that_hydra_cannot_compose_is_a_clear_error(
    compose: Callable[[list[str]], Any],
) -> None:
    with pytest.raises(
        CapasError, match=r"lora=huge: no such option; lora has all_linear, attention, none"
    ):
        compose(["lora=huge"])


def test_editors_get_the_schema_of_today() -> None:
    for group in GROUPS:
        file = REPOSITORY / ".vscode/schema" / f"{group}.json"
        assert json.loads(file.read_text()) == group_schema(group), "run compose_params.py --schema"


def test_one_seed_moves_training_and_nothing_else(compose: Callable[[list[str]], Any]) -> None:
    before, after = flatten(compose([])), flatten(compose(["seed=7"]))
    moved = {key for key in before if before[key] != after[key]}
    assert moved == {"seed", "trainer.seed", "trainer.data_seed"}


@pytest.mark.parametrize(
    ("model", "template"),
    [("embedded", "chatml"), ("qwen2.5_0.5b", "chatml"), ("gemma_2_2b_it", "gemma")],
)
def test_a_model_brings_its_template_and_leaves_it_to_be_overridden(
    compose: Callable[[list[str]], Any], model: str, template: str
) -> None:
    assert compose([f"model={model}"])["chat_template"]["preset"] == template
    other = compose([f"model={model}", "chat_template=llama3", "chat_template.train_on=all"])
    assert (other["chat_template"]["preset"], other["model"]["preset"]) == ("llama3", model)


@pytest.mark.parametrize(
    ("dataset", "evaluation"),
    [("embedded", "exact_match"), ("own_jsonl", "auto"), ("gsm8k", "final_number")]
    + [
        (name, "text")
        for name in ("alpaca", "dolly", "oasst", "somos-clean-alpaca-es", "ultrachat")
    ],
)
def test_a_dataset_brings_its_evaluation_and_leaves_it_to_be_overridden(
    compose: Callable[[list[str]], Any], dataset: str, evaluation: str
) -> None:
    assert compose([f"dataset={dataset}"])["evaluation"]["preset"] == evaluation
    other = compose([f"dataset={dataset}", "evaluation=json", "evaluation.max_records=7"])
    assert (other["evaluation"]["preset"], other["dataset"]["preset"]) == ("json", dataset)
    assert other["evaluation"]["max_records"] == 7


def test_functions_of_ones_own_are_metrics(compose: Callable[[list[str]], Any]) -> None:
    metrics = ["data/own/scores.py:politeness", "exact_match", "conf/evaluation/a-b.py:_tone2"]
    values = compose([])
    values["evaluation"]["metrics"] = metrics
    validate(values)
    values["evaluation"]["metrics"] = [*metrics, "conf/other.py:politeness"]
    assert "each name once" in problems(values)
