"""``response_format``: whatever the model would rather say, the reply is JSON, and of the schema; or it is refused."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import openai
import pytest

from slimtune.serve import guide as guide_module
from tests.serve.conftest import Served

installed = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs the extra: json")
ASKED: list[Any] = [{"role": "user", "content": "Who are you?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "kind": {"enum": ["blue", "red"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["ok", "kind", "n"],
    "additionalProperties": False,
}


def wanted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "made", "schema": schema}}


def ask(served: Served, **options: Any) -> Any:
    options = {"model": "first", "messages": ASKED, "max_tokens": 300, **options}
    return served.client.chat.completions.create(**options).choices[0]


@installed
@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.0, "top_p": 0.1, "seed": 4}])
def test_the_reply_is_of_the_schema(served: Served, drawn: dict[str, Any]) -> None:
    choice = ask(served, response_format=wanted(SCHEMA), **drawn)
    assert choice.finish_reason == "stop"
    made = json.loads(choice.message.content)
    assert made.keys() == {"ok", "kind", "n"}
    assert isinstance(made["ok"], bool)
    assert made["kind"] in ("blue", "red")
    assert isinstance(made["n"], int)
    assert 0 <= made["n"] <= 9


@installed
def test_any_object_and_one_in_a_stream(served: Served) -> None:
    choice = ask(served, response_format={"type": "json_object"}, max_tokens=60)
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    chunks = served.client.chat.completions.create(
        model="first", messages=ASKED, max_tokens=300, response_format=wanted(SCHEMA), stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask(served, response_format=wanted(SCHEMA)).message.content


@installed
def test_log_probabilities_are_the_models_own(served: Served) -> None:
    choice = ask(served, response_format=wanted(SCHEMA), logprobs=True, top_logprobs=2)
    tokens = choice.logprobs.content
    # What the model would rather have said is still the likeliest.
    assert any(token.top_logprobs[0].token != token.token for token in tokens)
    assert all(token.logprob > -1e9 for token in tokens)


@installed
@pytest.mark.parametrize(
    "schema",
    [{"type": "nonsense"}, {"type": "string", "pattern": "("}, {"$ref": "#/nowhere"}, {"type": "object", "not": {}}],
)
def test_a_schema_that_cannot_be_kept_to_is_refused(served: Served, schema: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="response_format"):
        ask(served, response_format=wanted(schema))


def test_without_grammars_it_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_module, "find_spec", lambda name: None)
    for kind in ({"type": "json_object"}, wanted(SCHEMA)):
        with pytest.raises(openai.BadRequestError, match=r"slimtune\[json\]"):
            ask(served, response_format=kind)
    assert ask(served, response_format={"type": "text"}, max_tokens=2).message.content
