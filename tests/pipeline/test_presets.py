"""Every preset of conf/model as a tiny model of its architecture, from the fetched files to the samples."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from architectures import REAL, Family, family_of, small, write_small
from conftest import template_text
from safetensors.torch import load_file
from tiny import (
    REPOSITORY,
    SHRUNK,
    link_code,
    read_json,
    read_params,
    run_stage,
    write_lock,
    write_raw,
    write_tokenizer,
)
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from capas.config.composition import composer, dump
from capas.config.resolved_files import resolved_files
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.hub.sources import folder_revision
from capas.models.loading import load_model
from capas.training.batches import Collator, read_examples
from stages import (
    evaluate_model,
    fetch_model,
    fetch_tokenizer,
    format_chat,
    quantize_model,
    sample_outputs,
    tokenize_messages,
    train_lora,
)

pytestmark = pytest.mark.usefixtures("without_estimate")

PRESETS = sorted(f.stem for f in (REPOSITORY / "conf/model").glob("[!_]*.yaml"))
STAGES: dict[str, Callable[..., None]] = {
    "fetch_tokenizer": fetch_tokenizer.main,
    "fetch_model": fetch_model.main,
    "tokenize": tokenize_messages.main,
    "format": format_chat.main,
    "quantize": quantize_model.main,
    "evaluate_base": partial(evaluate_model.main, "base"),
    "train": train_lora.main,
    "evaluate": partial(evaluate_model.main, "tuned"),
    "sample": sample_outputs.main,
}


class Made(NamedTuple):
    """A workspace after all stages, and the model as it was when its training ended."""

    preset: str
    root: Path
    trained: Any
    values: dict[str, Any]

    @property
    def family(self) -> Family:
        return family_of(self.preset)

    def ids(self, tokens: tuple[str, ...]) -> list[int]:
        tokenizer = Tokenizer.from_file(str(self.root / "data/models/tokenizer/tokenizer.json"))
        return [tokenizer.token_to_id(token) for token in tokens]


QUICK = {  # one of each architecture; the others in the slow tier
    *("llama_3.2_1b_instruct", "mistral_7b_instruct_v0.3", "qwen2.5_0.5b_instruct", "qwen3_4b"),
    *("gemma_2_2b_it", "gemma_3_1b_it"),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in sorted(REAL)],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Made]:
    preset, root = request.param, tmp_path_factory.mktemp("preset")
    values = write_preset(preset, root)
    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        save = train_lora.save_tuned
        patch.setattr(train_lora, "save_tuned", lambda m, *rest: (kept.append(m), save(m, *rest)))
        for name, main in STAGES.items():
            run_stage(name, main, root)
    yield Made(preset, root, kept[0], values)


def write_preset(preset: str, root: Path, *overrides: str) -> dict[str, Any]:
    """Model and tokenizer in the folder `local`, the rest as the preset says; returns params.yaml."""
    chosen = [f"model={preset}", *write_local(preset, root), "model.dtype=bfloat16"]
    chosen += ["trainer=qlora", "trainer.max_steps=2"]
    with composer(REPOSITORY / "conf") as compose:
        values = compose([*SHRUNK, *chosen, *overrides])
    write_composed(values, root)
    write_raw(root, {"train": 8, "validation": 2, "test": 4})
    write_lock(root)
    return values


def write_local(preset: str, root: Path) -> list[str]:
    """The code, and the preset's tiny model with its tokenizer in `local`; the overrides that name it."""
    family, local = family_of(preset), root / "local"
    link_code(root)
    tokenizer = write_tokenizer(local, family.controls, family.named)
    (local / "chat_template.jinja").write_text(template_text(family.template))
    write_small(preset, tokenizer.get_vocab_size(), local)
    return ["model.model_name_or_path=local", f"model.revision={folder_revision(local)}"]


def write_composed(values: dict[str, Any], root: Path) -> None:
    """params.yaml and data/composed, as compose writes them."""
    (root / "params.yaml").write_text(dump(values))
    for file, text in resolved_files(values).items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)


def test_there_is_a_tiny_model_for_every_preset() -> None:
    assert len(PRESETS) == 12
    assert sorted([*REAL, "embedded"]) == PRESETS
    assert {REAL[p]["model_type"] for p in QUICK} == {c["model_type"] for c in REAL.values()}


def test_quantized_is_everything_but_embeddings_norms_and_head(made: Made) -> None:
    facts = read_json(made.root / "reports/quantization.json")
    config = small(made.preset, 300)
    rows = (made.root / "reports/quantization_error.csv").read_text().splitlines()[1:]
    assert (facts["method"], facts["skipped_modules"]) == ("nf4", ["lm_head"])
    assert (facts["embeddings_dtype"], facts["head_dtype"]) == ("bfloat16", "bfloat16")
    assert facts["tied_embeddings"] is config.get("tie_word_embeddings", True)
    assert facts["num_shards_before"] == 2
    assert len(rows) == 7 * config["num_hidden_layers"]
    assert 0.05 < facts["relative_error_mean"] < 0.15


def test_training_leaves_the_base_bit_for_bit(made: Made) -> None:
    before = load_quantized(made).state_dict()
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in made.trained.state_dict().items()
        if ".lora_" not in name
    }
    assert base.keys() == before.keys()
    assert not [n for n, t in base.items() if not torch.equal(t, before[n].to(t.dtype))]


def test_gradient_reaches_every_lora_matrix_and_moved_it(made: Made) -> None:
    chat = read_json(made.root / "data/formatted/chat.json")
    examples = read_examples(made.root / "data/formatted/train.parquet")
    made.trained.train()
    made.trained.zero_grad()
    made.trained(**Collator(chat["pad_token_id"])(examples[:4])).loss.backward()
    norms = {n: p.grad.norm() for n, p in made.trained.named_parameters() if p.requires_grad}
    assert len(norms) == 2 * 7 * small(made.preset, 300)["num_hidden_layers"]
    assert all(".lora_" in name for name in norms)
    assert min(norms.values()) > 0
    adapter = load_file(made.root / "data/models/adapter/adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in adapter.values()), "B is zero before training"


def test_attention_and_dtype_are_those_of_the_preset(made: Made) -> None:
    used = read_json(made.root / "reports/train.json")["used"]
    assert used["attn_implementation"] == made.values["model"]["attn_implementation"]
    assert used["model_class"] == REAL[made.preset]["architectures"][0]
    assert used["quantization"] == "nf4"


def test_answers_end_and_are_padded_as_the_family_does(made: Made) -> None:
    chat = read_json(made.root / "data/formatted/chat.json")
    saved = read_json(made.root / "data/models/adapter/generation_config.json")
    assert chat["stop_token_ids"] == saved["eos_token_id"] == made.ids(made.family.stops)
    assert chat["pad_token_id"] == saved["pad_token_id"] == made.ids((made.family.pad,))[0]
    for example in read_examples(made.root / "data/formatted/train.parquet"):
        trained = example["labels"][example["labels"] != -100].tolist()
        assert trained[-1] == chat["end_token_id"] == chat["stop_token_ids"][0]


def test_evaluation_and_samples_are_there(made: Made) -> None:
    base, tuned = (
        read_json(made.root / f"reports/{name}.json") for name in ("evaluation_base", "evaluation")
    )
    samples = (made.root / "reports/samples.jsonl").read_text().splitlines()
    assert base["num_records"] == tuned["tuned"]["num_records"] == 4
    assert base["loss"] != tuned["tuned"]["loss"]
    assert abs(base["loss"] - base["full_precision"]["loss"]) < 1
    assert len(samples) >= 2 * 2 * len(made.values["generation"]["settings"])


def test_a_preset_is_called_as_its_model_on_the_hub() -> None:
    with composer(REPOSITORY / "conf") as compose:
        for preset in sorted(REAL):
            model = compose([f"model={preset}"])["model"]
            name = model["model_name_or_path"].partition("/")[2].lower().replace("-", "_")
            assert preset == name.removeprefix("meta_")
            assert model["licence"].startswith(("llama3.", "apache-2.0", "gemma"))


def test_a_pad_token_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    preset = "qwen2.5_0.5b_instruct"
    write_preset(preset, tmp_path, "model.pad_token='<|nope|>'")
    for name in ("fetch_tokenizer", "tokenize"):
        run_stage(name, STAGES[name], tmp_path)
    with pytest.raises(
        CapasError, match=r"model.pad_token='<\|nope\|>': the tokenizer has no such"
    ):
        run_stage("format", STAGES["format"], tmp_path)


def test_soft_capping_is_never_left_out(tmp_path: Path) -> None:
    """sdpa computes attention without it, and says nothing."""
    write_small("gemma_2_2b_it", 300, tmp_path)
    eager, sdpa = (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name, dtype="float32")
        for name in ("eager", "sdpa")
    )
    logits = []
    for model in (eager, sdpa):
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.data *= 200  # attention logits beyond the cap
        logits.append(model(torch.arange(20)[None]).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    params = Params({"dtype": "float32", "attn_implementation": "sdpa"})
    with pytest.raises(CapasError, match=r"caps its attention logits at 50.*Choose eager"):
        load_model(tmp_path, params, torch.device("cpu"))


def load_quantized(made: Made) -> Any:
    model = read_params("train", made.root).model
    return load_model(made.root / "data/models/quantized", model, torch.device("cpu"))
