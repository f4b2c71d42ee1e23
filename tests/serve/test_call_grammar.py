"""The grammars of calls, held against what each template itself writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimtune.data.calls import Call
from slimtune.serve.call_grammar import CannotSpell, call_grammar
from tests.data.judge import as_loaded, tokenizer_for
from tests.data.test_calls import FORMS, TOOLS, form, renderer, written

llguidance = pytest.importorskip("llguidance", reason="needs the extra: json")
PARAMETERS: dict[str, Any] = TOOLS[0]["function"]["parameters"]
# Their calls are a name and then arguments, in JSON or between marks; the others' have a notation of their own.
SPELLED = [file for file in FORMS if file.stem not in ("lfm2_2_5", "gemma4")]
CALLS = [
    Call("get_weather", {"city": "Köln"}),
    Call("get_weather", {"city": "two\nlines, {braces} and \"quotes\" < 'those'", "days": 3}),
    Call("get_weather", {"days": -2, "exact": True, "zip": "01234"}),
    Call("get_weather", {}),
]


def takes(file: Path, text: str, parameters: dict[str, Any] = PARAMETERS, *, several: bool = False) -> bool:
    frame = form(file).frame()
    assert frame is not None
    tokenizer = as_loaded(tokenizer_for(file.read_text("utf-8")))
    known = llguidance.LLTokenizer(tokenizer.backend_tokenizer.to_str(), eos_token=sorted(renderer(file).end_ids))
    added = tokenizer.added_tokens_decoder
    control = {mark.content: token for token, mark in added.items() if known.is_special_token(token)}
    grammar = call_grammar(frame, {"get_weather": parameters}, control, {}, several)
    assert llguidance.LLMatcher.validate_grammar_with_warnings(grammar, known) == (False, [])
    matcher = llguidance.LLMatcher(known, grammar, log_level=0)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize("file", SPELLED, ids=lambda file: file.stem)
def test_what_the_template_writes_is_taken_and_nothing_else(file: Path) -> None:
    for call in CALLS:
        assert takes(file, text := written(file, [call]))
        assert not takes(file, text.replace("get_weather", "get_news"))
        assert not takes(file, text[: len(text) // 2])
    assert not takes(file, "It rains.")
    needed = {**PARAMETERS, "required": ["days"]}
    assert [takes(file, written(file, [call]), needed) for call in CALLS] == ["days" in c.arguments for c in CALLS]
    wrong = Call("get_weather", {"days": "three"})
    assert not takes(file, written(file, [wrong]))


@pytest.mark.parametrize("name", ["qwen2_5", "glm4moe", "qwen3_5_think", "mistral-tools", "thought-parts"])
def test_several_calls_are_taken_where_there_may_be_several(name: str) -> None:
    [file] = [file for file in FORMS if file.stem == name]
    text = written(file, CALLS)
    assert takes(file, text, several=True)
    assert not takes(file, text)


@pytest.mark.parametrize("name", ["lfm2_2_5", "gemma4"])
def test_another_notation_has_no_frame(name: str) -> None:
    [file] = [file for file in FORMS if file.stem == name]
    assert form(file).frame() is None


def test_between_marks_what_cannot_be_kept_to_is_refused() -> None:
    [file] = [file for file in FORMS if file.stem == "qwen3_5_think"]
    of_city: Any
    for of_city in (
        {"type": "string", "pattern": "a*"},
        {"type": "string", "enum": ["a", "b\n</parameter>"]},
        {"type": "string", "enum": [5]},
        {"type": "string", "enum": "ab"},
        {"type": "string", "enum": []},
    ):
        with pytest.raises(CannotSpell):
            takes(file, "", {"type": "object", "properties": {"city": of_city}})
    for schema in (
        {"anyOf": []},
        {"properties": {"a>": {}}},
        {"properties": {" a": {}}},
        {"properties": ["a"]},
        {"required": [5]},
        {"required": "ab"},
    ):
        with pytest.raises(CannotSpell):
            takes(file, "", {"type": "object", **schema})
    enum = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Bonn", "Köln"]}}}
    assert [takes(file, written(file, [Call("get_weather", {"city": c})]), enum) for c in ("Köln", "Ulm")] == [
        True,
        False,
    ]


def test_a_clients_words_are_never_the_templates() -> None:
    [file] = [file for file in FORMS if file.stem == "glm4moe"]
    control = next(iter(renderer(file).encoder.controls))
    schema = {"type": "object", "properties": {control: {"type": "integer"}, '\0" | "x': {}}, "required": [control]}
    frame = form(file).frame()
    assert frame is not None
    grammar = call_grammar(frame, {"get_weather": schema}, {control: 77777}, {}, False)
    assert json.dumps(control) in grammar
    assert "77777" not in grammar
