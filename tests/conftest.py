"""What several test files use: a throw-away tokenizer and model, and the kit of real tokenizers."""

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from capas.core.cores import MAX_THREADS, usable_cores
from capas.models import kernels

if TYPE_CHECKING:
    from sweeping import Sweeper

# What capas.models.hardware sets before torch is imported; tests import it before any stage does.
os.environ |= {
    **kernels.environment("portable"),
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCHDYNAMO_DISABLE": "1",
    "CAPAS_COST": "off",  # compose measures no model
}

# pytest's workers share the cores among them.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    share = str(max(1, usable_cores() // int(workers)))
    os.environ |= {MAX_THREADS: share, "OMP_NUM_THREADS": share}

# A shell's background job ignores it, and with it every process that a test starts and means to stop.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
KIT = REPOSITORY.parent / "shared" / "kit"
CONTROL_TOKENS = (
    *("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"),
)
NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
TEXTS = (
    "Turn the request into one function call in JSON.",
    "system user assistant model",
    '{"name": "set_timer", "arguments": {"minutes": 12}}',
    "Set a timer for 12 minutes. ¿Qué tiempo hace mañana en Málaga?",
)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is imported by now: every training asks it for a round.

    And let oneMKL choose its kernels: at its first use it would take those that a test asked for.
    """
    gc.collect()
    gc.freeze()
    if "torch" in sys.modules:
        kernels.in_use()


@pytest.fixture(scope="module")
def without_estimate() -> Iterator[None]:
    """Leave out the estimate of memory, which takes longer than a tiny training: see test_memory."""
    from capas.training import memory

    def estimate(*args: object) -> None:
        raise memory.EstimateError("the memory of a tiny training is not estimated")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "estimate", estimate)
        yield


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> "Sweeper":
    """A repository whose sweeps call a stand-in for DVC; tests only read it."""
    from sweeping import Sweeper

    return Sweeper.make_quick(tmp_path_factory.mktemp("quick"))


@pytest.fixture
def sweeper(quick: "Sweeper", tmp_path: Path) -> "Sweeper":
    """A copy of `quick` of the test's own."""
    return quick.copy(tmp_path / "with a blank")


@pytest.fixture(autouse=True, scope="module")
def _environment_of_a_module() -> Iterator[None]:
    """Undo what a module leaves in the environment: `mlflow.set_tracking_uri` does."""
    yield from _environment_restored()


@pytest.fixture(autouse=True)
def _environment_of_a_test() -> Iterator[None]:
    yield from _environment_restored()


def _environment_restored() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _forgotten_optimizers() -> None:
    """Clear what bitsandbytes' optimizers keep by id(parameter), for the next parameter at that address."""
    if optim := sys.modules.get("bitsandbytes.optim"):
        optim.GlobalOptimManager._instance = None


@pytest.fixture(scope="session")
def empty_mlflow_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlflow.db without experiments, to copy: MLflow takes a second to make one."""
    from capas.tracking.store import existing

    file = tmp_path_factory.mktemp("empty_mlflow_db") / "mlflow.db"
    file.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        existing(file.parent)
    return file


def template_text(preset: str) -> str:
    return (REPOSITORY / f"conf/chat_template/{preset}.jinja").read_text(encoding="utf-8")


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation: user and assistant in turns."""
    told = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + told


def stored(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the columns that most records leave empty."""
    messages = [{"extra": "", "train": True, **message} for message in record["messages"]]
    return {"tools": "", **record, "messages": messages}


TOOL_TOKENS = (
    *("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)


@pytest.fixture(scope="session")
def tiny_tools_dir(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with Mistral's tokens for tools."""
    folder = tmp_path_factory.mktemp("tiny_tools")
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer_dir / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in TOOL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = (tiny_tokenizer_dir / "tokenizer_config.json").read_bytes()
    (folder / "tokenizer_config.json").write_bytes(config)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of some 330 tokens, with the control tokens of all four families."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen-2 of 2 layers and width 64 for the throw-away tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    vocabulary = Tokenizer.from_file(str(tiny_tokenizer_dir / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def kit() -> Path:
    """Real tokenizers, templates and records; they are not part of the repository."""
    if not KIT.is_dir():
        pytest.skip(f"the kit of real tokenizers is not there: {KIT}")
    return KIT
