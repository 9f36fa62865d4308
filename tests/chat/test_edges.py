"""Every kind of fast tokenizer: message by message gives the ids of the whole text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTROL_TOKENS, NAMED, TEXTS, say, template_text
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from capas.chat.edges import Edges
from capas.chat.expected import reference_ids
from capas.chat.format import ChatFormat
from capas.chat.tokenizer import TokenizerFiles

WORDS = [
    "Set",
    "a",
    "timer",
    "12",
    "'s",
    "?",
    "¿Qué",
    "tiempo",
    "ñ",
    "n\u0303",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "▁",
    "_",
    "{",
]
SEGMENTS = ("user\n", "assistant\n", " ", "", "x ", "(", "\n\n", "Hi▁", "'")


def byte_level(**options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    return tokenizer


def metaspace(model: Any, scheme: str, split: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return tokenizer


def prepending() -> Tokenizer:
    """As Llama 2: the normalizer puts a blank before every stretch of text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def replacing() -> Tokenizer:
    """As Gemma: blanks become ▁, and a whole stretch of text is one word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def composing() -> Tokenizer:
    tokenizer = byte_level(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


KINDS = {
    "byte level": lambda: byte_level(add_prefix_space=False),
    "byte level, prefix": lambda: byte_level(add_prefix_space=True),
    "byte level, no cuts": lambda: byte_level(add_prefix_space=False, use_regex=False),
    "NFC": composing,
    "metaspace first": lambda: metaspace(
        models.BPE(unk_token="<unk>", fuse_unk=True), "first", False
    ),
    "metaspace first, cut": lambda: metaspace(models.BPE(unk_token="<unk>"), "first", True),
    "metaspace always": lambda: metaspace(
        models.BPE(unk_token="<unk>", fuse_unk=True), "always", False
    ),
    "metaspace never": lambda: metaspace(
        models.BPE(unk_token="<unk>", fuse_unk=True), "never", True
    ),
    "unigram": lambda: metaspace(models.Unigram(), "first", True),
    "prepending": prepending,
    "replacing": replacing,
    "bert": bert,
}


def train(tokenizer: Tokenizer, folder: Path, **flags: bool) -> Path:
    special = [AddedToken(text, special=True, normalized=False, **flags) for text in CONTROL_TOKENS]
    options: dict[str, Any] = {"vocab_size": 400, "show_progress": False}
    kinds = {models.Unigram: trainers.UnigramTrainer, models.WordPiece: trainers.WordPieceTrainer}
    trainer = kinds.get(type(tokenizer.model), trainers.BpeTrainer)
    if trainer is trainers.UnigramTrainer:
        options["unk_token"] = "<unk>"
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    unknown = AddedToken("<unk>", special=True, normalized=False)
    texts = [*TEXTS, *("user\nSet a\nassistant\n", "  \n\n\t", "'s (x) ▁ ñ _")] * 4
    tokenizer.train_from_iterator(texts, trainer(special_tokens=[*special, unknown], **options))
    tokenizer.add_tokens(["\n\n", "ser\nS"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**NAMED, "unk_token": "<unk>"}))
    return folder


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(0, 6)))


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(KINDS[request.param](), tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("preset", ["chatml", "mistral", "gemma"])
def test_ids_are_those_of_the_rendered_text(preset: str, folder: Path) -> None:
    chat = ChatFormat.load(template_text(preset), folder, "", "fold")
    for seed in range(60):
        rng = random.Random(seed)
        messages = say(
            random_text(rng), random_text(rng) + "x", random_text(rng), "y" + random_text(rng)
        )
        messages = say(system=random_text(rng)) + messages if seed % 3 == 0 else messages
        assert chat.encode(messages).input_ids == reference_ids(chat, messages)


def test_a_border_that_is_called_safe_is_safe(folder: Path) -> None:
    files = TokenizerFiles(folder)
    alone, inside = files.build(), files.build(inside=True)
    edges, safe = Edges(inside, alone), 0

    def ids(tokenizer: Tokenizer, text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return found

    for seed in range(400):
        rng = random.Random(seed)
        scaffold, content = rng.choice(SEGMENTS), random_text(rng)
        whole = ids(inside, scaffold + content)
        if edges.join(scaffold, content):
            assert whole == ids(inside, scaffold) + ids(alone, content), (scaffold, content)
            safe += 1
        elif edges.absorb(scaffold, content):
            assert whole == ids(alone, content), (scaffold, content)
            safe += 1
    assert safe > 5


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_control_tokens_that_swallow_blanks(flag: str, tmp_path: Path) -> None:
    """As Phi 3: the line break after `<|im_start|>` or before `<|im_end|>` is part of the token."""
    folder = train(byte_level(add_prefix_space=False), tmp_path, **{flag: True})
    text = "{% for m in messages %}<|im_start|> {{ m.role }}\n{{ m.content }}\n<|im_end|> \n{% endfor %}"
    ask = "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
    chat = ChatFormat.load(text + ask, folder, "")
    for contents in (("Hi", "Hello"), ("a b", "c\nd", "e", "f")):
        messages = say(*contents)
        assert chat.encode(messages).input_ids == reference_ids(chat, messages)
