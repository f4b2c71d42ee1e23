"""Fields that clients rely on: honoured, or refused with 400; nothing is ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slimtune.serve.limits import Limits
from slimtune.serve.protocol import ChatRequest, CompletionRequest, Request, read
from slimtune.serve.refusal import Refusal

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def made(fields: dict[str, Any], kind: type[Request] = ChatRequest) -> Request:
    return read(kind, json.dumps({**CHAT, **fields}).encode(), Limits())


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_logprobs": 2}, "top_logprobs goes with logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs goes with logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options goes with stream"),
        ({"stream": True, "stream_options": {"unknown": True}}, "stream_options.unknown"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"tool_choice": "auto"}, "tool_choice goes with tools"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls goes with tools"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens is the old name"),
        ({"temperature": 1e-320}, "temperature is 0 or at least"),
        ({"temperature": 1e-7}, "temperature is 0 or at least"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 1e-320}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": True}, "top_p"),
        ({"seed": False}, "seed"),
        ({"n": True}, "n"),
        ({"max_tokens": True}, "max_tokens"),
        ({"frequency_penalty": False}, "frequency_penalty"),
        ({"logprobs": 1}, "logprobs"),
        ({"stream": 1}, "stream"),
        (turns({"role": "user", "content": "?", "name": "Ann"}), r"\"messages\[0\]\.name\""),
        (turns({"role": "user", "content": "?", "mood": "glad"}), r"\"messages\[0\]\.mood\""),
        (turns({"role": "user", "content": [{"type": "text", "text": "?", "size": 2}]}), "size"),
        (turns({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}), "content"),
        (turns({"role": "function", "name": "f", "content": "?"}), "role"),
        (
            turns({"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": ""}}),
            "function_call",
        ),
        (turns({"role": "tool", "content": "12"}), r"^messages\[0\]\.tool_call_id: "),
        (turns({"role": "user", "content": None}), r"^messages\[0\]\.content: "),
        (turns({"role": "user", "content": [{"type": "video"}]}), r"^messages\[0\]\.content\[0\]\.type: "),
        ({"stop": list("abcde")}, "^stop: List should have at most 4 items"),
        ({"stop": ["a", ""]}, r"^stop\[1\]: String should have at least 1 character"),
        ({"tool_choice": {"type": "function"}, "tools": []}, r"^tool_choice\.function: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_honoured_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words) as refused:
        made(fields)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "n": 1, "logit_bias": {}},
        {"temperature": 1e-6, "top_p": 1e-6},
        {"logprobs": True, "top_logprobs": 0},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True},
        {"max_tokens": 3, "max_completion_tokens": 3},
        dict.fromkeys(("temperature", "stop", "stream", "stream_options", "tools", "tool_choice", "logprobs")),
        turns({"role": "developer", "content": "Brief."}, {"role": "user", "content": [{"type": "text", "text": "?"}]}),
        # As clients give an answer back to us.
        turns(
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "!", "refusal": None, "annotations": [], "audio": None,
             "function_call": None, "tool_calls": None},
            {"role": "user", "content": "?"},
        ),
        turns(
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
            {"role": "tool", "content": "rain", "tool_call_id": "1"},
        ),
    ],
)  # fmt: skip
def test_what_says_nothing_more_is_taken(fields: dict[str, Any]) -> None:
    assert made(fields).messages


def test_completions_are_as_strict() -> None:
    for prompt in ([True, 1], [1.0], [-1], [], ["a", "b"]):
        with pytest.raises(Refusal):
            read(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode(), Limits())
    assert read(CompletionRequest, b'{"model": "m", "prompt": [3]}', Limits()).prompt == [3]
