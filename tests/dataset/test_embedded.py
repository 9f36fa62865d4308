"""The shipped base: intact, small, loadable offline, and made by the script that is here."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from capas.dataset.task.calls import generate_records
from capas.dataset.task.pretraining import (
    SPECIAL_TOKENS,
    Recipe,
    build_model,
    draw_repeating_rows,
    pretrain,
    train_tokenizer,
)
from stages import pretrain_embedded

FOLDER = Path(__file__).resolve().parents[2] / "data" / "embedded"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def contents():
    records = generate_records(0, 200, 0, 20)
    return [m["content"] for split in records.values() for r in split for m in r["messages"]]


def test_every_file_is_the_one_of_the_manifest():
    assert set(MANIFEST["files"]) >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "curve.csv",
    }
    for name, facts in MANIFEST["files"].items():
        content = (FOLDER / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, name


def test_nothing_but_the_manifest_and_the_page_goes_unlisted():
    names = {path.name for path in FOLDER.iterdir()}
    assert names - set(MANIFEST["files"]) == {"manifest.json", "README.md"}


def test_the_whole_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8_000_000


def test_the_manifest_tells_the_recipe_of_the_code():
    assert MANIFEST["recipe"] == json.loads(json.dumps(Recipe().__dict__))
    assert MANIFEST["licence"] == "Apache-2.0" and MANIFEST["seconds"] > 0


def test_the_base_loads_and_has_the_parameters_of_the_manifest():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True)
    assert model.config.model_type == "llama"
    assert model.num_parameters() == MANIFEST["num_parameters"]


def test_control_tokens_are_single_ids(tokenizer):
    for index, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.encode(token, add_special_tokens=False) == [index]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<bos>",
        "<eos>",
        "<pad>",
    )


def test_any_text_survives_a_round_trip(tokenizer, contents):
    for text in [*contents, "日本 🎉\t\x00\r\n", "  a  b\n\n\n  c  "]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_and_newlines_are_never_merged(tokenizer):
    tokens = [token for token in tokenizer.get_vocab() if token not in SPECIAL_TOKENS]
    assert not [token for token in tokens if len(token) > 1 and set(token) & set("0123456789")]
    assert not [token for token in tokens if len(token) > 1 and "Ċ" in token]


@pytest.mark.parametrize(
    ("before", "after"),
    [("<|im_start|>user\n", "<|im_end|>\n"), ("<|end_header_id|>\n\n", "<|eot_id|>"), ("\n", "\n")],
)
def test_contents_can_be_encoded_apart_from_what_surrounds_them(tokenizer, contents, before, after):
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    for text in contents:
        assert encode(before + text + after) == [*encode(before), *encode(text), *encode(after)]


def test_words_and_digits_have_the_same_ids_whatever_stands_before_them(tokenizer):
    for text in ("minutes", "Zuteda", "42", "málaga"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for before in ("[INST] ", 'say "', "(", "\n", "a "):
            assert tokenizer.encode(before + text, add_special_tokens=False)[-len(ids) :] == ids


def test_it_splits_by_the_two_patterns_that_llama_cpp_calls_superbpe(tokenizer):
    splits = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    patterns = [part["pattern"]["Regex"] for part in splits if part["type"] == "Split"]
    assert patterns == [r"\p{N}+", r"(?=(\d{3})+(?!\d))"]
    assert [part["type"] for part in splits] == ["Split", "Split", "ByteLevel"]


def test_the_template_of_the_base_is_chatml(tokenizer):
    messages = [{"role": "user", "content": "Hi."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"


def test_previous_token_heads_look_back_by_their_offset():
    model = build_model(Recipe())
    ids = draw_repeating_rows(1, Recipe(), torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    attention = model(input_ids=ids, output_attentions=True).attentions[0][0]
    for head, offset in enumerate(Recipe().head_offsets):
        assert attention[head].diagonal(-offset).mean() > 0.7


def test_repeating_rows_repeat_and_hold_no_control_token():
    rows = draw_repeating_rows(6, Recipe(), torch.Generator().manual_seed(0))
    assert rows.shape == (6, Recipe().row_tokens) and rows.min() >= len(SPECIAL_TOKENS)
    periods = [[p for p in range(8, 32) if (row[p:] == row[:-p]).all()] for row in rows]
    assert all(periods)


def test_the_tokenizer_is_a_function_of_its_texts():
    texts = ["call Ana", "llama a Ana", "call Luis at 7:30"] * 20
    first, second = (train_tokenizer(texts, 320).to_str() for _ in range(2))
    assert first == second


def test_pretraining_repeats_its_weights_and_learns():
    recipe = Recipe(num_steps=12, batch_rows=4, repeat_steps=0, warmup_steps=2)
    rows = draw_repeating_rows(1, recipe, torch.Generator().manual_seed(1)).repeat(48, 1)
    models, losses = [build_model(recipe), build_model(recipe)], []
    for model in models:
        pretrain(model, rows, recipe, lambda step, loss: losses.append(loss))
    assert losses[:12] == losses[12:] and losses[11] < losses[0] - 1
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def write_build(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_text(content)
    (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {}}}))
    return folder


def test_a_rebuild_is_compared_and_replaces_nothing_by_itself(tmp_path):
    shipped, equal = write_build(tmp_path / "shipped", "a"), write_build(tmp_path / "equal", "a")
    different = write_build(tmp_path / "different", "b")
    assert pretrain_embedded.compare(equal, shipped) == []
    assert pretrain_embedded.compare(different, shipped) == ["model.safetensors"]
    assert (shipped / "model.safetensors").read_text() == "a"
    pretrain_embedded.replace(different, shipped)
    assert (shipped / "model.safetensors").read_text() == "b"


def test_a_file_that_is_no_longer_built_goes(tmp_path):
    shipped, built = write_build(tmp_path / "shipped", "a"), write_build(tmp_path / "built", "a")
    (shipped / "old.bin").write_text("old")
    files = {"files": {"model.safetensors": {}, "old.bin": {}}}
    (shipped / "manifest.json").write_text(json.dumps(files))
    assert pretrain_embedded.compare(built, shipped) == ["old.bin"]
    pretrain_embedded.replace(built, shipped)
    assert not (shipped / "old.bin").exists()
