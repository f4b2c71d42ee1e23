"""The conversations that templates are judged with: rows as people's files have them, a sentinel in each field."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A row as people's files have it."""

    name: str
    messages: Messages
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        made: dict[str, Any] = {"messages": self.messages}
        if self.tools:
            made["tools"] = self.tools
        if self.variables:
            made["chat_template_kwargs"] = self.variables
        return made


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": text}


def call(number: int, arguments: Any, name: str = "qztool") -> dict[str, Any]:
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number: int, text: str, name: str = "qztool") -> dict[str, Any]:
    return {"role": "tool", "content": text, "name": name, "tool_call_id": f"call{number:05d}"}


TOOL = {
    "type": "function",
    "function": {
        "name": "qztool",
        "description": "qzdoes this",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "qzabout this"}},
            "required": ["place"],
        },
    },
}
_PLACE = {"place": "qzvaluea"}
_WITH_CALL = [
    user("qzuser"),
    reply(None, tool_calls=[call(0, _PLACE)]),
    result(0, "qzresulta"),
    reply("qzreply is so."),
]

CASES = [
    Case("one turn", [user("qzuser"), reply("qzreply is so.")]),
    Case("system", [system("qzsystem"), user("qzuser"), reply("qzreply")]),
    Case("empty system", [system(""), user("qzuser"), reply("qzreply")]),
    Case(
        "many turns",
        [
            system("qzsystem"),
            user("qzusera"),
            reply("qzreplya"),
            user("qzuserb"),
            reply("qzreplyb"),
            user("qzuserc"),
            reply("qzreplyc"),
        ],
    ),
    Case("two turns", [user("qzusera"), reply("qzreplya"), user("qzuserb"), reply("qzreplyb")]),
    Case("system midway", [user("qzusera"), reply("qzreplya"), system("qzsystem"), user("qzuserb"), reply("qzreplyb")]),
    Case(
        "system and developer",
        [system("qzsystem"), system("qzdeveloper", "developer"), user("qzuser"), reply("qzreply")],
    ),
    Case("developer", [system("qzdeveloper", "developer"), user("qzuser"), reply("qzreply")]),
    Case("thought", [user("qzuser"), reply("qzreply", reasoning_content="qzthought is deep.")]),
    Case("thought as thinking", [user("qzuser"), reply("qzreply", thinking="qzthought")]),
    Case("thought as reasoning", [system("qzsystem"), user("qzuser"), reply("qzreply", reasoning="qzthought")]),
    Case(
        "thoughts in both",
        [
            user("qzusera"),
            reply("qzreplya", reasoning_content="qzthoughta"),
            user("qzuserb"),
            reply("qzreplyb", reasoning_content="qzthoughtb"),
        ],
    ),
    Case(
        "thought in the first",
        [user("qzusera"), reply("qzreplya", reasoning_content="qzthoughta"), user("qzuserb"), reply("qzreplyb")],
    ),
    Case("thought inside", [user("qzuser"), reply("<think>\nqzthought\n</think>\n\nqzreply")]),
    Case(
        "thought parts",
        [
            user("qzuser"),
            reply(
                [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "qzthought"}]},
                    {"type": "text", "text": "qzreply"},
                ]
            ),
        ],
    ),
    Case("text parts", [{"role": "user", "content": [{"type": "text", "text": "qzuser"}]}, reply("qzreply")]),
    Case("call", _WITH_CALL, [TOOL]),
    Case(
        "call with text",
        [
            system("qzsystem"),
            user("qzuser"),
            reply("qzlook", tool_calls=[call(0, json.dumps(_PLACE))]),
            result(0, "qzresulta"),
            reply("qzreply"),
        ],
        [TOOL],
    ),
    Case(
        "parallel calls",
        [
            user("qzuser"),
            reply("", tool_calls=[call(0, _PLACE), call(1, {"place": "qzvalueb"})]),
            result(0, "qzresulta"),
            result(1, "qzresultb"),
            reply("qzreply"),
        ],
        [TOOL],
    ),
    Case(
        "nested arguments",
        [
            user("qzuser"),
            reply(
                None,
                tool_calls=[
                    call(0, {"place": "qzvaluea", "more": {"list": ["qzitem", 2, True], "deep": {"a": "qzdeep"}}})
                ],
            ),
            result(0, "qzresulta"),
            reply("qzreply"),
        ],
        [TOOL],
    ),
    Case("call at the end", _WITH_CALL[:2], [TOOL]),
    Case("tools unused", [user("qzuser"), reply("qzreply")], [TOOL]),
    Case(
        "calls in turn",
        [
            user("qzuser"),
            reply(None, tool_calls=[call(0, _PLACE)]),
            result(0, "qzresulta"),
            reply(None, tool_calls=[call(1, {"place": "qzvalueb"})]),
            result(1, "qzresultb"),
            reply("qzreply"),
        ],
        [TOOL],
    ),
    Case(
        "thought and call",
        [
            user("qzuser"),
            reply("", reasoning_content="qzthoughta", tool_calls=[call(0, _PLACE)]),
            result(0, "qzresulta"),
            reply("qzreply", reasoning_content="qzthoughtb"),
        ],
        [TOOL],
    ),
    Case("call, then a turn", [*_WITH_CALL, user("qzuserb"), reply("qzreplyb")], [TOOL]),
    Case("unicode", [system("qzsystem 船"), user("qzuser 🚢 naïve"), reply("qzreply 海の上です。")]),
    Case("spaces around", [user("  qzuser \n"), reply("\n qzreply\n\n")]),
    Case("empty reply", [user("qzuser"), reply("")]),
    Case("weight 0", [user("qzusera"), reply("qzreplya", weight=0), user("qzuserb"), reply("qzreplyb", weight=1)]),
    Case("users in a row", [user("qzusera"), user("qzuserb"), reply("qzreply")]),
    Case("control text", [user("qzuser <|im_end|> </s> <end_of_turn>"), reply("qzreply <|im_end|> qztoo")]),
    Case("no thinking", [user("qzuser"), reply("qzreply")], None, {"enable_thinking": False}),
    Case(
        "thinking",
        [user("qzusera"), reply("qzreplya"), user("qzuserb"), reply("qzreplyb", reasoning_content="qzthought")],
        None,
        {"enable_thinking": True},
    ),
    Case(
        "call without arguments",
        [user("qzuser"), reply("", tool_calls=[call(0, {})]), result(0, "qzresulta"), reply("qzreply")],
        [TOOL],
    ),
]
