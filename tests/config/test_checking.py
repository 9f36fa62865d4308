"""The one check of overrides: every kind of problem, all at once, and what a machine lacks."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from shipped import CONF
from workspace import REPOSITORY

from capas.config import foreign_names, requirements
from capas.config.hydra_overrides import MAX_COMBINATIONS, Composer, check, check_points
from capas.config.requirements import lacking, read_by
from capas.config.validation import known_keys, nearest
from capas.core import extras
from capas.core.errors import CapasError
from capas.models import kernels

READS = ("hardware", "model.attn_implementation", "trainer", "evaluation")
LORA = "all_linear, attention, none"

KINDS = {  # an override -> its sentence
    # a key that there is not
    "lora.rank=8": "lora.rank: no such key; did you mean lora.r?",
    "trainer.lr=1": "trainer.lr: no such key; did you mean trainer.learning_rate?",
    "trainer.packing=1": "trainer.packing: no such key; did you mean trainer.packing_length?",
    "lora.rank_pattern=x": "lora.rank_pattern: no such key; lora has r, lora_alpha, lora_dropout,",
    "dataset.flaws.malfromed=drop": "no such key; did you mean dataset.flaws.malformed?",
    "generation.settings.greedy.topk=3": "did you mean generation.settings.greedy.top_k?",
    "lora.r.x=1": "lora.r.x: no such key; lora.r is a value and has no keys",
    # a group that there is not, or a key without its group
    "lorra=x": "lorra: no such group or key; did you mean lora?",
    "dataste.max_length=9": "no such key; did you mean dataset.max_length?",
    "r=8": "r: no such group or key; did you mean lora.r?",
    "learning_rat=1": "no such group or key; did you mean trainer.learning_rate?",
    "max_records=2": "did you mean dataset.max_records or evaluation.max_records?",
    # what another library calls it, with or without the group
    "max_seq_length=9": "max_seq_length: no such group or key; did you mean dataset.max_length?",
    "trainer.max_length=9": "no such key; did you mean dataset.max_length?",
    "model.load_in_4bit=true": "no such key; did you mean quantization.load_in_4bit?",
    "trainer.lora_alpha=9": "no such key; did you mean lora.lora_alpha?",
    "sft.completion_only_loss=true": "no such key; did you mean chat_template.train_on?",
    "trainer.report_to=wandb": "no such key; runs are tracked in MLflow; tracking=none switches it off",
    "model.device_map=auto": "no such key; offloading to the CPU or to disk is not supported",
    "hardware.offload=true": "For a model that is too large: quantization=nf4, a smaller dataset.max_length, "
    "trainer.gradient_checkpointing=true, or hardware=gpu_fsdp2",
    "trainer.fsdp=full_shard": "choose hardware=gpu_ddp, or hardware=gpu_fsdp2 with quantization=none",
    "generation.temperature=0.5": "as in generation.settings.low_temperature.temperature=0.7",
    # an option that there is not
    "lora=all_liner": "lora=all_liner: no such option; did you mean all_linear?",
    "experiment=quik": "experiment=quik: no such option; did you mean quick?",
    "lora=_base": f"lora=_base: no such option; lora has {LORA}",
    "smoke=tini": "smoke=tini: no such option; did you mean tiny?",
    "lora=glob(x*)": "lora=x*: no such option",
    "quantization=4bit": "quantization=4bit: no such option; write quantization=nf4",
    "trainer=sgd": "trainer=sgd: no such option; write trainer.optim=sgd",
    # a group where a key stands, and a key where a group stands
    "lora={r: 8}": f"lora is a group; choose one of its options ({LORA}), or set one of its keys, as in "
    "lora.r=VALUE",
    "lora=null": "lora=null: lora is a group; choose one of its options",
    "lora.attention=true": "attention is an option of the group lora; write lora=attention",
    "lora.preset=attention": "lora.preset says which option is chosen; choose it with lora=attention",
    "lora/r=8": "keys are written with dots; write lora.r=8",
    "trainer/learning_rat=8": "no such group; did you mean trainer.learning_rate?",
    # Hydra's prefixes
    "+lora.rank=8": "lora.rank: no such key; did you mean lora.r?",
    "+lora.r=8": "+lora.r=8: conf/ has lora.r already; write lora.r=8",
    "+lora=attention": "+lora=attention: choose the option as lora=attention",
    "++lora=attention": "++lora=attention: choose the option as lora=attention",
    "~lora.r": "~lora.r: every key has a value; to change it, write lora.r=VALUE",
    "~lora.rank": "lora.rank: no such key; did you mean lora.r?",
    "~lora": f"~lora: a group always needs an option: {LORA}",
    "~trainer.lr_scheduler_kwargs.x": "there is no trainer.lr_scheduler_kwargs.x to remove",
    "lora@x=attention": "write lora=attention",
    # the syntax
    "lora.r=[1": "lora.r=[1: [ is not closed",
    "lora.target_modules=[a,{b]": "{ is not closed",
    "model.revision='x": "model.revision='x: ' is not closed",
    "lora.r": "lora.r: no value is given; write lora.r=VALUE",
    "=8": "=8: write KEY=VALUE; the key is missing",
    "lora. r=8": "lora. r=8: a key contains no spaces; write KEY=VALUE",
    "model.revision=a:b)": "the value cannot be read. Quote a text with special characters",
    # several values, and Hydra's own settings
    "lora.r=8,16": "several values where one is expected; a list is written lora.r=[8,16]. To run each of "
    "them: python stages/sweep.py -m lora.r=8,16",
    "hydra.run.dir=x": "it goes with python stages/sweep.py -m hydra.run.dir=x",
    "sweep=optuna": "it goes with python stages/sweep.py -m sweep=optuna",
    # values
    "lora.r=-3": "lora.r=-3: input should be greater than 0",
    "trainer.learning_rate=abc": "trainer.learning_rate='abc': input should be a valid number",
    "trainer.max_steps=0": "trainer.max_steps=0: expected -1 (epochs decide) or at least 1",
    "model.revision=12e4567": "12e4567 is read as a number. Quote it",
    "trainer.seed=${nope}": "trainer.seed=${nope}: Interpolation key 'nope' not found",
    "trainer.optim=adam": "trainer.optim='adam': no such value; Adam is AdamW without weight decay: write "
    "trainer.optim=adamw_torch_fused trainer.weight_decay=0",
    "trainer.optim=lion": "trainer.optim='lion': input should be 'adamw_torch',",
    "hardware.device=mps": "Apple's GPUs are not supported; choose hardware=cpu",
    "lora.target_modules=all_linear": "expected all-linear, with a hyphen",
    "trainer.fp16=true": "trainer.fp16=True, hardware.device='cpu': expected hardware=gpu",
    "lora=none": "expected quantization=none where all weights are trained",
}  # fmt: skip


@pytest.fixture(scope="module")
def composer() -> Composer:
    """What it has composed once it copies."""
    return Composer(CONF)


@pytest.mark.parametrize(("override", "sentence"), KINDS.items())
def test_each_kind_of_problem_has_its_sentence(
    composer: Composer, override: str, sentence: str
) -> None:
    several = "glob(" in override
    [problem] = check_points([override], CONF, several=several, composer=composer).problems
    assert sentence in problem.message and "To append" not in problem.message
    assert "Traceback" not in problem.message and "hydra.cc" not in problem.message


def test_what_is_answered_to_names_of_other_libraries_exists(composer: Composer) -> None:
    sentences = {**foreign_names.ANSWERS, **foreign_names.OPTIONS}
    sentences |= {key: " ".join(answers.values()) for key, answers in foreign_names.VALUES.items()}
    written = set(re.findall(r"[a-z_]+(?:\.\w+)*=[\w.]+", " ".join(sentences.values())))
    assert {"hardware=gpu_fsdp2", "trainer.optim=adamw_8bit"} < written
    for override in sorted(written):
        for problem in check_points([override], CONF, composer=composer).problems:
            assert "expected" in problem.message, problem  # of rules, which other overrides satisfy
    assert set(foreign_names.KEYS.values()) < set(known_keys())
    for name in foreign_names.KEYS | foreign_names.ANSWERS:
        answer = foreign_names.answer_to_key(name)
        assert answer and nearest(name) == nearest(f"trainer.{name}") == answer


@pytest.mark.parametrize(
    "override",
    [
        "lora.r=8", "++lora.r=8", "lora=attention", "experiment=quick", "smoke=tiny", "+smoke=tiny",
        "trainer.seed=${seed}", "generation.settings.greedy.top_k=null", "lora.target_modules=[q_proj]",
        "generation.prompts=['Set a timer, please.']", "~generation.settings.greedy", "seed=3",
        "trainer.lr_scheduler_kwargs={}", "dataset.flaws.malformed=drop", "chat_template=llama3",
    ],
)  # fmt: skip
def test_what_is_right_is_no_problem(composer: Composer, override: str) -> None:
    beside = ["dataset.flaw_budget_fraction=0.1"] if "flaws" in override else []
    assert check_points([override, *beside], CONF, composer=composer).problems == []


def test_all_are_told_at_once_and_none_follows_from_another() -> None:
    """Without lora=none, which is misspelt, trainer=full would not be allowed."""
    given = ["lora=nonne", "trainer.lr=1e-3", "lora.r=[1", "trainer.max_steps=0", "dataset.seed=x"]
    problems = check([*given, "trainer=full", "quantization=none"], CONF)
    assert [problem.key for problem in problems] == [
        "lora", "trainer.lr", "lora.r", "dataset.seed", "trainer.max_steps",
    ]  # fmt: skip
    twice = check(["lora=attention", "lora=none"], CONF)
    assert [p.message for p in twice] == ["lora=attention, lora=none: choose one option of lora"]


def test_every_combination_is_checked_and_the_wrong_one_named() -> None:
    words = ["lora.r=8,-3", "lora=attention,none", "quantization=nf4"]
    problems = [problem.message for problem in check(words, CONF, several=True)]
    assert len(problems) == 2 and "lora.r=8, lora.lora_alpha=None" in problems[0]
    assert problems[1] == "lora.r=-3: input should be greater than 0"
    found = check_points(["lora.r=8,16", "seed=1,2", "lora=attention"], CONF, several=True)
    assert [point.overrides[:2] for point in found.points] == [
        ("lora.r=8", "seed=1"), ("lora.r=8", "seed=2"), ("lora.r=16", "seed=1"), ("lora.r=16", "seed=2"),
    ]  # fmt: skip
    assert [point.values["trainer"]["seed"] for point in found.points] == [1, 2, 1, 2]
    by_option = check(["lora=attention,none"], CONF, several=True)
    assert by_option[0].message.endswith("(with lora=none)")


def test_of_very_many_combinations_each_value_is_checked() -> None:
    seeds = ",".join(map(str, range(40)))
    words = [f"seed={seeds}", f"dataset.seed={seeds},-1"]
    assert MAX_COMBINATIONS < 40 * 41
    [problem] = check(words, CONF, several=True)
    assert problem.message.startswith("dataset.seed=-1: ")


def test_the_ends_of_an_interval_are_checked_and_a_grid_has_none() -> None:
    interval = "trainer.learning_rate=tag(log,interval(1e-4,3))"
    [problem] = check_points([interval], CONF, several=True, combine=False).problems
    assert problem.message == "trainer.learning_rate=3.0: input should be less than 1"
    [problem] = check([interval], CONF, several=True)
    assert "an interval needs a search (sweep=optuna)" in problem.message


def test_a_broken_conf_is_told_as_conf(tmp_path: Path) -> None:
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    config = (conf / "config.yaml").read_text()
    (conf / "config.yaml").write_text(config.replace("lora: all_linear", "lora: all_liner"))
    [problem] = check(["seed=1"], conf)
    assert "lora=all_liner: no such option; did you mean all_linear?" in problem.message
    (conf / "config.yaml").write_text(config)
    model = conf / "model/embedded.yaml"
    model.write_text(re.sub("licence: .*", "licence: ???", model.read_text()))
    assert [p.message for p in check([], conf)] == ["model.licence: conf/ leaves it unset (???)"]
    (conf / "config.yaml").write_text("a: [")
    [problem] = check([], conf)
    assert problem.message.startswith("conf/ does not compose")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with neither a GPU nor a package of an extra."""
    monkeypatch.setattr(requirements, "num_gpus", lambda: 0)
    monkeypatch.setattr(requirements, "_installed", {"torch": "2.13.0"}.get)
    monkeypatch.setattr(extras, "VERSIONS", {e: {f"no-{e}": "1"} for e in extras.VERSIONS})
    monkeypatch.setattr("capas.evaluation.harness.PACKAGE", "no-lm-eval")
    return monkeypatch


GPU = ("hardware=gpu", "model.dtype=bfloat16")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("hardware=gpu",), ["has no NVIDIA GPU that CUDA can use"]),
        ((*GPU, "model.attn_implementation=flash_attention_2"), ["no NVIDIA GPU", "flash-attn"]),
        ((*GPU, "trainer.use_liger_kernel=true"), ["no NVIDIA GPU", "no-gpu is not installed"]),
        (
            (*GPU, "trainer=unsloth", "hardware.cudnn_deterministic=false"),
            ["no NVIDIA GPU", "no-unsloth is not installed: pip install -e '.[unsloth]'"],
        ),
        (("evaluation.harness.tasks=[arc_easy]",), ["pip install -e '.[harness]'"]),
        (("lora.r=8",), []),
    ],
)
def test_what_the_machine_lacks_is_told_where_the_run_is_on_it(
    bare: pytest.MonkeyPatch, overrides: tuple[str, ...], expected: list[str]
) -> None:
    found = [problem.message for problem in check(overrides, CONF, reads=READS)]
    assert len(found) == len(expected)
    assert all(part in message for part, message in zip(expected, found, strict=True))
    assert check(overrides, CONF) == []


def test_what_conf_asks_for_is_left_to_the_stages(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A colleague without a GPU pulls the results, and runs what needs none."""
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    config = (conf / "config.yaml").read_text().replace("hardware: cpu", "hardware: gpu")
    (conf / "config.yaml").write_text(config)
    assert check(["tracking=none"], conf, reads=READS) == []


def test_gpus_are_counted_and_torch_must_have_cuda(bare: pytest.MonkeyPatch) -> None:
    hardware = {"device": "cuda", "num_processes": 4, "num_machines": 1}
    bare.setattr(requirements, "num_gpus", lambda: 2)
    [problem] = lacking({"hardware": hardware}, ["hardware.device"])
    assert "num_processes=4" in problem.message and "this machine has 2" in problem.message
    assert lacking({"hardware": {**hardware, "num_machines": 2}}, ["hardware.device"]) == []
    bare.setattr(requirements, "_installed", {"torch": "2.13.0+cpu"}.get)
    [problem] = lacking({"hardware": hardware}, ["hardware.device"])
    assert "torch 2.13.0+cpu is a build without CUDA" in problem.message


def test_instructions_that_the_cpu_lacks_are_told(bare: pytest.MonkeyPatch) -> None:
    def refuse(instruction_set: str) -> None:
        raise CapasError(f"hardware.instruction_set={instruction_set}, but this CPU")

    bare.setattr(kernels, "check_supported", refuse)
    values: dict[str, Any] = {"hardware": {"instruction_set": "avx512"}}
    [problem] = lacking(values, ["hardware.instruction_set"])
    assert (problem.key, problem.value) == ("hardware.instruction_set", "avx512")


def test_only_the_stages_that_run_count() -> None:
    assert "hardware.device" in read_by(REPOSITORY)
    assert "hardware.device" not in read_by(REPOSITORY, ["format"])
    assert "dataset.path" in read_by(REPOSITORY, ["format"])
    assert "dataset.path" not in read_by(REPOSITORY, ["format"], before=False)


def test_a_machine_without_cuda_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            assert re.match(r"libcuda", name)

        def cuInit(self, flags: int) -> int:  # noqa: N802
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
            count._obj.value = 3
            return 0

    monkeypatch.setattr("ctypes.CDLL", Driver)
    assert requirements.num_gpus() == 3

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert requirements.num_gpus() == 0
