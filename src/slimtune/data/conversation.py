"""One normal form for every shape of row: messages in OpenAI's keys, the tools, and what was repaired on the way.

Shapes are detected from the row's keys or named by the person. A row that breaks a rule raises :class:`RowRefused` with
the field and the rule; a row that a named rule can mend is mended and the rule's name is counted. Nothing is guessed
from the text itself.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "NONCHARACTER",
    "REPAIRS",
    "SHAPES",
    "Conversation",
    "Message",
    "RowRefused",
    "detect_shape",
    "normalise",
    "read_messages",
    "read_tools",
]

Message = dict[str, Any]
"""role, content, and where present reasoning_content, tool_calls, tool_call_id, name."""

SHAPES: dict[str, str] = {
    "alpaca": "instruction, input, output, system, history",
    "sharegpt": "conversations of from and value, system, tools",
    "messages": "messages of role and content, tools",
    "prompt-completion": "prompt and completion, as text or messages",
    "text": "text",
}
"""Each shape that is read, with the columns that make it up."""

REPAIRS: dict[str, str] = {
    "leading-reply": "replies before the first user turn were left out",
    "trailing-turns": "turns after the last reply were left out: nothing answers them",
    "noncharacter": "the noncharacter U+FDD0, which no text should hold, was taken out",
    "system-into-user": "the template has no system turn: the system text was put before the first user turn",
    "merged-turns": "the template wants user and assistant to alternate: turns of one role in a row were joined",
    "tools-as-text": "the template has no place for tools: tools, calls and results were written as text",
    "cut-left": "the start of the first user turn was cut to fit into max_length (overlong: keep-end)",
    "oldest-dropped": "the oldest exchanges were left out to fit into max_length (overlong: keep-end)",
    "split": "the conversation was split into several (overlong: split)",
}
"""Each rule that may change a row, and what it does."""

_ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "developer": "system", "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip

NONCHARACTER = "\ufdd0"
"""What the renderer marks text with; it is taken out of what people write."""


class RowRefused(Exception):
    """A row can't be trained on: the field, the rule it breaks, and the rule's short name."""

    def __init__(self, field: str, rule: str, name: str = "shape") -> None:
        self.field, self.rule, self.name = field, rule, name
        super().__init__(f"{field}: {rule}" if field else rule)


@dataclass(slots=True)
class Conversation:
    """A row in normal form.

    ``text`` is set for raw text; else ``messages`` holds the turns. ``rendered`` text comes from a program, which means
    the control tokens that it writes.
    """

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    text: str | None = None
    rendered: bool = False
    completion_from: int = 0
    """Index of the first message that belongs to the completion (prompt-completion rows), else 0."""
    repairs: list[str] = field(default_factory=list)


def detect_shape(value: Mapping[str, Any]) -> str | None:
    """The shape that a row's keys make up, or None."""
    keys = value.keys()
    if "messages" in keys and not _is_sharegpt(value["messages"]):
        return "messages"
    if "conversations" in keys or "conversation" in keys or "messages" in keys:
        return "sharegpt"
    if "prompt" in keys and "completion" in keys:
        return "prompt-completion"
    if "instruction" in keys and "output" in keys:
        return "alpaca"
    if "text" in keys:
        return "text"
    return None


def _is_sharegpt(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "from" in first and "role" not in first


def apply_map(value: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The row under the fields' names: ``mapping`` is field to column.

    Raises:
        RowRefused: The row lacks a column that is mapped.
    """
    made = {key: item for key, item in value.items() if key not in mapping.values()}
    for target, column in mapping.items():
        if column not in value:
            raise RowRefused(column, f"the row has no such column; it has {_listed(value)}")
        made[target] = value[column]
    return made


def normalise(
    value: Any,
    *,
    shape: str = "auto",
    mapping: Mapping[str, str] | None = None,
    seen: Counter[str] | None = None,
) -> Conversation:
    """Bring one row into the normal form.

    Args:
        value: The row as the reader gives it.
        shape: A key of :data:`SHAPES`, or ``auto``.
        mapping: Field to column, for files whose columns have other names.
        seen: Counts the rows of each shape.

    Raises:
        RowRefused: The row breaks a rule; the field and the rule are in it.
    """
    if not isinstance(value, Mapping):
        raise RowRefused("", f"the row is {_kind(value)}, not an object with named fields")
    if mapping:
        value = apply_map(value, mapping)
    if shape == "auto":
        found = detect_shape(value)
        if found is None:
            raise RowRefused("", f"its columns ({_listed(value)}) make no known shape{_hint(value)}")
        shape = found
    if seen is not None:
        seen[shape] += 1
    read = {
        "alpaca": _alpaca,
        "sharegpt": _sharegpt,
        "messages": _messages,
        "prompt-completion": _prompt_completion,
        "text": _text_row,
    }[shape]
    made = read(value)
    if made.text is None:
        _check_order(made)
    return made


def _listed(value: Mapping[str, Any]) -> str:
    names = [str(key)[:40] for key in value]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"


def _hint(value: Mapping[str, Any]) -> str:
    known = ["instruction", "output", "conversations", "messages", "prompt", "completion", "text"]
    for name in value:
        near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.75)
        if near and near[0] != name:
            return f": did you mean {near[0]!r} by {name!r}?"
    return ""


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float) and value != value:
        return "NaN"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _string(where: str, value: Any, repairs: list[str]) -> str:
    """Text that a tokenizer can take, or RowRefused."""
    if not isinstance(value, str):
        raise RowRefused(where, f"{_kind(value)} where text belongs", "not-text")
    if value.isascii():
        if "\0" in value:
            raise RowRefused(where, "the text holds a NUL character", "encoding")
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad = ord(value[error.start])
        what = f"byte 0x{bad - 0xDC00:02x} is no UTF-8" if 0xDC80 <= bad <= 0xDCFF else f"lone surrogate U+{bad:04X}"
        raise RowRefused(
            where, f"the text can't be encoded: {what} at character {error.start + 1}", "encoding"
        ) from None
    if "\0" in value:
        raise RowRefused(where, "the text holds a NUL character", "encoding")
    if NONCHARACTER in value:
        repairs.append("noncharacter")
        return value.replace(NONCHARACTER, "")
    return value


def _content(where: str, value: Any, repairs: list[str]) -> str:
    """Text, or OpenAI's list of text parts."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        texts = []
        for number, part in enumerate(value):
            if part["type"] not in ("text", "input_text", "output_text"):
                raise RowRefused(f"{where}[{number}]", f"a part of type {part['type']!r}; only text is trained on")
            texts.append(_string(f"{where}[{number}].text", part.get("text"), repairs))
        return "".join(texts)
    return _string(where, value, repairs)


def _filled(where: str, value: str) -> str:
    if not value.strip():
        raise RowRefused(where, "empty", "empty")
    return value


# -- shapes -----------------------------------------------------------------------------------------------------------


def _alpaca(value: Mapping[str, Any]) -> Conversation:
    made = Conversation()
    _need(value, "instruction", "output")
    system, history = value.get("system"), value.get("history")
    if system is not None and (text := _string("system", system, made.repairs)).strip():
        made.messages.append({"role": "system", "content": text})
    for number, pair in enumerate(_as_list("history", history)):
        where = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowRefused(where, "must be a pair: what the user said, what the assistant replied")
        made.messages.append(
            {"role": "user", "content": _filled(where + "[0]", _string(where + "[0]", pair[0], made.repairs))}
        )
        made.messages.append(
            {"role": "assistant", "content": _filled(where + "[1]", _string(where + "[1]", pair[1], made.repairs))}
        )
    prompt = _string("instruction", value["instruction"], made.repairs)
    extra = value.get("input")
    if extra is not None and (extra := _string("input", extra, made.repairs)).strip():
        prompt = f"{prompt}\n{extra}" if prompt.strip() else extra
    made.messages.append({"role": "user", "content": _filled("instruction", prompt)})
    output = _filled("output", _string("output", value["output"], made.repairs))
    made.messages.append({"role": "assistant", "content": output})
    return made


def _sharegpt(value: Mapping[str, Any]) -> Conversation:
    made = Conversation()
    name = next((n for n in ("conversations", "conversation", "messages") if n in value), "conversations")
    _need(value, name)
    turns = _as_list(name, value[name])
    made.tools = read_tools(value.get("tools"), made.repairs)
    system = value.get("system")
    if system is not None and (text := _string("system", system, made.repairs)).strip():
        made.messages.append({"role": "system", "content": text})
    if turns and isinstance(turns[0], dict) and "role" in turns[0] and "from" not in turns[0]:
        made.messages.extend(read_messages(turns, where=name, repairs=made.repairs))
        return made
    for number, turn in enumerate(turns):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise RowRefused(where, "a turn must have 'from' and 'value'")
        role = _role(f"{where}.from", turn["from"])
        if role == "call":
            calls = _calls(f"{where}.value", turn["value"], made.repairs)
            made.messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            continue
        content = _content(f"{where}.value", turn["value"], made.repairs)
        made.messages.append(
            {"role": role, "content": content if role == "tool" else _filled(f"{where}.value", content)}
        )
    return made


def _messages(value: Mapping[str, Any]) -> Conversation:
    made = Conversation()
    _need(value, "messages")
    made.tools = read_tools(value.get("tools"), made.repairs)
    made.messages = read_messages(_as_list("messages", value["messages"]), where="messages", repairs=made.repairs)
    return made


def _prompt_completion(value: Mapping[str, Any]) -> Conversation:
    made = Conversation()
    _need(value, "prompt", "completion")
    made.tools = read_tools(value.get("tools"), made.repairs)
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowRefused("completion", "prompt and completion must both be text or both be messages")
    if isinstance(prompt, list):
        made.messages = read_messages(prompt, where="prompt", repairs=made.repairs)
        made.completion_from = len(made.messages)
        made.messages += read_messages(completion, where="completion", repairs=made.repairs)
        return made
    prompt = _filled("prompt", _string("prompt", prompt, made.repairs))
    completion = _filled("completion", _string("completion", completion, made.repairs))
    made.messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    made.completion_from = 1
    return made


def _text_row(value: Mapping[str, Any]) -> Conversation:
    _need(value, "text")
    made = Conversation()
    made.text = _filled("text", _string("text", value["text"], made.repairs))
    return made


def _need(value: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name not in value:
            near = difflib.get_close_matches(name, [str(key) for key in value], n=1)
            raise RowRefused(name, f"missing; the row has {_listed(value)}{f': is it {near[0]!r}?' if near else ''}")


def _as_list(where: str, value: Any) -> Sequence[Any]:
    if value is None and where == "history":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)  # csv and some parquet files hold lists as JSON text
        except ValueError:
            raise RowRefused(where, "text that is no JSON list") from None
    if not isinstance(value, list):
        raise RowRefused(where, f"{_kind(value)} where a list belongs")
    if not value and where != "history":
        raise RowRefused(where, "empty", "empty")
    return value


# -- messages, tools --------------------------------------------------------------------------------------------------


def _role(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowRefused(where, f"{_kind(value)} where a role belongs", "role")
    role = _ROLES.get(value) or _ROLES.get(value.strip().lower())
    if role is None:
        near = difflib.get_close_matches(value.lower(), list(_ROLES), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(_ROLES)}"
        raise RowRefused(where, f"unknown role {value[:40]!r}{hint}", "role")
    return role


def read_messages(turns: Any, *, where: str = "messages", repairs: list[str] | None = None) -> list[Message]:
    """OpenAI-style messages in normal form: text content, roles of ours, tool arguments as objects.

    Raises:
        RowRefused: A message breaks a rule.
    """
    repairs = [] if repairs is None else repairs
    if not isinstance(turns, list):
        raise RowRefused(where, f"{_kind(turns)} where a list belongs")
    return [_message(f"{where}[{number}]", turn, repairs) for number, turn in enumerate(turns)]


def _message(where: str, turn: Any, repairs: list[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise RowRefused(where, f"{_kind(turn)} where a message belongs")
    if "role" not in turn:
        near = difflib.get_close_matches("role", [str(key) for key in turn], n=1)
        raise RowRefused(
            f"{where}.role", f"missing; the message has {_listed(turn)}{f': is it {near[0]!r}?' if near else ''}"
        )
    role = _role(f"{where}.role", turn["role"])
    calls = turn.get("tool_calls")
    if calls is None and turn.get("function_call") is not None:
        calls = [turn["function_call"]]
    reasoning = next((turn[k] for k in ("reasoning_content", "reasoning", "thinking") if turn.get(k)), None)
    if role == "call":
        role, calls = "assistant", _calls(f"{where}.content", turn.get("content"), repairs)
        return {"role": role, "content": "", "tool_calls": calls}
    made: Message = {"role": role}
    content = turn.get("content")
    if content is None and role == "assistant" and calls:
        content = ""
    elif "content" not in turn:
        raise RowRefused(f"{where}.content", f"missing; the message has {_listed(turn)}")
    made["content"] = _content(f"{where}.content", content, repairs)
    if reasoning is not None:
        made["reasoning_content"] = _string(f"{where}.reasoning_content", reasoning, repairs)
    if calls:
        made["tool_calls"] = _calls(f"{where}.tool_calls", calls, repairs)
    elif role != "tool":
        _filled(f"{where}.content", made["content"])
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if isinstance(turn.get(key), str):
                made[key] = _string(f"{where}.{key}", turn[key], repairs)
    return made


def _calls(where: str, value: Any, repairs: list[str]) -> list[dict[str, Any]]:
    """Tool calls as ``{"id", "type": "function", "function": {"name", "arguments": object}}``."""
    value = _from_json(where, value)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowRefused(where, "empty", "empty")
    made = []
    for number, call in enumerate(calls):
        at = f"{where}[{number}]" if isinstance(value, list) else where
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowRefused(at, "a tool call must be an object with a name and arguments", "tools")
        arguments = function.get("arguments", function.get("parameters", {}))
        arguments = {} if arguments is None or arguments == "" else _from_json(f"{at}.arguments", arguments)
        if not isinstance(arguments, Mapping):
            raise RowRefused(f"{at}.arguments", f"{_kind(arguments)} where an object belongs", "tools")
        name = _filled(f"{at}.name", _string(f"{at}.name", function["name"], repairs))
        identity = call.get("id")
        made.append(
            {
                "id": identity if isinstance(identity, str) and identity else f"call{number:05d}",
                "type": "function",
                "function": {"name": name, "arguments": _clean(f"{at}.arguments", arguments, repairs)},
            }
        )
    return made


def read_tools(value: Any, repairs: list[str] | None = None) -> list[dict[str, Any]]:
    """Tools as ``{"type": "function", "function": {...}}``.

    Raises:
        RowRefused: A tool has no name, or its text isn't JSON.
    """
    repairs = [] if repairs is None else repairs
    if value is None or value == "" or value == []:
        return []
    value = _from_json("tools", value)
    tools = value if isinstance(value, list) else [value]
    made = []
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowRefused(where, "a tool must be an object with a name", "tools")
        made.append({"type": "function", "function": _clean(where, function, repairs)})
    return made


def _from_json(where: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowRefused(where, "text that is no JSON", "tools") from None


def _clean(where: str, value: Any, repairs: list[str]) -> Any:
    """A JSON value whose strings a tokenizer can take. Nulls that parquet writes for absent keys go."""
    if isinstance(value, str):
        return _string(where, value, repairs)
    if isinstance(value, Mapping):
        return {_string(where, key, repairs): _clean(f"{where}.{key}", item, repairs) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(f"{where}[{number}]", item, repairs) for number, item in enumerate(value)]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    raise RowRefused(where, f"{_kind(value)} where a JSON value belongs", "tools")


# -- order ------------------------------------------------------------------------------------------------------------


def _check_order(made: Conversation) -> None:
    """Someone asks, the assistant answers, and the last word is the assistant's."""
    messages = made.messages
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowRefused("", "no assistant turn: there is nothing to learn", "order")
    if any(role == "system" for role in roles[1:]):
        at = roles.index("system", 1)
        raise RowRefused("", f"turn {at + 1} is a system turn; only the first may be one", "order")
    start = 1 if roles[0] == "system" else 0
    first_user = next((i for i, role in enumerate(roles) if role == "user"), None)
    if first_user is None or "assistant" not in roles[first_user:]:
        raise RowRefused("", "the assistant speaks first and answers nobody", "order")
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    if last + 1 < len(messages):
        made.repairs.append("trailing-turns")
    if first_user > start:
        made.repairs.append("leading-reply")
        made.completion_from = max(0, made.completion_from - (first_user - start))
    made.messages = messages[:start] + messages[first_user : last + 1]
    for at, message in enumerate(made.messages):
        if message["role"] == "tool" and (at == 0 or made.messages[at - 1]["role"] not in ("assistant", "tool")):
            raise RowRefused("", f"turn {at + 1} is a tool result, but no tool was called before it", "order")
