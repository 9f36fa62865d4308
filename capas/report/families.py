"""Render one short conversation with each family of chat templates."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from capas.chat.template import Template, TemplateRefusal, place_system

# The named tokens of each family's own tokenizer.
_NAMED = {
    "chatml": {"eos_token": "<|im_end|>"},
    "qwen": {"eos_token": "<|im_end|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>"},
}
FAMILIES = tuple(_NAMED)
_ROLES = ("system", "user", "assistant", "user", "assistant")


def render(family: str, text: str, contents: Sequence[str], date_string: str) -> str:
    """Return the conversation with these five contents as `family` formats it.

    If a family has no system message, the system message is put in front of the first request.

    Args:
        text: the family's template, Jinja.
        contents: the contents of system, user, assistant, user, assistant.
    """
    template = Template(text, _NAMED[family], date_string, family)
    messages = [
        {"role": role, "content": content} for role, content in zip(_ROLES, contents, strict=True)
    ]
    try:
        return template.render(messages)
    except TemplateRefusal:
        return template.render(place_system(messages, "fold"))


def render_all(folder: Path, contents: Sequence[str], date_string: str) -> Mapping[str, str]:
    """Return {family: text} for the templates of `folder`, conf/chat_template."""
    return {
        family: render(
            family,
            (folder / f"{family}.jinja").read_text(encoding="utf-8"),
            contents,
            date_string,
        )
        for family in FAMILIES
    }
