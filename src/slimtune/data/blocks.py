"""Messages made of blocks: calls and results as parts of the content (Anthropic, Bedrock, Gemini).

There a call is a part of the assistant's content, and its result a part of the next user turn. Here a call stands in
``tool_calls`` and a result is a turn of its own, as OpenAI has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["has_blocks", "plain_tools", "unfolded"]

Block = Mapping[str, Any]


def has_blocks(turns: Any) -> bool:
    """Whether some turn's content has a call or a result among its parts."""
    return isinstance(turns, list) and any(
        isinstance(turn, Mapping)
        and isinstance(turn.get("content"), list)
        and any(isinstance(part, Mapping) and (_call(part) or _result(part)) for part in turn["content"])
        for turn in turns
    )


def unfolded(turns: Sequence[Any]) -> list[Any]:
    """The turns with their calls and results where OpenAI's messages have them."""
    made: list[Any] = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
            made.append(turn)
            continue
        results = [result for part in content if (result := _result(part)) is not None]
        calls = [call for part in content if (call := _call(part)) is not None]
        rest = [part for part in content if not (_call(part) or _result(part))]
        made += results
        if rest or calls:
            made.append({**turn, "content": rest or "", **({"tool_calls": calls} if calls else {})})
    return made


def plain_tools(tools: Any) -> Any:
    """Anthropic's ``input_schema``, Bedrock's ``toolSpec`` and Gemini's declarations as functions with parameters."""
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        return tools
    made: list[Any] = []
    for tool in tools:
        declared = tool.get("functionDeclarations", tool.get("function_declarations"))
        if isinstance(declared, list):
            made += declared
            continue
        spec = tool.get("toolSpec")
        tool = spec if isinstance(spec, Mapping) else tool
        schema = tool.get("input_schema", tool.get("inputSchema"))
        if not isinstance(schema, Mapping):
            made.append(tool)
            continue
        rest = {key: item for key, item in tool.items() if key not in ("input_schema", "inputSchema", "type")}
        made.append({**rest, "parameters": schema.get("json", schema)})
    return made


def _call(part: Block) -> dict[str, Any] | None:
    if part.get("type") == "tool_use":
        return _function(part.get("name"), part.get("input"), part.get("id"))
    if isinstance(used := part.get("toolUse"), Mapping):
        return _function(used.get("name"), used.get("input"), used.get("toolUseId"))
    if isinstance(asked := part.get("functionCall", part.get("function_call")), Mapping):
        return _function(asked.get("name"), asked.get("args"), None)
    return None


def _function(name: Any, arguments: Any, identity: Any) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(part: Block) -> dict[str, Any] | None:
    if part.get("type") == "tool_result":
        return {"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": _said(part.get("content"))}
    if isinstance(found := part.get("toolResult"), Mapping):
        return {"role": "tool", "tool_call_id": found.get("toolUseId"), "content": _said(found.get("content"))}
    if isinstance(answered := part.get("functionResponse", part.get("function_response")), Mapping):
        return {"role": "tool", "name": answered.get("name"), "content": _said(answered.get("response"))}
    return None


def _said(content: Any) -> Any:
    """A result's content: text or parts of it; an object (Gemini's response, Bedrock's json) as JSON text."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping) and "json" in content[0]:
        content = content[0]["json"]
    if isinstance(content, Mapping):
        return json.dumps(content, ensure_ascii=False)
    return "" if content is None else content
