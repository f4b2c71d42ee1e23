"""Ids and masks against the tokenizer's own rendering, for each family of chat templates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.data.conversation import normalise
from slimtune.data.render import prompt_ids, renderer_for

Make = Callable[[str], PreTrainedTokenizerBase]

SYSTEM = {"role": "system", "content": "You speak like a sailor."}
ONE = [
    {"role": "user", "content": "What floats?"},
    {"role": "assistant", "content": "A boat, mostly."},
]
MANY = [
    *ONE,
    {"role": "user", "content": "And what sinks?\nSay it briefly."},
    {"role": "assistant", "content": "An anchor does."},
    {"role": "user", "content": "船はどこ？ 🚢"},
    {"role": "assistant", "content": "海の上です。\n\nThat is all."},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "The tide at a port",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}},
    },
}
CALL = {"id": "call00000", "type": "function", "function": {"name": "get_tide", "arguments": {"port": "Brest"}}}
TOOLS = [
    {"role": "user", "content": "How is the tide in Brest?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"tide": "low"}', "tool_call_id": "call00000", "name": "get_tide"},
    {"role": "assistant", "content": "It is low."},
]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": ONE},
    "many": {"messages": MANY},
    "system": {"messages": [SYSTEM, *MANY]},
    "tools": {"messages": TOOLS, "tools": [TOOL]},
    "tools and system": {"messages": [SYSTEM, *TOOLS, *ONE], "tools": [TOOL]},
}


def documents(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], train_on: str = "assistant") -> Any:
    """[(ids, mask, notes)] of a row, and its repairs."""
    renderer = renderer_for(tokenizer)
    conversation = normalise(row)
    drafts = renderer.drafts(conversation, train_on)
    encoded = renderer.encoder.encode([draft.pieces for draft in drafts])
    return [(ids, mask, d.notes) for (ids, mask), d in zip(encoded, drafts, strict=True)], conversation.repairs


def spans(mask: np.ndarray) -> list[tuple[int, int]]:
    """The supervised stretches of a document."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_each_reply_follows_its_prompt_and_ends_in_the_end_mark(make_tokenizer: Make, family: str, kind: str) -> None:
    tokenizer, row = make_tokenizer(family), CONVERSATIONS[kind]
    made, _ = documents(tokenizer, row)
    end = {"phi3": "<|end|>"}.get(family, tokenizer.eos_token)
    end_id = tokenizer.convert_tokens_to_ids(end)
    starts = set()
    for ids, mask, _ in made:
        for start, stop in spans(mask):
            assert ids[stop - 1] == end_id
            starts.add(tuple(ids[:start].tolist()))
    messages = row["messages"]
    replies = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = {tuple(prompt_ids(tokenizer, messages[:at], tools=row.get("tools"))) for at in replies}
    assert starts == prompts
    assert len(prompts) == len(replies)


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_ids_are_those_of_the_tokenizer_on_the_templates_text(make_tokenizer: Make, family: str, kind: str) -> None:
    tokenizer, row = make_tokenizer(family), CONVERSATIONS[kind]
    made, repairs = documents(tokenizer, row)
    ids, _, notes = made[-1]
    if repairs or "thought-opened" in notes or "own-document" in notes:
        pytest.skip("not the template's text as it is")
    messages = row["messages"]
    if family == "deepseek-v3":
        messages = [m if "tool_calls" not in m else {**m, "content": None} for m in messages]
    text = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False)
    assert ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids


NEMO_LIKE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for turn in turns %}"
    "{%- if turn['role'] == 'user' %}{{- '[INST]' }}{%- if loop.last and system is defined %}"
    "{{- system + '\\n\\n' }}{%- endif %}{{- turn['content'] + '[/INST]' }}"
    "{%- else %}{{- turn['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
"""A system prompt that stands in the last user turn, and only while that turn ends the messages."""


@pytest.mark.parametrize("turns", [ONE, MANY])
def test_a_system_prompt_that_only_prompts_show_is_trained_as_it_will_be_asked(
    make_tokenizer: Make, turns: list[dict[str, str]]
) -> None:
    tokenizer = copy.deepcopy(make_tokenizer("mistral3"))
    tokenizer.chat_template = NEMO_LIKE
    messages = [SYSTEM, *turns]
    made, repairs = documents(tokenizer, {"messages": messages})
    assert repairs == []
    replies = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(made) == len(replies)
    for (ids, mask, _), at in zip(made, replies, strict=True):
        [(start, stop)] = spans(mask)
        asked = tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True)
        assert SYSTEM["content"] in asked
        assert ids[:start].tolist() == prompt_ids(tokenizer, messages[:at])
        assert ids.tolist() == tokenizer(asked + messages[at]["content"] + "</s>", add_special_tokens=False).input_ids
        assert stop == len(ids)
