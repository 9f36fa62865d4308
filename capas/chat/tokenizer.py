"""Read a tokenizer's files, and encode texts as plain text, so that no content becomes a control token.

Added tokens of a vocabulary are control tokens if they are marked `special` or look like one: `<|im_end|>`
closes a turn. `chat_template.allowed_tokens` lists those that a content may contain as tokens (`<think>`).
The other added tokens (a run of spaces, `<h1>`) are ordinary words, as the tokenizer's makers intended.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import orjson
from tokenizers import AddedToken, Tokenizer

from capas.core.errors import CapasError
from capas.core.files import read_json

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENS_MAP, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
# The shape of a control token; all tokens of the four families have it.
SHAPE = re.compile(
    r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>|<(?:start|end)_of_[a-z]+>|<unused\d+>|\[/?[A-Z][A-Z_]+\]|</?s>"
)
_MODEL = re.compile(rb',\s*"model"\s*:\s*\{')  # inside a vocabulary the key "model" has a number
MODEL_TEMPLATE, DEFAULT = "model", "default"  # chat_template.path: model, or model:NAME
WORD_START = "▁"  # SentencePiece's space
_HEAD = frozenset(
    ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "truncation", "padding")
)
_BARE = {"post_processor": None, "truncation": None, "padding": None}
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFiles:
    """The parsed tokenizer.json, tokenizer_config.json and special_tokens_map.json of a folder.

    Args:
        allowed: control tokens whose text in a content is encoded as the token.

    Raises:
        CapasError: a file is missing or damaged, or a named token is not in the vocabulary.
    """

    def __init__(self, folder: Path, allowed: Collection[str] = ()) -> None:
        self.folder = folder
        if missing := [name for name in (TOKENIZER, CONFIG) if not (folder / name).is_file()]:
            raise CapasError(
                f"{folder} has no {' and no '.join(missing)}; capas needs a fast tokenizer. Create "
                "the files with transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        self._spec, self._model = _read_spec(folder / TOKENIZER)
        self._config = _read_config(folder)
        self._built: dict[tuple[frozenset[str], bool], Tokenizer] = {}
        _added_tokens(self._spec, folder)
        for token in self._spec["added_tokens"]:
            looks_so = bool(SHAPE.fullmatch(token["content"]))
            token["special"] = (token["special"] or looks_so) and token["content"] not in allowed
        self.added = _added_tokens(self._spec, folder)
        self.named = self._named_tokens()

    def chat_template(self, name: str = DEFAULT) -> str:
        """Return one of the tokenizer's own templates; some tokenizers have several, with names.

        Raises:
            CapasError: the tokenizer has none of that name; the message lists the names.
        """
        there = self._chat_templates()
        if name in there:
            return there[name]
        requested = MODEL_TEMPLATE if name == DEFAULT else f"{MODEL_TEMPLATE}:{name}"
        if there:
            others = ", ".join(
                MODEL_TEMPLATE if n == DEFAULT else f"{MODEL_TEMPLATE}:{n}" for n in sorted(there)
            )
            raise CapasError(
                f"chat_template.path={requested}: the tokenizer in {self.folder} has no chat template "
                f"called {name}. Set chat_template.path={others}"
            )
        raise CapasError(
            f"chat_template.path={requested}: the tokenizer in {self.folder} has no chat template (is "
            "it a base model?). Choose chat_template=chatml, llama3, mistral, gemma or a file in "
            "conf/"
        )

    def _chat_templates(self) -> dict[str, str]:
        """Return {name: template}; as in transformers, chat_template.jinja overrides tokenizer_config.json.

        Raises:
            CapasError: chat_template in tokenizer_config.json is malformed.
        """
        file, found = self.folder / TEMPLATE, self._config.get("chat_template")
        if file.is_file():
            return {DEFAULT: file.read_text(encoding="utf-8")}
        if found is None or isinstance(found, str):
            return {} if found is None else {DEFAULT: found}
        try:
            named = {item["name"]: item["template"] for item in found}
        except (TypeError, KeyError):
            named = {None: None}
        if not all(isinstance(value, str) for value in (*named, *named.values())):
            raise CapasError(
                f"{self.folder / CONFIG}: chat_template must be a string or a list of objects with "
                "name and template"
            )
        return named

    @property
    def adds_first_blank(self) -> bool:
        """Return whether `build(inside=True)` makes a difference."""
        pre_tokenizer = self._spec.get("pre_tokenizer")
        return _without_first_blank(pre_tokenizer) != pre_tokenizer

    def build(self, also_special: Collection[str] = (), inside: bool = False) -> Tokenizer:
        """Return a tokenizer that adds, pads and truncates nothing and treats control tokens' texts as text.

        Args:
            also_special: added tokens that count as control tokens without being marked as special.
            inside: true for texts that do not begin the sequence. SentencePiece puts a space before the first
                word of a sequence only.

        Raises:
            CapasError: tokenizer.json is not a tokenizer.
        """
        key = frozenset(also_special), inside and self.adds_first_blank
        if key not in self._built:
            self._built[key] = _from_bytes(self._joined(self._changed(*key)), self.folder)
            self._built[key].encode_special_tokens = True
        return self._built[key]

    def _changed(self, also_special: Collection[str], inside: bool) -> dict[str, Any]:
        spec = {**self._spec, **_BARE}
        spec["added_tokens"] = [
            {**token, "special": token["special"] or token["content"] in also_special}
            for token in spec["added_tokens"]
        ]
        if inside:
            spec["pre_tokenizer"] = _without_first_blank(spec.get("pre_tokenizer"))
        return spec

    def encode_parsing(self, texts: Sequence[str], inside: bool = False) -> list[list[int]]:
        """Return the ids of rendered texts, in which the text of a control token is encoded as the token.

        Args:
            inside: true for texts that do not begin the conversation.
        """
        tokenizer = self.build(inside=inside)
        tokenizer.encode_special_tokens = False
        try:
            return encode_plain(tokenizer, texts)
        finally:
            tokenizer.encode_special_tokens = True

    def plain_json(self) -> tuple[str, bool]:
        """Return tokenizer.json for fastokens, without control tokens, padding or truncation; and a flag.

        fastokens does not support Metaspace, SentencePiece's spaces. If Metaspace is the only step, it is
        replaced by an equivalent one. The flag is true if the caller must then put a space before a text that
        does not begin with one.
        """
        words = [token for token in self._spec["added_tokens"] if not token["special"]]
        spec = {**self._spec, **_BARE, "added_tokens": words}
        if words or not _is_metaspace_alone(spec):
            return self._joined(spec).decode(), False
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
        spec |= {"normalizer": replace, "pre_tokenizer": None}
        return self._joined(spec).decode(), self.adds_first_blank

    def _joined(self, spec: dict[str, Any]) -> bytes:
        return orjson.dumps(spec)[:-1] + self._model

    def id_of(self, name: str) -> int | None:
        """Return the id of `bos_token`, `eos_token`, ..., or None if the tokenizer has no such token."""
        return self.id_of_text(self.named[name]) if name in self.named else None

    def id_of_text(self, text: str) -> int:
        return next(i for i, token in self.added.items() if token.content == text)

    def _named_tokens(self) -> dict[str, str]:
        texts = {token.content for token in self.added.values()}
        named = {name: _text_of(self._config.get(name)) for name in NAMED}
        for name, text in named.items():
            if text is not None and text not in texts:
                raise CapasError(
                    f"{self.folder / CONFIG} or {TOKENS_MAP}: {name} is {text!r}, which is not "
                    f"among the added tokens of {TOKENIZER}: the files belong to different "
                    "tokenizers"
                )
        return {name: text for name, text in named.items() if text is not None}


def encode_plain(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text; `tokenizer` comes from `TokenizerFiles.build`."""
    return [
        encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


def _read_spec(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return tokenizer.json in two parts: the parsed head, and the model as raw bytes, some megabytes."""
    text = file.read_bytes()
    found = _MODEL.search(text)
    try:
        spec = orjson.loads(text[: found.start()] + b"}") if found else {}
    except orjson.JSONDecodeError:
        spec = {}
    if found and spec.keys() >= _HEAD:
        return spec, text[found.start() :]
    spec = _parse(text, file)  # the model is not the last key
    return spec, b',"model":' + orjson.dumps(spec.pop("model", None)) + b"}"


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    try:
        spec = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise CapasError(f"{file} is damaged: {error}. Download it again") from None
    if not isinstance(spec, dict):
        raise CapasError(f"{file} must hold an object, not {type(spec).__name__}")
    return spec


def _read_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json with the tokens of special_tokens_map.json, as transformers reads both."""
    config = read_json(folder / CONFIG)
    if "added_tokens_decoder" in config or not (folder / TOKENS_MAP).is_file():
        return config  # the newer format has all of it in one file
    return config | read_json(folder / TOKENS_MAP)


def _added_tokens(spec: dict[str, Any], folder: Path) -> dict[int, AddedToken]:
    """Return {id: added token}, in the file's order."""
    try:
        return {
            token["id"]: AddedToken(
                token["content"],
                special=token["special"],
                lstrip=token["lstrip"],
                rstrip=token["rstrip"],
                normalized=token["normalized"],
            )
            for token in spec["added_tokens"]
        }
    except (KeyError, TypeError) as error:
        raise CapasError(
            f"{folder / TOKENIZER} is not a tokenizer: {error!r} in added_tokens"
        ) from None


def _from_bytes(spec: bytes, folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(spec)
    except Exception as error:  # noqa: BLE001  the library raises nothing narrower
        raise CapasError(f"{folder / TOKENIZER} is not a tokenizer: {error}") from None


def _text_of(token: Any) -> str | None:
    """Return the text of a named token, which is a text or an object with the text in it."""
    return token.get("content") if isinstance(token, dict) else token


def _without_first_blank(pre_tokenizer: Any) -> Any:
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    if pre_tokenizer["type"] == "Sequence":
        parts = [_without_first_blank(part) for part in pre_tokenizer["pretokenizers"]]
        return {**pre_tokenizer, "pretokenizers": parts}
    if pre_tokenizer["type"] == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        return {**pre_tokenizer, "prepend_scheme": "never"}
    return pre_tokenizer


def _is_metaspace_alone(spec: dict[str, Any]) -> bool:
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    return (
        spec.get("normalizer") is None
        and pre_tokenizer.get("type") == "Metaspace"
        and pre_tokenizer.get("prepend_scheme") in ("first", "never")
        and pre_tokenizer.get("split") is False
        and pre_tokenizer.get("replacement") == WORD_START
    )
