"""Chat templates: as Transformers renders them, and bounded in time, size and reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
import trl
from transformers import PreTrainedTokenizerBase

from slimtune.data.template import ChatTemplate, TemplateRefused

MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell."},
]
PUBLISHED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_templates_render_as_in_transformers(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = path.read_text(encoding="utf-8")
    try:
        expected = tokenizer.apply_chat_template(MESSAGES, chat_template=source, tokenize=False)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's template raises
        with pytest.raises(TemplateRefused, match=str(error)):
            ChatTemplate(source, tokenizer.special_tokens_map).render(MESSAGES, None, add_generation_prompt=False)
    else:
        made = ChatTemplate(source, tokenizer.special_tokens_map)
        assert made.render(MESSAGES, None, add_generation_prompt=False) == expected


GROW = "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}CHANGE{% endfor %}{{ n.s }}"
HOSTILE = {
    "product": "{{ 'a' * 10**9 }}",
    "list product": "{{ [0] * 10**9 }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "joining": GROW.replace("CHANGE", "{% set n.s = n.s ~ n.s %}"),
    "adding": GROW.replace("CHANGE", "{% set n.s = n.s + n.s %}"),
    "adding up": GROW.replace("CHANGE", "{% set n.s = n.s + n.s + n.s %}"),
    "capturing": GROW.replace("CHANGE", "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}"),
    "center": "{{ 'a'.center(10**9) }}",
    "center filter": "{{ 'a'|center(1000000000) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (99999999, 1) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 999999999) }}",
    "join": "{{ range(99999)|map('string')|join('a' * 99999) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "indent": "{{ ('a\n' * 40000)|indent('b' * 99999) }}",
    "power": "{{ 9 ** 999999999 }}",
    "powers of powers": "{% set n = namespace(x=9) %}"
    "{% for i in range(64) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "tojson indent": "{{ [1]|tojson(indent=999999999) }}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "namespace internals": "{% set n = namespace(__class__=1) %}",
    "changing what it was given": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "no template": "{% for %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str) -> None:
    with pytest.raises(TemplateRefused):
        ChatTemplate(HOSTILE[name], {}).render(MESSAGES, None, add_generation_prompt=False)


SUMS = (
    "'a' + 'b' + 'c'",
    "'a' + ('b' + ('c' + 'd')) + 'e'",
    "1 + 2.5 + 3",
    "[1] + [2] + [3, 'x']",
    "'a' + (1 + 2 + 3)|string + 'b' ~ 'c' + 'd' + 'e'",
    "(1 + 2 + 3) * 2 - 1 + 4 + 5",
    "m.content + '\\n' + m.role|upper + m.content[:1]",
    "('<b>'|safe) + '<i>' + '&'",
    "'<i>' + ('<b>'|safe) + '&'",
    "'a' + 'b' + 1",
    "'a' + none + m.missing",
    "m.missing + 'a' + 'b'",
)


@pytest.mark.parametrize("source", SUMS)
def test_sums_are_jinjas(source: str) -> None:
    def made(render: Callable[[], str]) -> str:
        try:
            return render()
        except (TypeError, jinja2.UndefinedError, TemplateRefused) as error:
            return f"refused: {error}"

    text = f"{{% set m = messages[0] %}}{{{{ {source} }}}}"
    ours = made(lambda: ChatTemplate(text, {}).render(MESSAGES, None, add_generation_prompt=False))
    plain = made(lambda: jinja2.Environment().from_string(text).render(messages=MESSAGES))
    assert ours == plain or (plain.startswith("refused: ") and plain.removeprefix("refused: ") in ours)


def test_a_template_that_raises_says_what_it_says() -> None:
    template = ChatTemplate("{{ raise_exception('only on Sundays') }}", {})
    with pytest.raises(TemplateRefused, match=r"^only on Sundays$"):
        template.render(MESSAGES, None, add_generation_prompt=True)
