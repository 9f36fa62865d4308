"""Which templates only copy contents: the ones that look into them have to be rendered for every record."""

import jinja2
import pytest
from conftest import REPOSITORY

from capas.chat.copying import copies_contents

LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ EXPRESSION }}<|im_end|>\n{% endfor %}"
TEMPLATES = sorted((REPOSITORY / "conf/chat_template").glob("*.jinja"))


def judge(text: str) -> bool:
    return copies_contents(jinja2.Environment().parse(text))


def test_our_templates_only_copy() -> None:
    assert {file.name: judge(file.read_text()) for file in TEMPLATES} == {
        f"{name}.jinja": True for name in ("chatml", "gemma", "llama3", "mistral", "qwen")
    }


@pytest.mark.parametrize(
    "expression",
    [
        *("m.content", "m['content'] | trim", "m.content.strip()", "m.content ~ eos_token"),
        *("m.content if m.content else '-'", "'a' if m.content is string else m.content"),
        *("messages[loop.index0 - 1].role", "messages | length", "messages[0].content"),
        "messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join",
    ],
)
def test_copying(expression: str) -> None:
    assert judge(LOOP.replace("EXPRESSION", expression))


@pytest.mark.parametrize(
    "expression",
    [
        *("m.content | upper", "m.content.split('b')[-1]", "m.content[:3]", "m.content | length"),
        *("m.content if 'x' in m.content else 'y'", "'x' if m.content == 'a' else m.content"),
        *("m.content | replace('a', 'b')", "m.content.strip(m.content)", "messages | tojson"),
        *("m.get('content')", "m.values() | list", "m | join('')", "m['con' ~ 'tent']", "m[x]"),
        *("(m.content ~ '') | length", "m.content * 2", "m.content % 1", "m.content < 'a'"),
        "messages | map(attribute='content') | map('upper') | join",
        "messages | selectattr('content', 'equalto', 'a') | map(attribute='role') | join",
        "(messages | map(attribute='content') | list)[0]",
    ],
)
def test_looking_inside(expression: str) -> None:
    assert not judge(LOOP.replace("EXPRESSION", expression))


@pytest.mark.parametrize(
    "text",
    [
        "{% set c = messages[0].content %}{% if c | length > 3 %}x{% endif %}",
        "{% for c in messages[0].content %}{{ c }}{% endfor %}",
        "{% for m in messages if m.content != 'a' %}{{ m.content }}{% endfor %}",
        "{% macro f(x) %}{{ x | upper }}{% endmacro %}{{ f(messages[0].content) }}",
        "{% set ns = namespace(t='') %}{% for m in messages %}{{ ns.t | upper }}"
        "{% set ns.t = m.content %}{% endfor %}",
        "{% set d = {'role': messages[0].content} %}{{ d.role | upper }}",
        "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    ],
)
def test_contents_are_followed_through_names(text: str) -> None:
    assert not judge(text)
