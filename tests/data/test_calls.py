"""Calls come back from what each template writes, whatever they hold; what is no call stays text."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl

from slimtune.data.calls import Call, CallForm, Read, call_form
from slimtune.data.render import ChatRenderer
from tests.data.judge import as_loaded, tokenizer_for

HERE = Path(__file__).parent / "templates"
THEIRS = Path(trl.__file__).parent / "chat_templates"
# One of each way of writing calls; all that TRL ships and that are kept here were tried when this was written.
FORMS = [
    THEIRS / "qwen2_5.jinja", THEIRS / "llama3_1.jinja", THEIRS / "glm4moe.jinja", THEIRS / "qwen3_5_think.jinja",
    THEIRS / "lfm2_2_5.jinja", THEIRS / "gemma4.jinja", THEIRS / "gptoss.jinja", THEIRS / "gemma3.jinja",
    HERE / "mistral-tools.jinja", HERE / "kinds" / "thought-parts.jinja", HERE / "kinds" / "other-close.jinja",
]  # fmt: skip
# It writes quotes inside of quotes as they are: nobody can read that back, and it stays text.
AMBIGUOUS = {"lfm2_2_5"}
UNKNOWN = [THEIRS / "muse_glimmer.jinja"]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Say the weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where"},
                    "days": {"type": "integer", "description": "How many"},
                    "exact": {"type": "boolean", "description": "Whether"},
                    "zip": {"type": "string", "description": "Code"},
                },
            },
        },
    },
]
CALLS = [
    Call("get_weather", {"city": "Köln"}),
    Call("get_weather", {"city": "two\nlines, {braces} and \"quotes\" and 'those'", "days": 3}),
    Call("get_weather", {"zip": "01234", "exact": True, "days": -2}),
    Call("get_weather", {"city": " 北京 "}),
    Call("get_weather", {}),
    Call("get_weather", {"city": "K", "more": {"list": [1, "two, {three}", {"four": False}], "none": {}}}),
]


@cache
def renderer(file: Path) -> ChatRenderer:
    return ChatRenderer(as_loaded(tokenizer_for(file.read_text("utf-8"))))


def ends(file: Path) -> list[str]:
    marks = renderer(file).encoder.controls
    return [mark for mark, token in marks.items() if token in renderer(file).end_ids]


def form(file: Path) -> CallForm:
    made = call_form(renderer(file).reply, ends(file))
    assert made is not None
    return made


def written(file: Path, calls: list[Call]) -> str:
    """What the template writes, through a question and an answer with these calls."""
    made = [
        {"id": f"call0000{at}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for at, call in enumerate(calls)
    ]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": made}]
    text = renderer(file).reply(messages, TOOLS)
    return next((text.removesuffix(end) for end in ends(file) if text.endswith(end)), text)


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_each_templates_calls_are_read_back(file: Path) -> None:
    for call in CALLS:
        if file.stem in AMBIGUOUS and "quotes" in str(call):
            continue
        read = form(file).read(written(file, [call]), TOOLS)
        assert read.calls == [call]
        assert "get_weather" not in read.text


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_text_without_calls_stays_as_it_is(file: Path) -> None:
    whole = written(file, CALLS[1:2])
    broken = whole[: whole.index("get_weather") + 4]
    broken = broken.replace("<think></think>", "")
    for text in ("It rains.", "", "Is 3 < 4? {\"a\": 1}", '{"city": "Köln"}', broken):  # fmt: skip
        read = form(file).read(text, TOOLS)
        assert (read.text, read.calls) == (text, [])


@pytest.mark.parametrize("name", ["qwen2_5", "glm4moe", "qwen3_5_think", "lfm2_2_5", "gemma4"])
def test_several_calls_and_the_text_before_them(name: str) -> None:
    file = THEIRS / f"{name}.jinja"
    calls = [call for call in CALLS if name not in AMBIGUOUS or "quotes" not in str(call)]
    read = form(file).read("Let me see.\n\n" + written(file, calls).lstrip(), TOOLS)
    assert read.calls == calls
    assert read.text.replace("<think>", "").replace("</think>", "").strip() == "Let me see."


def test_a_reply_that_is_cut_keeps_its_whole_calls() -> None:
    file = THEIRS / "qwen2_5.jinja"
    whole = written(file, CALLS[:2])
    read = form(file).read(whole[: whole.index("two") + 1], TOOLS)
    assert read.calls == CALLS[:1]


def test_a_value_has_the_type_that_its_schema_says() -> None:
    """Where values stand as text: a number for a string stays one, and one that fits no type stays text."""
    file = THEIRS / "glm4moe.jinja"
    text = written(file, [Call("get_weather", {"zip": "01234", "days": "many", "unknown": 5})])
    assert form(file).read(text, TOOLS).calls == [Call("get_weather", {"zip": "01234", "days": "many", "unknown": 5})]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "get_weather", "arguments": {"days": NaN}}\n</tool_call>'),
        ("qwen2_5", '<tool_call>\n{"name": "get_weather", "arguments": {"days": 1e999}}\n</tool_call>'),
        ("qwen2_5", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "\\ud800"}}\n</tool_call>'),
        ("lfm2_2_5", "<|tool_call_start|>[get_weather(city=1+2j)]<|tool_call_end|>"),
        ("lfm2_2_5", "<|tool_call_start|>[get_weather(city=b'K')]<|tool_call_end|>"),
        ("lfm2_2_5", "<|tool_call_start|>[get_weather(city={1, 2})]<|tool_call_end|>"),
        ("lfm2_2_5", '<|tool_call_start|>[get_weather(**{"city": "K"})]<|tool_call_end|>'),
        ("lfm2_2_5", f"<|tool_call_start|>[get_weather(days={'-' * 900}1)]<|tool_call_end|>"),
        # Each bracket might be the end: read from the start for each, this took ten seconds.
        ("lfm2_2_5", f"<|tool_call_start|>[get_weather({'days=1,' * 1500}city={')' * 2000}"),
    ],
)
def test_arguments_that_json_cannot_hold_are_no_call(name: str, text: str) -> None:
    assert form(THEIRS / f"{name}.jinja").read(text, TOOLS) == Read(text, [])


@pytest.mark.parametrize("file", UNKNOWN, ids=lambda file: file.stem)
def test_a_form_that_is_not_known_is_not_guessed(file: Path) -> None:
    assert call_form(renderer(file).reply, ends(file)) is None
