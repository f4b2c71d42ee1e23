"""Shapes to one normal form, and the named rules that mend a row."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slimtune.data.conversation import Conversation, RowRefused, detect_shape, normalise, read_messages

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}

SAME: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "messages": {"messages": [USER, REPLY]},
    "prompt-completion": {"prompt": "Hi", "completion": "Hello."},
}


@pytest.mark.parametrize("shape", SAME)
def test_each_shape_is_detected_and_says_the_same(shape: str) -> None:
    assert detect_shape(SAME[shape]) == shape
    assert normalise(SAME[shape]).messages == [USER, REPLY]
    assert normalise(SAME[shape], shape=shape).messages == [USER, REPLY]


def test_alpaca_with_everything() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["a", "b"]]}
    assert [(m["role"], m["content"]) for m in normalise(row).messages] == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "Add.\n1 2"), ("assistant", "3"),
    ]  # fmt: skip


def test_tools_in_sharegpt_and_openai_become_the_same() -> None:
    tool = {"name": "tide", "description": "d", "parameters": {"type": "object", "properties": {}}}
    call = {"name": "tide", "arguments": {"port": "Brest"}}
    shared = normalise(
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "low"},
                {"from": "gpt", "value": "It is low."},
            ],
            "tools": json.dumps([tool]),
        }
    )
    asked = [{"id": "call00000", "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}]
    openai = normalise(
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": asked},
                {"role": "tool", "content": "low"},
                {"role": "assistant", "content": "It is low."},
            ],
            "tools": [{"type": "function", "function": tool}],
        }
    )
    assert shared.messages == openai.messages
    assert shared.tools == openai.tools
    assert shared.messages[1]["tool_calls"][0]["function"] == call


def test_text_parts_reasoning_and_other_names_of_roles() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "Human", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            {"role": "model", "content": "Hello.", "reasoning": "They greet."},
        ]
    }
    assert normalise(row).messages == [
        {"role": "developer", "content": "Be brief."},
        USER,
        {**REPLY, "reasoning_content": "They greet."},
    ]


def test_map_gives_columns_the_fields_names() -> None:
    row = {"question": "Hi", "answer": "Hello.", "id": 7}
    assert normalise(row, mapping={"instruction": "question", "output": "answer"}).messages == [USER, REPLY]
    with pytest.raises(RowRefused, match="anser: the row has no such column; it has question, answer, id"):
        normalise(row, mapping={"instruction": "question", "output": "anser"})


REPAIRED: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "leading-reply": ([REPLY, USER, REPLY], [USER, REPLY]),
    "trailing-turns": ([USER, REPLY, USER], [USER, REPLY]),
    "noncharacter": ([{**USER, "content": "H\ufdd0i"}, REPLY], [USER, REPLY]),
}


@pytest.mark.parametrize("rule", REPAIRED)
def test_named_repairs(rule: str) -> None:
    given, expected = REPAIRED[rule]
    made = normalise({"messages": given})
    assert isinstance(made, Conversation)
    assert made.messages == expected
    assert made.repairs == [rule]


@pytest.mark.parametrize("content", ["a", "  a\n", "", " \n", "a\0b", "ü", "\ud800", "x\ufdd0y", None, 5, ["a"]])
@pytest.mark.parametrize("role", ["user", "assistant", "User", "gpt", "nobody", None])
def test_the_plainest_turns_are_read_by_the_rules_of_all_turns(role: Any, content: Any) -> None:
    def read(more: dict[str, Any]) -> Any:
        try:
            return read_messages([{"role": role, "content": content, **more}])
        except RowRefused as refused:
            return str(refused)

    assert read({}) == read({"weight": None})  # a third key, and nothing else, takes the longer way
