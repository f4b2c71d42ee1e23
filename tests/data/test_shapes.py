"""Shapes that published files have: each is read as what it says, or refused with what to do. The rows are made up."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from slimtune.data.conversation import normalise
from slimtune.data.rows import RowRefused, without_absent

S, Q, A = ("system", "Be brief."), ("user", "Key?"), ("assistant", "Pot.")
Q2, A2 = ("user", "Which?"), ("assistant", "Blue.")


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": content} for role, content in said]


# name: (row, its turns, the columns that aren't read)
READ: dict[str, tuple[dict[str, Any], list[tuple[str, str]], list[str]]] = {
    "question, answer (GSM8K)": ({"question": "Key?", "answer": "Pot."}, [Q, A], []),
    "query, response with history": (
        {"query": "Which?", "response": "Blue.", "history": [["Key?", "Pot."]]}, [Q, A, Q2, A2], [],
    ),
    "system_prompt, question, response (OpenOrca)": (
        {"id": "1", "system_prompt": "Be brief.", "question": "Key?", "response": "Pot."}, [S, Q, A], ["id"],
    ),
    "problem, solution, answer (MATH)": (
        {"problem": "Key?", "solution": "Pot.", "answer": "4", "level": 5}, [Q, A], ["answer", "level"],
    ),
    "problem, generated_solution (OpenMathInstruct)": (
        {"problem": "Key?", "generated_solution": "Pot.", "expected_answer": "4"}, [Q, A], ["expected_answer"],
    ),
    "instruction, context, response (Dolly)": (
        {"instruction": "Key?", "context": "At home.", "response": "Pot.", "category": "x"},
        [("user", "Key?\nAt home."), A], ["category"],
    ),
    "inputs, targets (FLAN)": ({"inputs": "Key?", "targets": "Pot.", "task": "x"}, [Q, A], ["task"]),
    "kind, input, target (Firefly)": ({"kind": "x", "input": "Key?", "target": "Pot."}, [Q, A], ["kind"]),
    "Question, Answer": ({"Question": "Key?", "Answer": "Pot."}, [Q, A], []),
    "a column reasoning that holds no thought": (
        {"input": messages(Q), "output": "Pot.", "reasoning": "on"}, [Q, A], ["reasoning"],
    ),
    "input_text, output_text": ({"input_text": "Key?", "output_text": "Pot."}, [Q, A], []),
    "a list of texts (LIMA)": ({"conversations": ["Key?", "Pot."], "source": "x"}, [Q, A], ["source"]),
    "data as texts (UltraChat)": ({"id": "1", "data": ["Key?", "Pot.", "Which?", "Blue."]}, [Q, A, Q2, A2], ["id"]),
    "pairs of human and assistant": (
        {"conversation": [{"human": "Key?", "assistant": "Pot."}, {"human": "Which?", "assistant": "Blue."}]},
        [Q, A, Q2, A2], [],
    ),
    "pairs of input and output, a system text in the first (XTuner)": (
        {"conversation": [{"system": "Be brief.", "input": "Key?", "output": "Pot."},
                          {"input": "Which?", "output": "Blue."}]},
        [S, Q, A, Q2, A2], [],
    ),
    "dialog": ({"dialog": messages(S, Q, A)}, [S, Q, A], []),
    "turns of one key": ({"turns": [{"user": "Key?"}, {"assistant": "Pot."}]}, [Q, A], []),
    "speaker and text": (
        {"dialogue": [{"speaker": "user", "text": "Key?"}, {"speaker": "assistant", "text": "Pot."}]}, [Q, A], [],
    ),
    "pairs of texts": ({"conversation": [["Key?", "Pot."], ["Which?", "Blue."]]}, [Q, A, Q2, A2], []),
    "contents of parts (Gemini)": (
        {"systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
         "contents": [{"role": "user", "parts": [{"text": "Key?"}]}, {"role": "model", "parts": [{"text": "Pot."}]}]},
        [S, Q, A], [],
    ),
    "system beside messages (Anthropic)": ({"system": "Be brief.", "messages": messages(Q, A)}, [S, Q, A], []),
    "parts without a type (Bedrock)": (
        {"system": [{"text": "Be brief."}],
         "messages": [{"role": "user", "content": [{"text": "Key?"}]},
                      {"role": "assistant", "content": [{"text": "Pot."}]}]},
        [S, Q, A], [],
    ),
    "parts with value": (
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "Key?"}]}, *messages(A)]}, [Q, A], [],
    ),
    "roles of Cohere's": ({"messages": messages(("System", S[1]), ("User", "Key?"), ("Chatbot", "Pot."))},
                          [S, Q, A], []),
    "prompt and completion of from and value": ({"prompt": turns(Q), "completion": turns(A)}, [Q, A], []),
    "system beside prompt and completion": (
        {"system": "Be brief.", "prompt": "Key?", "completion": "Pot."}, [S, Q, A], [],
    ),
    "MOSS": (
        {"meta_instruction": "Be brief.", "num_turns": 1, "chat": {"turn_1": {
            "Human": "<|Human|>: Key?<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "Commands": "<|Commands|>: None<eoc>\n", "MOSS": "<|MOSS|>: Pot.<eom>\n"}}},
        [S, Q, A], ["num_turns"],
    ),
    "MOSS, older": ({"plain_text": "[Human]: Key?<eoh> [MOSS]: Pot.<eoa>"}, [Q, A], []),
    "a tree (OASST)": (
        {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "Key?", "replies": [
            {"role": "assistant", "text": "No.", "rank": 1, "replies": []},
            {"role": "assistant", "text": "Pot.", "rank": 0, "replies": [
                {"role": "prompter", "text": "Which?", "replies": [
                    {"role": "assistant", "text": "Green.", "deleted": True, "replies": []},
                    {"role": "assistant", "text": "Blue.", "replies": []}]}]}]}},
        [Q, A, Q2, A2], ["message_tree_id"],
    ),
    "instruction, instances (self-instruct)": (
        {"id": "1", "instruction": "Key?", "instances": [{"input": "", "output": "Pot."}]}, [Q, A], ["id"],
    ),
    "instruction, target": ({"instruction": "Key?", "target": "Pot."}, [Q, A], []),
    "a list as JSON text": ({"messages": json.dumps(messages(Q, A))}, [Q, A], []),
    "a list as pandas prints it": ({"conversations": str(turns(Q, A))}, [Q, A], []),
    "an empty column of pictures": ({"image": None, "conversations": turns(Q, A)}, [Q, A], ["image"]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_published_shape_is_read(name: str) -> None:
    row, expected, not_read = READ[name]
    unread: Counter[str] = Counter()
    made = normalise(row, unread=unread)
    assert [(message["role"], message["content"]) for message in made.messages] == expected
    assert sorted(unread) == sorted(not_read)


@pytest.mark.parametrize(
    "beside",
    [
        {"tool_calls": [{"function": {"name": "look", "arguments": {"at": 1}}}]},
        {"function_call": {"name": "look", "arguments": "{}"}},
        {"reasoning_content": "They ask."},
        {"thinking": "They ask."},
        {"weight": 0},
        {"refusal": "No."},
        {"channel": "analysis"},
        {"images": ["pot.png"]},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_a_turn_of_from_and_value_has_beside_them_what_a_message_has(beside: dict[str, Any]) -> None:
    as_message = messages(Q, A)
    as_message[1] |= beside
    as_turns = turns(Q, A)
    as_turns[1] |= beside
    try:
        expected: Any = normalise({"messages": as_message}).messages
    except RowRefused as refused:
        expected = refused.rule
        with pytest.raises(RowRefused) as raised:
            normalise({"conversations": as_turns})
        assert raised.value.rule == expected
    else:
        assert len(expected[1]) > 2
        assert normalise({"conversations": as_turns}).messages == expected


def test_what_a_turn_of_another_form_has_beside_its_text_is_read_or_named() -> None:
    beside = {"reasoning": "They ask.", "weight": 0, "mood": "calm"}
    for row in (
        {"conversation": [{"human": "Key?", "assistant": "Pot.", **beside}]},
        {"dialog": [{"speaker": "user", "text": "Key?"}, {"speaker": "assistant", "text": "Pot.", **beside}]},
    ):
        unread: Counter[str] = Counter()
        made = normalise(row, unread=unread)
        assert made.messages[1] == {
            "role": "assistant", "supervised": False, "content": "Pot.", "reasoning_content": "They ask.",
        }  # fmt: skip
        assert unread == {"messages: mood": 1}


def test_a_part_that_is_geminis_thought_is_none_of_the_reply() -> None:
    parts = [{"text": "They ask.", "thought": True}, {"text": "Pot."}]
    made = normalise({"contents": [{"role": "user", "parts": [{"text": "Key?"}]}, {"role": "model", "parts": parts}]})
    assert made.messages[1] == {"role": "assistant", "content": "Pot.", "reasoning_content": "They ask."}


def test_a_content_beside_a_value_is_named() -> None:
    row = turns(Q, A)
    row[1]["content"] = "Drawer."
    unread: Counter[str] = Counter()
    assert normalise({"conversations": row}, unread=unread).messages == messages(Q, A)
    assert unread == {"conversations: content": 1}


def test_thoughts_and_calls_in_columns_of_their_own() -> None:
    made = normalise({"Question": "Key?", "Complex_CoT": "They ask.", "Response": "Pot."})
    assert made.messages[-1] == {"role": "assistant", "content": "Pot.", "reasoning_content": "They ask."}
    tools = [{"name": "look", "parameters": {}}]
    made = normalise({"query": "Key?", "answers": '[{"name": "look", "arguments": {"at": 1}}]', "tools": tools})
    assert made.messages[-1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": 1}}
    assert made.tools[0]["function"]["name"] == "look"


CALLED = [
    {"role": "user", "content": "Key?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": 1}}}]},
    {"role": "tool", "content": "found", "tool_call_id": "c1"},
    {"role": "assistant", "content": "Pot."},
]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"at": {"type": "integer"}}}
BLOCKS: dict[str, dict[str, Any]] = {
    "Anthropic": {
        "tools": [{"name": "look", "description": "Looks.", "input_schema": SCHEMA}],
        "messages": [
            {"role": "user", "content": "Key?"},
            {"role": "assistant", "content": [{"type": "text", "text": "I look."},
                                              {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1",
                                          "content": [{"type": "text", "text": "found"}]}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Pot."}]},
        ],
    },
    "Bedrock": {
        "toolConfig": {"tools": [{"toolSpec": {"name": "look", "description": "Looks.",
                                               "inputSchema": {"json": SCHEMA}}}]},
        "messages": [
            {"role": "user", "content": [{"text": "Key?"}]},
            {"role": "assistant", "content": [{"text": "I look."},
                                              {"toolUse": {"toolUseId": "c1", "name": "look", "input": {"at": 1}}}]},
            {"role": "user", "content": [{"toolResult": {"toolUseId": "c1", "content": [{"text": "found"}]}}]},
            {"role": "assistant", "content": [{"text": "Pot."}]},
        ],
    },
    "Gemini": {
        "tools": [{"functionDeclarations": [{"name": "look", "description": "Looks.", "parameters": SCHEMA}]}],
        "contents": [
            {"role": "user", "parts": [{"text": "Key?"}]},
            {"role": "model", "parts": [{"text": "I look."}, {"functionCall": {"name": "look", "args": {"at": 1}}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "look", "response": {"is": "found"}}}]},
            {"role": "model", "parts": [{"text": "Pot."}]},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("publisher", BLOCKS)
def test_calls_and_results_among_a_contents_parts_are_turns_of_their_own(publisher: str) -> None:
    made = normalise(BLOCKS[publisher])
    expected = json.loads(json.dumps(CALLED))
    if publisher == "Gemini":  # calls have no ids there, and a result is an object
        expected[1]["tool_calls"][0]["id"] = "call00000"
        expected[2] = {"role": "tool", "content": '{"is": "found"}', "name": "look"}
    assert made.messages == expected
    function = {"name": "look", "description": "Looks.", "parameters": SCHEMA}
    assert made.tools == [{"type": "function", "function": function}]


def test_a_row_that_is_its_turns() -> None:
    for row in (messages(S, Q, A), turns(S, Q, A), [{"human": "Key?", "assistant": "Pot."}]):
        assert normalise(row).messages[-1] == {"role": "assistant", "content": "Pot."}


def call(arguments: Any) -> dict[str, Any]:
    asked = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    return {"messages": [*messages(Q), asked, {"role": "tool", "content": "r"}, *messages(A)]}


@pytest.mark.parametrize(
    ("arguments", "repairs"),
    [
        ({"at": 1}, []),
        ('{"at": 1}', []),
        (json.dumps('{"at": 1}'), ["encoded-twice"]),
        ("{'at': 1}", ["python-notation"]),
    ],
)
def test_arguments_in_any_coding_are_the_same_object(arguments: Any, repairs: list[str]) -> None:
    made = normalise(call(arguments))
    assert made.messages[1]["tool_calls"][0]["function"]["arguments"] == {"at": 1}
    assert made.repairs == repairs


def test_nulls_of_a_table_are_absent_keys_in_tools_and_calls_alone() -> None:
    row = call({"lat": None, "at": {"x": 1, "y": None}, "all": [None], "text": '{"lat": null}'})
    row["tools"] = [{"name": "f", "parameters": {"properties": {"lat": {"type": "number"}, "lon": None}}}]
    row["messages"][0]["name"] = None
    own = normalise(row)
    assert own.messages[1]["tool_calls"][0]["function"]["arguments"]["lat"] is None
    found: list[str] = []
    made = without_absent(row, found)
    assert found == ["lat", "y", "lon"]
    assert made["messages"][0]["name"] is None
    arguments = {"at": {"x": 1}, "all": [None], "text": '{"lat": null}'}
    assert made["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments
    assert made["tools"][0]["parameters"] == {"properties": {"lat": {"type": "number"}}}


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {"at": 1, "lat": None}}]}],
        [{"role": "assistant", "content": [{"toolUse": {"name": "f", "input": {"at": 1, "lat": None}}}]}],
        [{"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"at": 1, "lat": None}}}]}],
    ],
    ids=["Anthropic", "Bedrock", "Gemini"],
)
def test_nulls_of_a_table_are_absent_keys_in_blocks_too(turns: list[dict[str, Any]]) -> None:
    found: list[str] = []
    asked = {"role": "user", "parts" if "parts" in turns[0] else "content": [{"text": "Where?"}]}
    row = {"contents" if "parts" in turns[0] else "messages": [asked, *turns]}
    made = normalise(without_absent(row, found))
    assert made.messages[1]["tool_calls"][0]["function"]["arguments"] == {"at": 1}
    assert found == ["lat"]


@pytest.mark.parametrize("arguments", ['{"at": 1, "at": 2}', json.dumps('{"at": {"x": 1, "x": 2}}')])
def test_a_key_that_stands_twice_in_a_text_is_refused(arguments: str) -> None:
    with pytest.raises(RowRefused, match=r"tool_calls\[0\]\.arguments: key '(at|x)' stands twice"):
        normalise(call(arguments))


def test_a_reply_beside_turns_that_end_with_a_question_is_not_passed_over() -> None:
    row = {"messages": [*messages(Q), *messages(A), *messages(Q2)], "response": "Quay."}
    with pytest.raises(RowRefused, match=r"'response' may be its reply: --map question=messages"):
        normalise(row)
    made = normalise(row, mapping={"question": "messages"})
    assert made.messages == [*row["messages"], {"role": "assistant", "content": "Quay."}]
    assert normalise({**row, "messages": row["messages"][:2]}).messages == row["messages"][:2]


def test_what_an_alpaca_row_has_beside_its_columns_is_read() -> None:
    unread: Counter[str] = Counter()
    tools = [{"name": "f", "parameters": {}}]
    row = {
        "instruction": "Key?", "context": "It's in the pot.", "output": "Pot.", "thinking": "Hm.", "topic": "keys",
        "system_prompt": "Be brief.", "tools": json.dumps(tools),
    }  # fmt: skip
    made = normalise(row, unread=unread)
    assert made.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Key?\nIt's in the pot."},
        {"role": "assistant", "content": "Pot.", "reasoning_content": "Hm."},
    ]
    assert [tool["function"] for tool in made.tools] == tools
    assert unread == {"topic": 1}
    pair = normalise({"prompt": "Key?", "completion": "Pot.", "thinking": "Hm."})
    assert pair.messages[1]["reasoning_content"] == "Hm."
    with pytest.raises(RowRefused, match="context: a list where text belongs"):
        normalise({**row, "context": ["It's in the pot."]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a <image> here", "image": "a.jpg"}, "image: a column of images"),
        ({"question": "a", "context": {"b": 1}, "answer": "c"}, "context: an object where text belongs"),
        ({"segments": [{"label": True, "text": "a"}]}, "segments with a mask of their own"),
        ({"instruction": {"0": "a"}, "output": {"0": "b"}}, "pandas wrote the table by columns"),
        ({"my column": "a", "answer": "b"}, "--map 'instruction=my column' --map output=answer"),
        ({"prompt": "a", "test": "b", "entry": "c"}, "--map instruction=prompt --map output=COLUMN"),
        ({"chat": {"turn_1": {"Commands": "<|Commands|>: Search()<eoc>"}}}, "MOSS's own notation"),
        ({"system": "SYSTEM: a", "chat": "USER: b ASSISTANT: c"}, "'chat' is one text of several turns; write them as"),
        ({"system": "a", "answer": "b"}, "--map instruction=COLUMN --map output=answer"),
        ({"dialogue": "A: b", "summary": "c"}, "--map instruction=dialogue --map output=summary"),
        ({"text": "a", "summary": "b"}, "as raw text: --format text"),
        ({"prompt": "a", "text": "b"}, "--map instruction=prompt --map output=text; as raw text: --format text"),
        ({"role": "user", "content": "a"}, "one turn of a conversation in each row"),
        ({"instruction": "a", "instances": [{"output": "b"}, {"output": "c"}]}, "2 examples of one instruction"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "refusal": "c"}]},
            "messages[1].refusal: a refusal beside a content",
        ),
        (
            {"messages": [*messages(Q), {"role": "assistant", "channel": "analysis", "content": "Hm."}, *messages(A)]},
            "messages[1].channel: a message of its own in the channel 'analysis'",
        ),
        (
            {"messages": [*messages(Q), {"role": "assistant", "content": "b", "thinking": "c", "reasoning": "d"}]},
            "messages[1].reasoning_content: another thought of this turn stands elsewhere in it",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "a", "image_url": "b"}]}, *messages(A)]},
            "messages[0].content[0].image_url: beside a text; only text is trained on",
        ),
        (
            {"prompt": [*messages(Q), *messages(A)], "completion": messages(A)},
            "completion: the prompt ends with a reply: the completion may go on with it",
        ),
        ({"messages": "[{'role': array(1)}]"}, "messages: text that is no JSON"),
        ({"conversations": "[" * 5000}, "conversations: text that is no JSON"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowRefused) as refused:
        normalise(row)
    assert message in str(refused.value)


def test_a_picture_beside_raw_text_is_one_more_column_that_is_not_read() -> None:
    unread: Counter[str] = Counter()
    assert normalise({"text": "A page.", "image": "a.jpg"}, unread=unread).text == "A page."
    assert list(unread) == ["image"]


def test_a_refusal_is_what_the_assistant_said() -> None:
    for reply in (
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": "No.", "refusal": None},
    ):
        made = normalise({"messages": [*messages(Q), reply]})
        assert made.messages[-1] == {"role": "assistant", "content": "No."}


def test_openais_older_files_name_their_tools_functions() -> None:
    function = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
    called = [
        *messages(Q),
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"in": "pot"}'}},
        {"role": "function", "name": "look", "content": "A key."},
        *messages(A),
    ]
    unread: Counter[str] = Counter()
    old = normalise({"messages": called, "functions": [function]}, unread=unread)
    new = normalise({"messages": called, "tools": [{"type": "function", "function": function}]})
    assert (old.tools, old.messages, list(unread)) == (new.tools, new.messages, [])
    assert [m["role"] for m in old.messages] == ["user", "assistant", "tool", "assistant"]


def test_a_map_the_wrong_way_round_is_told() -> None:
    with pytest.raises(RowRefused, match="so --map instruction=frage"):
        normalise({"frage": "Key?", "antwort": "Pot."}, mapping={"frage": "instruction", "antwort": "output"})


def test_keys_of_turns_that_are_not_read_are_named() -> None:
    said = {"role": "assistant", "content": "Pot.", "mask": 1, "weight": 1, "audio": None, "channel": "final"}
    unread: Counter[str] = Counter()
    assert normalise({"messages": [*messages(Q), said, *messages(Q2), said]}, unread=unread).messages[1:2] == messages(
        A
    )
    normalise({"conversations": [*turns(Q), {**turns(A)[0], "score": 4}]}, unread=unread)
    assert unread == {"messages: mask": 1, "conversations: score": 1}
    # Only replies are learnt: what asks for more isn't done unsaid.
    asked = [{**messages(Q)[0], "train": True}, *messages(A), {**messages(Q2)[0], "train": False}, *messages(A)]
    normalise({"messages": asked}, unread=unread)
    assert unread["messages: train"] == 1


def test_the_name_of_a_speaker_is_not_read_and_that_of_a_tool_is() -> None:
    unread: Counter[str] = Counter()
    result = {"role": "tool", "name": "f", "content": "1"}
    row = call({})
    row["messages"] = [*row["messages"][:2], result, {"role": "assistant", "content": "One."}]
    assert normalise(row, unread=unread).messages[2]["name"] == "f"
    assert not unread
    row["messages"][0] |= {"name": "Ann"}
    assert "name" not in normalise(row, unread=unread).messages[0]
    assert unread == {"messages: name": 1}
