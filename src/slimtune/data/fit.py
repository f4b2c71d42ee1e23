"""Messages in the form that a template takes: how it wants calls, thoughts and content, and what is done where it has
no place for them."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any, Literal

from slimtune.data.conversation import SYSTEM_ROLES, Message, RowRefused

__all__ = [
    "CallStyle",
    "ThoughtStyle",
    "call_as_text",
    "inner_text",
    "merged",
    "same_in_a_row",
    "system_into_user",
    "systems_joined",
    "tools_as_text",
    "with_calls",
    "with_parts",
    "with_thought",
]

ThoughtStyle = Literal["keys", "all keys", "parts", "nested parts"]
"""How a template takes a thought: under ``reasoning_content`` and ``thinking``, as Transformers hands it on, or under
``reasoning``, too (Solar Open); as a part
of type ``thinking`` in the content, with its text plain or as a list of parts (Mistral's)."""


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a template takes tool calls: content empty or left away, arguments as an object or as JSON text."""

    no_content: bool
    text_arguments: bool


def with_calls(message: Message, style: CallStyle) -> Message:
    """A message whose calls are written as ``style`` says."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    if style.text_arguments:
        calls = [{**call, "function": _with_text_arguments(call["function"])} for call in calls]
    made = {**message, "tool_calls": calls}
    if style.no_content and not message["content"]:
        del made["content"]
    return made


def _with_text_arguments(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def with_thought(message: Message, style: ThoughtStyle) -> Message:
    """A message whose thought is handed on as ``style`` says."""
    thought = message.get("reasoning_content")
    if not thought:
        return message
    if style == "keys":
        return {**message, "thinking": thought}
    if style == "all keys":
        return {**message, "thinking": thought, "reasoning": thought}
    inner = thought if style == "parts" else [{"type": "text", "text": thought}]
    parts: list[dict[str, Any]] = [{"type": "thinking", "thinking": inner}]
    if message.get("content"):
        parts.append({"type": "text", "text": message["content"]})
    return {**{key: value for key, value in message.items() if key != "reasoning_content"}, "content": parts}


def with_parts(message: Message) -> Message:
    """A message whose content is a list of parts, as the templates of models that also see want it."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def call_as_text(message: Message) -> Message:
    """Calls and results as the text of the turn, in the form that most models without a form of their own know."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    made = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = (json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"])
    texts = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    made["content"] = "\n".join([message["content"], *texts] if message["content"] else texts)
    return made


def tools_as_text(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """The tools as a part of the system turn."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"You can call these functions:\n<tools>\n{listed}\n</tools>\n"
        "To call one, reply with its name and arguments as JSON:\n"
        '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
    )
    if messages and messages[0]["role"] in SYSTEM_ROLES:
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def system_into_user(messages: list[Message]) -> list[Message]:
    """The system turn's text before the first user turn's."""
    system, *rest = messages
    at = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if at is None:
        return [{"role": "user", "content": system["content"]}, *rest]
    joined = {**rest[at], "content": f"{system['content']}\n\n{rest[at]['content']}"}
    return [*rest[:at], joined, *rest[at + 1 :]]


def systems_joined(messages: list[Message]) -> list[Message]:
    """All the system turns that the conversation begins with as one."""
    heads = list(itertools.takewhile(lambda message: message["role"] in SYSTEM_ROLES, messages))
    text = "\n\n".join(message["content"] for message in heads)
    return [{**heads[0], "role": "system", "content": text}, *messages[len(heads) :]]


def same_in_a_row(messages: list[Message]) -> bool:
    """Whether the user or the assistant has two turns in a row."""
    roles = [message["role"] for message in messages]
    return any(a == b and a in ("user", "assistant") for a, b in itertools.pairwise(roles))


def merged(messages: list[Message]) -> list[Message]:
    """Turns of the same role in a row as one.

    Raises:
        RowRefused: One reply of a row of replies is to be learnt and another isn't, or a later one has a thought.
    """
    made: list[Message] = []
    for message in messages:
        same = made and made[-1]["role"] == message["role"] and message["role"] in ("user", "assistant")
        if same and "tool_calls" not in message and "tool_calls" not in made[-1]:
            if made[-1].get("supervised", True) != message.get("supervised", True):
                raise RowRefused("", "replies in a row of which one is learnt and one isn't", "weight")
            if message.get("reasoning_content"):
                raise RowRefused("", "replies in a row to be joined, and a later one has a thought", "order")
            made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n\n{message['content']}"}
        else:
            made.append(message)
    return made


def inner_text(parts: list[dict[str, Any]], kind: str) -> str:
    """The text of a message's parts of one kind, nested ones with it."""
    texts = [part[kind] for part in parts if part["type"] == kind]
    return "".join(text if isinstance(text, str) else inner_text(text, "text") for text in texts)
