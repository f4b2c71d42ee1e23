"""One normal form for every shape of row: messages in OpenAI's keys, the tools, and what was repaired on the way.

Shapes are detected from the row's keys or named by the person. A row that breaks a rule raises :class:`RowRefused` with
the field and the rule; a row that a named rule can mend is mended and the rule's name is counted. Nothing is guessed
from the text itself.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimtune.data.blocks import plain_tools
from slimtune.data.marked import LEARNT, supervision
from slimtune.data.preference import chosen_row
from slimtune.data.rows import RowRefused, from_text, kind_of, listed
from slimtune.data.shapes import MEDIA, Standard, check_media, standard_row, unknown_shape

__all__ = [
    "NONCHARACTER",
    "REPAIRS",
    "SHAPES",
    "SYSTEM_ROLES",
    "Conversation",
    "Message",
    "RowRefused",
    "detect_shape",
    "normalise",
    "read_messages",
    "read_tools",
    "read_variables",
]

Message = dict[str, Any]
"""role, content, and where present reasoning_content, tool_calls, tool_call_id, name; of a reply that is shown but not
to be learnt, ``supervised: False``."""

SYSTEM_ROLES = ("system", "developer")
"""Who gives instructions; templates that don't know a developer take him for the system."""

SHAPES: dict[str, str] = {
    "alpaca": "instruction, input, output, system, history",
    "sharegpt": "conversations of from and value, system, tools",
    "messages": "messages of role and content, tools",
    "prompt-completion": "prompt and completion, as text or messages",
    "text": "text",
    "question-answer": "a question (question, query, problem, …), its reply (answer, response, …), context, history",
    "moss": "MOSS's chat of turn_1, turn_2, …",
    "tree": "OASST's trees: the best-ranked reply at each turn",
}
"""Each shape that is read, with the columns that make it up."""

REPAIRS: dict[str, str] = {
    "leading-reply": "replies before the first user turn were left out",
    "trailing-turns": "turns after the last reply were left out: nothing answers them",
    "noncharacter": "the noncharacter U+FDD0, which no text should hold, was taken out",
    "system-into-user": "the template has no system turn: the system text was put before the first user turn",
    "merged-turns": "the template wants roles to alternate: turns of one role in a row were joined",
    "tools-as-text": "the template has no place for tools: tools, calls and results were written as text",
    "encoded-twice": "a list, or a call's arguments, stood in a text within a text: it was read",
    "python-notation": "a list, or a call's arguments, stood in Python's notation in place of JSON: it was read",
    "absent-keys": "nulls in tools and calls were left out: in a table they stand for absent keys, and for nulls alike",
    "cut-left": "the start of the first user turn was cut to fit into max_length (overlong: keep-end)",
    "oldest-dropped": "the oldest exchanges were left out to fit into max_length (overlong: keep-end)",
    "split": "the conversation was split into several (overlong: split)",
}
"""Each rule that may change a row, and what it does."""

_ALIKE = dict.fromkeys(("messages", "sharegpt"), ("messages", "sharegpt"))
"""Shapes that are told apart by their turns: the name of either stands for both."""

_ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "developer": "developer", "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "function_call": "call", "tool_call": "call", "chatbot": "assistant", "ai": "assistant",
    "prompter": "user", "ipython": "tool",
}  # fmt: skip

_TURN_KEYS = frozenset({
    "role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "id", "refusal",
    "reasoning_content", "thinking", "reasoning", "weight", "train", "training", "loss", "loss_weight", "channel",
})  # fmt: skip
"""What is read of a turn, or names it; beside these a tool's ``name``."""

_SEEN = MEDIA | {"image_url", "video_url", "audio_url", "input_audio", "inlineData", "inline_data", "fileData", "file"}
"""What isn't text in a part of a content."""

NONCHARACTER = "\ufdd0"
"""What the renderer marks text with; it is taken out of what people write."""


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
    variables: dict[str, Any] = field(default_factory=dict)
    """What the row sets in its chat template (``chat_template_kwargs``)."""


def detect_shape(value: Mapping[str, Any]) -> str | None:
    """The shape that a row's keys make up, or None."""
    found = standard_row(value, [])
    return None if found is None else found.shape


def apply_map(value: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The row under the fields' names: ``mapping`` is field to column.

    Raises:
        RowRefused: The row lacks a column that is mapped.
    """
    made = {key: item for key, item in value.items() if key not in mapping.values()}
    for target, column in mapping.items():
        if column not in value:
            turned = f": --map is field=column, so --map {column}={target}" if target in value else ""
            raise RowRefused(column, f"the row has no such column; it has {listed(value)}{turned}")
        made[target] = value[column]
    return made


def normalise(
    value: Any,
    *,
    shape: str = "auto",
    mapping: Mapping[str, str] | None = None,
    prefer: str | None = None,
    seen: Counter[str] | None = None,
    unread: Counter[str] | None = None,
) -> Conversation:
    """Bring one row into the normal form.

    Args:
        value: The row as the reader gives it.
        shape: A key of :data:`SHAPES`, or ``auto``.
        mapping: Field to column, for files whose columns have other names.
        prefer: ``chosen`` takes the better reply of preference data, which is refused otherwise.
        seen: Counts the rows of each shape.
        unread: Counts the rows that have a column which isn't read.

    Raises:
        RowRefused: The row breaks a rule; the field and the rule are in it.
    """
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
        value = {"messages": value}  # a row that is its turns
    if not isinstance(value, Mapping):
        raise RowRefused("", f"the row is {kind_of(value)}, not an object with named fields")
    if mapping:
        value = apply_map(value, mapping)
    repairs: list[str] = []
    check_media(value)
    value = chosen_row(value, prefer)
    found = standard_row(value, repairs)
    if shape != "auto" and (found is None or shape not in _ALIKE.get(found.shape, (found.shape,))):
        found = Standard(shape, value, frozenset(value))
    if found is None:
        raise unknown_shape(value)
    if seen is not None:
        seen[found.shape] += 1
    if unread is not None:
        unread.update(name for name in value if name not in found.read and name != "chat_template_kwargs")
        unread.update(_unread_of_turns(found.row))
    read = {"alpaca": _alpaca, "sharegpt": _sharegpt, "prompt-completion": _prompt_completion, "text": _text_row}
    try:
        made = read.get(found.shape, _messages)(found.row)
    except RowRefused as refused:
        raise RowRefused(found.fields.get(refused.field, refused.field), refused.rule, refused.name) from None
    made.repairs[:0] = repairs
    if made.text is None:
        made.variables = read_variables(value.get("chat_template_kwargs"), made.repairs)
        _check_order(made)
    return made


def _unread_of_turns(row: Mapping[str, Any]) -> set[str]:
    """The keys of a row's turns that say something and aren't read."""
    made: set[str] = set()
    name = next((name for name in ("messages", "conversations", "conversation") if name in row), "")
    for turn in row[name] if isinstance(row.get(name), list) else ():
        if isinstance(turn, dict) and len(turn) > 2:
            keys = turn.keys() - _TURN_KEYS
            if {"from", "value"} <= turn.keys() and not {"role", "content"} <= turn.keys():
                keys |= turn.keys() & {"role", "content"}
            role = _ROLES.get(str(turn.get("role", turn.get("from"))).strip().lower())
            if role == "tool":
                keys -= {"name"}
            if role not in ("assistant", "call"):
                keys |= {key for key in LEARNT if turn.get(key)}  # only replies are learnt
            made |= {f"{name}: {key}" for key in keys if turn[key] not in (None, "", [], {})}
    return made


def read_variables(value: Any, repairs: list[str] | None = None) -> dict[str, Any]:
    """What a row sets in its chat template (``chat_template_kwargs``); nulls set nothing.

    Raises:
        RowRefused: It is no object of JSON values.
    """
    repairs = [] if repairs is None else repairs
    where = "chat_template_kwargs"
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        value = from_text(where, value, repairs)
    if not isinstance(value, Mapping):
        raise RowRefused(where, f"{kind_of(value)} where an object belongs")
    made: dict[str, Any] = _clean(where, {key: item for key, item in value.items() if item is not None}, repairs)
    return made


def _string(where: str, value: Any, repairs: list[str]) -> str:
    """Text that a tokenizer can take, or RowRefused."""
    if not isinstance(value, str):
        raise RowRefused(where, f"{kind_of(value)} where text belongs", "not-text")
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


def _without_thoughts(where: str, value: Any, repairs: list[str]) -> tuple[Any, str]:
    """(content without the parts that are thoughts, as Mistral, OpenAI and Gemini write them; the thoughts)."""
    if not isinstance(value, list):
        return value, ""
    thoughts, rest = [], []
    for number, part in enumerate(value):
        kind = (
            part.get("type", "thinking" if part.get("thought") is True else None) if isinstance(part, Mapping) else ""
        )
        if kind in ("thinking", "reasoning"):
            inner = next((part[key] for key in (kind, "text", "content") if part.get(key) is not None), None)
            thoughts.append(_content(f"{where}[{number}].{kind}", inner, repairs))
        else:
            rest.append(part)
    return (rest or "") if thoughts else value, "\n\n".join(thoughts)


def _content(where: str, value: Any, repairs: list[str]) -> str:
    """Text, or OpenAI's list of text parts."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        texts = []
        for number, part in enumerate(value):
            kind = part.get("type") or "text"  # Gemini's and Bedrock's parts name no type
            if kind not in ("text", "input_text", "output_text", "refusal"):
                raise RowRefused(f"{where}[{number}]", f"a part of type {kind!r}; only text is trained on")
            if seen := next((name for name in _SEEN & part.keys() if part[name]), None):
                raise RowRefused(f"{where}[{number}].{seen}", "beside a text; only text is trained on", "media")
            key = next((key for key in ("text", "value", "content", "refusal") if part.get(key) is not None), "text")
            if key not in part:
                raise RowRefused(f"{where}[{number}]", f"a part of {listed(part)}; only text is trained on")
            texts.append(_string(f"{where}[{number}].{key}", part[key], repairs))
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
    made.tools = read_tools(value.get("tools"), made.repairs)
    made.messages += _system_turn(value, made.repairs)
    for number, pair in enumerate(_as_list("history", value.get("history"), made.repairs)):
        where = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowRefused(where, "must be a pair: what the user said, what the assistant replied")
        for side, role in enumerate(("user", "assistant")):
            at = f"{where}[{side}]"
            made.messages.append({"role": role, "content": _filled(at, _string(at, pair[side], made.repairs))})
    prompt = _string("instruction", value["instruction"], made.repairs)
    extra = value.get("input")
    if extra is not None and (extra := _string("input", extra, made.repairs)).strip():
        prompt = f"{prompt}\n{extra}" if prompt.strip() else extra
    made.messages.append({"role": "user", "content": _filled("instruction", prompt)})
    made.messages.append(_reply(value, "output", made.repairs))
    return made


def _sharegpt(value: Mapping[str, Any]) -> Conversation:
    made = Conversation()
    name = next((n for n in ("conversations", "conversation", "messages") if n in value), "conversations")
    _need(value, name)
    turns = _as_list(name, value[name], made.repairs)
    made.tools = read_tools(value.get("tools"), made.repairs)
    made.messages += _system_turn(value, made.repairs)
    if turns and isinstance(turns[0], dict) and "role" in turns[0] and "from" not in turns[0]:
        made.messages.extend(read_messages(turns, where=name, repairs=made.repairs))
        return made
    for number, turn in enumerate(turns):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise RowRefused(where, "a turn must have 'from' and 'value'")
        made.messages.append(_message(where, turn, made.repairs, ("from", "value")))
    made.messages = _but_empty_systems(made.messages)
    return made


def _messages(value: Mapping[str, Any]) -> Conversation:
    made = Conversation()
    _need(value, "messages")
    made.tools = read_tools(value.get("tools"), made.repairs)
    turns = _as_list("messages", value["messages"], made.repairs)
    made.messages = _system_turn(value, made.repairs) + read_messages(turns, where="messages", repairs=made.repairs)
    return made


def _system_turn(value: Mapping[str, Any], repairs: list[str]) -> list[Message]:
    """The system turn of a row that has its text in a column of its own."""
    system = value.get("system")
    if system is None or not (text := _string("system", system, repairs)).strip():
        return []
    return [{"role": "system", "content": text}]


def _reply(value: Mapping[str, Any], name: str, repairs: list[str]) -> Message:
    """The reply that a row has in the column ``name``, with its thought, if it has one."""
    made = {"role": "assistant", "content": _filled(name, _string(name, value[name], repairs))}
    if thought := value.get("reasoning_content"):
        made["reasoning_content"] = _string("reasoning_content", thought, repairs)
    return made


def _prompt_completion(value: Mapping[str, Any]) -> Conversation:
    made = Conversation()
    _need(value, "prompt", "completion")
    made.tools = read_tools(value.get("tools"), made.repairs)
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowRefused("completion", "prompt and completion must both be text or both be messages")
    made.messages = _system_turn(value, made.repairs)
    if isinstance(prompt, list):
        made.messages += read_messages(prompt, where="prompt", repairs=made.repairs)
        made.completion_from = len(made.messages)
        made.messages += read_messages(completion, where="completion", repairs=made.repairs)
        ends = [message["role"] for message in made.messages[made.completion_from - 1 : made.completion_from + 1]]
        if ends == ["assistant", "assistant"]:
            what = "the prompt ends with a reply: the completion may go on with it, or be a turn of its own"
            raise RowRefused("completion", what, "order")
        return made
    prompt = _filled("prompt", _string("prompt", prompt, made.repairs))
    made.messages += [{"role": "user", "content": prompt}, _reply(value, "completion", made.repairs)]
    made.completion_from = len(made.messages) - 1
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
            raise RowRefused(name, f"missing; the row has {listed(value)}{f': is it {near[0]!r}?' if near else ''}")


def _as_list(where: str, value: Any, repairs: list[str]) -> Sequence[Any]:
    if value is None and where == "history":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_text(where, value, repairs)  # csv and some parquet files hold lists as text
    if not isinstance(value, list):
        raise RowRefused(where, f"{kind_of(value)} where a list belongs")
    if not value and where != "history":
        raise RowRefused(where, "empty", "empty")
    return value


# -- messages, tools --------------------------------------------------------------------------------------------------


def _role(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowRefused(where, f"{kind_of(value)} where a role belongs", "role")
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
        raise RowRefused(where, f"{kind_of(turns)} where a list belongs")
    made = [_plain(turn) or _message(f"{where}[{number}]", turn, repairs) for number, turn in enumerate(turns)]
    return _but_empty_systems(made)


def _but_empty_systems(messages: list[Message]) -> list[Message]:
    return [m for m in messages if m["role"] not in SYSTEM_ROLES or m["content"].strip()]


def _plain(turn: Any) -> Message | None:
    """A turn of nothing but a role and ASCII text, as most are, in normal form; None for any other."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, text = turn.get("role"), turn.get("content")
    if role not in ("user", "assistant") or type(text) is not str or not text.isascii() or "\0" in text:
        return None
    return {"role": role, "content": text} if text and not text.isspace() else None


def _message(where: str, turn: Any, repairs: list[str], keys: tuple[str, str] = ("role", "content")) -> Message:
    """A turn in normal form; ``keys``: what its role and its text are called."""
    named, text = keys
    if not isinstance(turn, Mapping):
        raise RowRefused(where, f"{kind_of(turn)} where a message belongs")
    if named not in turn:
        near = difflib.get_close_matches("role", [str(key) for key in turn], n=1)
        raise RowRefused(
            f"{where}.role", f"missing; the message has {listed(turn)}{f': is it {near[0]!r}?' if near else ''}"
        )
    for name in MEDIA & turn.keys():
        if turn[name]:
            raise RowRefused(f"{where}.{name}", f"{name.rstrip('s')}s beside a text; only text is read", "media")
    role = _role(f"{where}.{named}", turn[named])
    calls = turn.get("tool_calls")
    if calls is None and turn.get("function_call") is not None:
        calls = [turn["function_call"]]
    thoughts = [turn[k] for k in ("reasoning_content", "thinking", "reasoning") if turn.get(k)]
    if role == "call":
        role, calls = "assistant", _calls(f"{where}.{text}", turn.get(text), repairs)
        return {"role": role, "content": "", "tool_calls": calls} | supervision(where, role, turn)
    made: Message = {"role": role} | supervision(where, role, turn)
    content = turn.get(text)
    if turn.get("channel") not in (None, "", "final"):
        what = f"a message of its own in the channel {turn['channel']!r}; a thought is read under reasoning_content"
        raise RowRefused(f"{where}.channel", f"{what} of the reply that it belongs to")
    if refusal := turn.get("refusal"):  # OpenAI's: what the assistant said in place of a content
        if content or role != "assistant":
            raise RowRefused(f"{where}.refusal", "a refusal beside a content, or of a turn that is no reply")
        content = _string(f"{where}.refusal", refusal, repairs)
    elif content is None and role == "assistant" and calls:
        content = ""
    elif text not in turn:
        raise RowRefused(f"{where}.{text}", f"missing; the message has {listed(turn)}")
    if role == "assistant":
        content, among_parts = _without_thoughts(f"{where}.{text}", content, repairs)
        thoughts += [among_parts] if among_parts else []
    made["content"] = _content(f"{where}.{text}", content, repairs)
    if any(thought != thoughts[0] for thought in thoughts):
        raise RowRefused(f"{where}.reasoning_content", "another thought of this turn stands elsewhere in it", "thought")
    if thoughts:
        made["reasoning_content"] = _string(f"{where}.reasoning_content", thoughts[0], repairs)
    if calls:
        made["tool_calls"] = _calls(f"{where}.tool_calls", calls, repairs)
    elif role != "tool" and role not in SYSTEM_ROLES:
        _filled(f"{where}.{text}", made["content"])
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if isinstance(turn.get(key), str):
                made[key] = _string(f"{where}.{key}", turn[key], repairs)
    return made


def _calls(where: str, value: Any, repairs: list[str]) -> list[dict[str, Any]]:
    """Tool calls as ``{"id", "type": "function", "function": {"name", "arguments": object}}``."""
    if isinstance(value, str):
        value = from_text(where, value, repairs, "tools")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowRefused(where, "empty", "empty")
    made = []
    for number, call in enumerate(calls):
        at = f"{where}[{number}]" if isinstance(value, list) else where
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowRefused(at, "a tool call must be an object with a name and arguments", "tools")
        arguments = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), "")
        if isinstance(arguments, str):
            arguments = from_text(f"{at}.arguments", arguments, repairs, "tools") if arguments else {}
        if not isinstance(arguments, Mapping):
            raise RowRefused(f"{at}.arguments", f"{kind_of(arguments)} where an object belongs", "tools")
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
    if isinstance(value, str) and (value := from_text("tools", value, repairs, "tools")) is None:
        return []
    tools = plain_tools(value if isinstance(value, list) else [value])
    made = []
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        function = (tool.get("function") or tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowRefused(where, "a tool must be an object with a name", "tools")
        made.append({"type": "function", "function": _clean(where, function, repairs)})
    return made


def _clean(where: str, value: Any, repairs: list[str]) -> Any:
    """A JSON value whose strings a tokenizer can take."""
    if isinstance(value, str):
        return _string(where, value, repairs)
    if isinstance(value, Mapping):
        return {_string(where, key, repairs): _clean(f"{where}.{key}", item, repairs) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(f"{where}[{number}]", item, repairs) for number, item in enumerate(value)]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise RowRefused(where, f"{kind_of(value)} where a JSON value belongs", "tools")


# -- order ------------------------------------------------------------------------------------------------------------


def _check_order(made: Conversation) -> None:
    """Someone asks, the assistant answers, and the last word is the assistant's."""
    messages = made.messages
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowRefused("", "no assistant turn: there is nothing to learn", "order")
    first_user = next((i for i, role in enumerate(roles) if role == "user"), None)
    if first_user is None or "assistant" not in roles[first_user:]:
        raise RowRefused("", "the assistant speaks first and answers nobody", "order")
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    if last + 1 < len(messages):
        made.repairs.append("trailing-turns")
    head = [message for message in messages[:first_user] if message["role"] in SYSTEM_ROLES]
    if first_user > len(head):
        made.repairs.append("leading-reply")
        made.completion_from = max(0, made.completion_from - (first_user - len(head)))
    made.messages = head + messages[first_user : last + 1]
    for at, message in enumerate(made.messages):
        if message["role"] == "tool" and (at == 0 or made.messages[at - 1]["role"] not in ("assistant", "tool")):
            raise RowRefused("", f"turn {at + 1} is a tool result, but no tool was called before it", "order")
