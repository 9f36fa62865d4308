"""Embedding rows read without torch, and tokens cut into readable pieces."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from capas.report.levels import four_bit_levels
from capas.report.mask.pieces import cut
from capas.report.neighbours import Embedding

NAME = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four tokens: 0 and 1 point the same way, 2 across, 3 the opposite way."""
    rows = np.array([[1, 0], [2, 0.1], [0, 1], [-1, 0]], dtype=np.float32)
    save_file({NAME: rows, "lm_head.weight": rows}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 4}))
    return tmp_path


def test_neighbours_are_ordered_by_cosine(folder: Path) -> None:
    table = Embedding.find(folder)
    assert table is not None
    assert (table.name, table.shape) == (NAME, (4, 2))
    found = table.neighbours(0, [0, 1, 2, 3], k=3)
    assert [token for token, _ in found] == [1, 2, 3]
    assert [round(cosine, 3) for _, cosine in found] == [0.999, 0.0, -1.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rows_are_read(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_tensors

    rows = torch.tensor([[1.0, -2.5], [0.15625, 3.0]], dtype=getattr(torch, dtype))
    save_tensors({NAME: rows}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 2}))
    table = Embedding.find(tmp_path)
    assert table is not None
    assert table.rows([0, 1]).tolist() == rows.float().tolist()


def test_a_model_without_a_readable_table_has_none(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 5}))
    assert Embedding.find(folder) is None


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Bytes, and one control token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return made


def test_pieces_put_together_are_the_text(tokenizer: Tokenizer) -> None:
    text = "año 🙂\n<end>"
    ids = tokenizer.encode(text).ids
    pieces = cut(tokenizer, ids)
    assert "".join(piece.text for piece in pieces) == text
    assert [i for piece in pieces for i in piece.ids] == ids
    assert [piece.text for piece in pieces if len(piece.ids) > 1] == ["ñ", "🙂"]
    assert [piece.text for piece in pieces if piece.control] == ["<end>"]


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    pieces = cut(tokenizer, tokenizer.encode("añ").ids[:-1])
    assert [piece.text for piece in pieces] == ["a", "\ufffd"]


def test_four_bit_levels_are_those_that_bitsandbytes_chose(tmp_path: Path) -> None:
    """Each weight, divided by the largest of its block, takes the nearest level."""
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    base, quantized = tmp_path / "base", tmp_path / "quantized"
    for folder in (base, quantized):
        folder.mkdir()
    name = "model.layers.0.q_proj.weight"
    save_file({name: weight.numpy()}, base / "model.safetensors")
    facts = np.frombuffer(json.dumps({"blocksize": 64}).encode(), dtype=np.uint8)
    stored = {name: packed.numpy(), f"{name}.quant_map": state.code.numpy()}
    stored[f"{name}.quant_state.bitsandbytes__nf4"] = facts
    save_file(stored, quantized / "model.safetensors")
    found = four_bit_levels(base, quantized)
    assert found is not None and found["layer"] == "model.layers.0.q_proj"
    relative = weight / weight.abs().max(dim=1, keepdim=True).values
    nearest = (relative.reshape(-1, 1) - state.code).abs().argmin(dim=1)
    counts = torch.bincount(nearest, minlength=16) / weight.numel()
    assert found["after"] == pytest.approx(counts.tolist(), abs=1e-3)
    assert sum(found["before"]) == pytest.approx(1, abs=1e-4)
    assert four_bit_levels(base, base) is None
