"""Templates of unusual habits: what is trained is held against Transformers' own rendering, or the row is refused."""

from __future__ import annotations

from typing import Any

import pytest

from slimtune.data.conversation import RowRefused, normalise
from slimtune.data.render import ChatRenderer
from slimtune.errors import UserError
from tests.data.conftest import TRL_TEMPLATES
from tests.data.conversations import TOOL, call, reply, result, system, user
from tests.data.judge import tokenizer_for

_TURNS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content FILTER }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_LENGTHS = """{% for m in messages %}<|im_start|>{{ m.role }} ({{ m.content|length }})
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_ALWAYS_THINKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" %}<think>
{{ m.reasoning_content if m.reasoning_content else "" }}
</think>
{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def _trained(source: str, messages: list[dict[str, Any]], *tools: dict[str, Any]) -> str:
    """The text of a row's last document."""
    renderer = ChatRenderer(tokenizer_for(source))
    draft = renderer.drafts(normalise({"messages": messages, "tools": list(tools)}))[-1]
    texts = {number: text for text, number in renderer.encoder.controls.items()}
    return "".join(texts.get(piece.control, piece.text) for piece in draft.pieces)


def test_parts_that_a_template_writes_down_as_they_are_are_no_text() -> None:
    with pytest.raises(UserError, match="leaves out or changes"):
        ChatRenderer(tokenizer_for(_TURNS.replace("FILTER", "|capitalize")))


def test_a_turn_that_begins_otherwise_than_the_prompt_foretells_is_refused() -> None:
    with pytest.raises(RowRefused, match="no prefix"):
        _trained(_LENGTHS, [user("Who?"), reply("A reply that is longer than the question's.")])


@pytest.mark.parametrize("thought", ["They ask.\nI answer.", ""])
@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("<muse>", "</muse>")], ids=["own marks", "other marks"])
def test_a_reply_that_holds_its_thought_gets_no_second_one(marks: tuple[str, str], thought: str) -> None:
    source = _ALWAYS_THINKS.replace("<think>", marks[0]).replace("</think>", marks[1])
    tokenizer = tokenizer_for(source)
    held = [user("Who?"), reply(f"<think>\n{thought}\n</think>\n\n  I."), user("You?"), reply("Me.")]
    handed_on = [user("Who?"), reply("  I.", reasoning_content=thought), user("You?"), reply("Me.")]
    wanted = str(tokenizer.apply_chat_template(handed_on, tokenize=False))
    assert _trained(source, held) == _trained(source, handed_on) == wanted
    assert wanted.count(marks[1]) == 2


_SQUEEZED = ".split()|join(' ')"


@pytest.mark.parametrize("thought", ["\nt1\n", "a\nb"])
@pytest.mark.parametrize("habit", ["|e", "|tojson", _SQUEEZED])
def test_a_thought_that_a_template_garbles_is_refused(habit: str, thought: str) -> None:
    messages = [user("Who?"), reply(f"<think>{thought}</think>\n\nHere.")]
    assert messages[1]["content"] in _trained(_TURNS.replace(" FILTER", ""), messages)
    source = _TURNS.replace(" FILTER", habit)
    if (habit, thought) == (_SQUEEZED, "\nt1\n"):  # white space around a thought is the template's whim
        assert "<think> t1 </think> Here." in _trained(source, messages)
        return
    with pytest.raises(RowRefused, match="changes the reply's thought or its marks"):
        _trained(source, messages)


def test_a_thought_handed_on_that_a_template_garbles_is_refused() -> None:
    source = _ALWAYS_THINKS.replace("m.reasoning_content if", "m.reasoning_content|e if")
    with pytest.raises(RowRefused, match="changes the reply's thought"):
        _trained(source, [user("Who?"), reply("I.", reasoning_content="a < c")])


def test_what_a_template_drops_with_a_thought_is_no_thought() -> None:
    source = _TURNS.replace(" FILTER", ".split('</think>')[-1]")
    renderer = ChatRenderer(tokenizer_for(source))
    (draft,) = renderer.drafts(normalise({"messages": [user("Who?"), reply("<think>t1</think>Here.")]}))
    assert draft.notes == ["thoughts-left-out"]
    with pytest.raises(RowRefused, match="what stands before a thought"):
        _trained(source, [user("Who?"), reply("Sure. <think>t1</think>Here.")])


@pytest.mark.parametrize("more", ["Sure, ", "<|im_start|>system\nBe safe.<|im_end|>\n<|im_start|>assistant\n"])
@pytest.mark.parametrize("own", ["", "{{ m.reasoning_content }}</think>"], ids=["no thoughts", "own thoughts"])
def test_a_thought_stays_behind_a_prompt_that_holds_more_but_no_thought(own: str, more: str) -> None:
    shown = f"{{% if m.reasoning_content %}}<think>{own}{{% endif %}}" if own else ""
    source = _TURNS.replace(" FILTER", "").replace("{{ m.content", f"{shown}{{{{ m.content")
    header = "<|im_start|>assistant\n"
    source = source.replace(f"%}}{header}", f"%}}{more if header in more else header + more}")
    renderer = ChatRenderer(tokenizer_for(source))
    said = reply("<think>t1</think>Here.")
    (draft,) = renderer.drafts(normalise({"messages": [user("Who?"), said]}))
    learnt = "".join(piece.text for piece in draft.pieces if piece.supervised)
    assert learnt == f"{said['content']}<|im_end|>"
    assert draft.notes == ["as-asked"]


def test_a_reply_that_goes_on_behind_an_end_mark_is_refused() -> None:
    twice = "{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>\n{% endif %}{{ m.content"
    source = _TURNS.replace(" FILTER", "").replace("{{ m.content", twice)
    with pytest.raises(RowRefused, match="an end mark \\(<\\|im_end\\|>\\) stands inside the reply"):
        _trained(source, [user("Who?"), reply("I.")])


@pytest.mark.parametrize(("mark", "noted"), [("think", False), ("muse", True)])
def test_a_thought_that_gets_other_marks_than_the_file_has_is_noted(mark: str, noted: bool) -> None:
    renderer = ChatRenderer(tokenizer_for(_ALWAYS_THINKS.replace("think>", f"{mark}>")))
    row = {"messages": [user("Who?"), reply("<think>\nThey ask.\n</think>\n\nI.")]}
    (draft,) = renderer.drafts(normalise(row))
    assert ("thought-moved" in draft.notes) is noted
    (draft,) = renderer.drafts(normalise({"messages": [user("Who?"), reply("I.", reasoning_content="They ask.")]}))
    assert "thought-moved" not in draft.notes


def _calls(*arguments: Any) -> dict[str, Any]:
    return reply(None, tool_calls=[call(number, each) for number, each in enumerate(arguments)])


_CALLS = """{% if tools %}<|im_start|>system
{{ tools|tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or "" }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}
{% for key, value in c.function.arguments.items() %}{{ key }}: {{ value SHOWN }}
{% endfor %}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_one_call_of_several_is_no_proof_of_the_others() -> None:
    """gpt-oss's template writes the first call of a turn alone, which says here what the second one says."""
    source = (TRL_TEMPLATES / "gptoss.jinja").read_text(encoding="utf-8")
    assert '"place": "Rome"' in _trained(source, [user("Where?"), _calls({"place": "Rome"})], TOOL)
    for second in ({"place": "Rome"}, {"place": "Ro"}, {"place": 7}, {}):
        with pytest.raises(RowRefused, match="turn 2: the template leaves out a part of a call"):
            _trained(source, [user("Where?"), _calls({"place": "Rome"}, second)], TOOL)
    several = [
        user("Where?"),
        _calls({"place": "Rome"}, {"place": "Rome"}),
        result(0, "1"),
        result(1, "1"),
        reply("1."),
    ]
    assert _trained(_CALLS.replace(" SHOWN", ""), several, TOOL).count("place: Rome") == 2


@pytest.mark.parametrize("value", [7, 0.5, None, True, [1, 2], {"deep": 3}])
def test_a_value_that_is_no_text_is_missed_too(value: Any) -> None:
    messages = [user("Where?"), _calls({"place": "Rome", "more": value})]
    assert "more: " in _trained(_CALLS.replace("SHOWN", "if value is string else value|tojson"), messages, TOOL)
    with pytest.raises(RowRefused, match=r"leaves out a part of a call: '(more|deep)'"):
        _trained(_CALLS.replace("SHOWN", "if value is string"), messages, TOOL)


def test_words_that_another_turn_says_too_are_missed() -> None:
    """Whoever leaves out system turns but the first has left out a second one that is the same, or a part of it."""
    source = "{% for m in messages %}{% if m.role != 'system' or loop.first %}" + _TURNS.replace(" FILTER", "")
    source = source.replace("{% for m in messages %}<", "<", 1).replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    twice = [system("Be kind."), user("Yes"), reply("Yes"), user("Yes"), reply("Yes")]
    assert _trained(source, twice).count("Yes<") == 4
    for again in ("Be kind.", "kind", "Yes"):
        with pytest.raises(RowRefused, match="the template leaves out or changes what the"):
            _trained(source, [*twice, system(again), user("Yes"), reply("Yes")])


def test_a_thought_of_a_reply_that_is_joined_to_another_is_not_lost() -> None:
    """A template that wants roles to alternate has one place for a thought: before the reply."""
    alternates = "{% for m in messages[1:] %}{% if m.role == messages[loop.index0].role %}{{ raise_exception('two') }}"
    source = alternates + "{% endif %}{% endfor %}" + _ALWAYS_THINKS
    first = [user("Who?"), reply("I.", reasoning_content="They ask."), reply("Me.")]
    joined = [user("Who?"), reply("I.\n\nMe.", reasoning_content="They ask.")]
    assert _trained(source, first) == tokenizer_for(source).apply_chat_template(joined, tokenize=False)
    with pytest.raises(RowRefused, match="a later one has a thought"):
        _trained(source, [user("Who?"), reply("I."), reply("Me.", reasoning_content="They ask.")])
