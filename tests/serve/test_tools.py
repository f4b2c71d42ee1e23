"""Tool calls as tool clients see them, through the `openai` client: whole, in a stream, and back again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from torch import Tensor, inf

from slimtune.data.calls import call_form
from slimtune.data.render import renderer_for
from slimtune.serve import tools as tools_module
from slimtune.serve.choice import Choice
from slimtune.serve.tools import CallText
from slimtune.use.load import Opened
from tests.serve.conftest import Served

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Say the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
ASKED: list[Any] = [{"role": "user", "content": "How is the weather in Köln and in Bonn?"}]
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
Says = Callable[[str], None]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, models: dict[str, Opened]) -> Says:
    """Puts a reply into the mouth of the model ``first``, token by token; all else is as always."""
    script: list[int] = []
    said: dict[int, int] = {}

    def choose(self: Choice, scores: Tensor) -> None:
        at = said.get(id(self), 0)
        said[id(self)] = at + 1
        scores[script[at]] = inf

    def prepare(text: str) -> None:
        said.clear()
        script[:] = [*models["first"].tokenizer(text)["input_ids"], models["first"].stop_ids[-1]]

    monkeypatch.setattr(Choice, "choose", choose)
    return prepare


def asked(served: Served, **options: Any) -> Any:
    return served.client.chat.completions.create(model="first", messages=ASKED, tools=TOOLS, max_tokens=200, **options)


def test_calls_come_as_tool_calls(served: Served, says: Says) -> None:
    says(f"Let me look.\n{ONE}\n{OTHER}")
    choice = asked(served).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "weather"]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Köln"}, {"city": "Bonn"}]
    assert len({call.id for call in calls}) == 2
    assert all(call.type == "function" and call.id.isalnum() and len(call.id) == 9 for call in calls)


def test_a_call_alone_has_no_content(served: Served, says: Says) -> None:
    says(ONE)
    message = asked(served, parallel_tool_calls=True).choices[0].message
    assert message.content is None
    assert len(message.tool_calls) == 1


def test_one_call_at_most_where_that_was_asked_for(served: Served, says: Says) -> None:
    says(f"{ONE}\n{OTHER}")
    [call] = asked(served, parallel_tool_calls=False).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Köln"}


def test_a_stream_has_the_same_calls_and_no_mark_of_them(served: Served, says: Says) -> None:
    says(f"Let me look: 1 < 2.\n{ONE}\n{OTHER}")
    chunks = list(asked(served, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "Let me look: 1 < 2."
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Köln", "Bonn"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # The openai client's own way of putting a stream together.
    says(f"Let me look: 1 < 2.\n{ONE}\n{OTHER}")
    with served.client.chat.completions.stream(
        model="first", messages=ASKED, tools=TOOLS, max_tokens=200
    ) as stream:  # fmt: skip
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert [call.function.name for call in message.tool_calls] == ["weather", "weather"]


def test_what_is_no_call_stays_text(served: Served, says: Says) -> None:
    for text in ("It rains.", "<tool_call>\nno JSON\n</tool_call>", '{"name": "weather", "arguments": {}}', "a < b"):
        says(text)
        choice = asked(served).choices[0]
        assert (choice.message.content, choice.message.tool_calls) == (text, None)
        assert choice.finish_reason == "stop"
        says(text)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in asked(served, stream=True)) == text
    says(ONE)
    assert asked(served, tool_choice="none").choices[0].message.content == ONE


def test_the_answer_can_be_given_back_with_the_tools_result(
    served: Served, says: Says, models: dict[str, Opened]
) -> None:
    says(ONE)
    message = asked(served).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    says("It rains.")
    reply = served.client.chat.completions.create(
        model="first", messages=[*ASKED, message, result], tools=TOOLS, max_tokens=50
    )
    assert reply.choices[0].message.content == "It rains."
    turns = [*ASKED, message.model_dump(exclude_none=True), result]
    assert reply.usage.prompt_tokens == len(models["first"].prompt_ids(turns, TOOLS))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "isn't among the tools"),
        ({"tools": [*TOOLS, *TOOLS]}, "the same name"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "name"),
        ({"tools": [{"type": "web_search"}]}, "type"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_honoured_is_refused(served: Served, options: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        served.client.chat.completions.create(**{"model": "first", "messages": ASKED, "tools": TOOLS, **options})


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs the extra: json")
def test_a_strict_tools_call_fits_its_schema_or_stays_text(served: Served, says: Says) -> None:
    inner = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["b"]}
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "more": {"$ref": "#/$defs/inner"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"inner": {**inner, "additionalProperties": False}},
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema, "strict": True}}]

    def ask(arguments: str) -> Any:
        says('<tool_call>\n{"name": "weather", "arguments": ' + arguments + "}\n</tool_call>")
        return served.client.chat.completions.create(
            model="first", messages=ASKED, tools=tools, max_tokens=200
        ).choices[0].message  # fmt: skip

    for good in ('{"city": "Köln"}', '{"more": {"b": "x", "a": 1}, "city": "\\"K\\""}'):
        assert json.loads(ask(good).tool_calls[0].function.arguments) == json.loads(good)
    for bad in ("{}", '{"city": 5}', '{"city": "K", "town": "B"}', '{"city": "K", "more": {"a": 1}}'):
        message = ask(bad)
        assert message.tool_calls is None
        assert bad in message.content


LIGHT: Any = {
    "type": "function",
    "function": {
        "name": "light",
        "description": "Set the light",
        "parameters": {
            "type": "object",
            "properties": {
                "colour": {"enum": ["blue", "red"]},
                "level": {"type": "integer", "maximum": 9, "minimum": 0},
            },
            "required": ["colour", "level"],
            "additionalProperties": False,
        },
    },
}
BELL: Any = {"type": "function", "function": {"name": "bell", "description": "Ring it"}}


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs the extra: json")
@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.5, "seed": 5}])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"light", "bell"}),
        *(({"type": "function", "function": {"name": n}}, {n}) for n in ("light", "bell")),
    ],
    ids=["any", "light", "bell"],
)
def test_a_reply_that_must_be_a_call_is_one(
    served: Served, choice: Any, names: set[str], drawn: dict[str, Any]
) -> None:
    asked = {"model": "first", "messages": ASKED, "tools": [LIGHT, BELL], "tool_choice": choice, "max_tokens": 400}
    asked |= {"parallel_tool_calls": False, **drawn}
    made = served.client.chat.completions.create(**asked).choices[0]
    assert (made.finish_reason, made.message.content) == ("tool_calls", None)
    [call] = made.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name in names
    if call.function.name == "bell":
        assert arguments == {}
    else:
        assert arguments.keys() == {"colour", "level"}
        assert arguments["colour"] in ("blue", "red")
        assert arguments["level"] in range(10)
    with served.client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls[0].function.arguments == call.function.arguments


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs the extra: json")
def test_where_calls_must_be_there_may_be_several(served: Served) -> None:
    """Drawn replies; some go on with another call, and what isn't through at the end is left out."""
    counts = set()
    for seed in range(12):
        choice = served.client.chat.completions.create(
            model="first", messages=ASKED, tools=[BELL], tool_choice="required", max_tokens=60, temperature=2, seed=seed
        ).choices[0]
        assert {call.function.name for call in choice.message.tool_calls} == {"bell"}
        counts.add(len(choice.message.tool_calls))
    assert max(counts) > 1


def test_strict_tools_are_refused_without_grammars(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.serve.guide.find_spec", lambda name: None)
    tools: Any = [{"type": "function", "function": {"name": "weather", "strict": True}}]
    with pytest.raises(openai.BadRequestError, match=r"slimtune\[json\]"):
        served.client.chat.completions.create(model="first", messages=ASKED, tools=tools)


def test_tools_are_refused_where_calls_cannot_be_read_back(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools_module, "call_form", lambda write, ends: None)
    served.api._forms["second"]._known.clear()
    with pytest.raises(openai.BadRequestError, match="can't be read back"):
        served.client.chat.completions.create(model="second", messages=ASKED, tools=TOOLS)
    served.api._forms["second"]._known.clear()


@pytest.mark.parametrize("text", ["", "It rains.", f"See:\n\n{ONE}", f"{ONE}\n{OTHER}", "a <tool\n b <tool_call> c"])
def test_pieces_of_any_size_are_the_same_reply(models: dict[str, Opened], text: str) -> None:
    opened = models["first"]
    renderer = renderer_for(opened.tokenizer, opened.found.manner)
    form = call_form(renderer.reply, ["<|im_end|>"])
    assert form is not None
    made = set()
    for size in range(1, 12):
        reading = CallText(form, TOOLS, frozenset())
        shown = "".join(reading.push(text[at : at + size]) for at in range(0, len(text), size))
        rest, calls = reading.end()
        made.add((shown + rest, str(calls)))
    assert len(made) == 1
    read = form.read(text, TOOLS)
    assert made == {(read.text, str(read.calls))}
