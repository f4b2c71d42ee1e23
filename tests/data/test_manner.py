"""What rows and runs set in a template: variables, the date, which replies are learnt."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.config import Config
from slimtune.data.conversation import RowRefused, normalise
from slimtune.data.preflight import content_key, examine
from slimtune.data.render import ChatRenderer, Manner, prompt_ids
from slimtune.errors import UserError
from tests.data import judge
from tests.data.conversations import TOOL

ASK = {"role": "user", "content": "Where?"}
REPLY = {"role": "assistant", "content": "Here."}
Kind = Callable[[str], PreTrainedTokenizerBase]


@pytest.fixture
def kind() -> Kind:
    folder = Path(__file__).parent / "templates" / "kinds"
    return lambda name: judge.tokenizer_for((folder / f"{name}.jinja").read_text(encoding="utf-8"))


def learnt(renderer: ChatRenderer, row: dict[str, Any]) -> list[str]:
    """The supervised text of each document."""
    drafts = renderer.drafts(normalise(row))
    return ["".join(piece.text for piece in draft.pieces if piece.supervised) for draft in drafts]


OFF = [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"loss_weight": 0.0}]


@pytest.mark.parametrize("off", OFF)
def test_a_reply_that_isnt_to_be_learnt_is_shown(kind: Kind, off: dict[str, Any]) -> None:
    renderer = ChatRenderer(kind("plain"))
    row = {"messages": [ASK, {**REPLY, "content": "5", **off}, ASK, {**REPLY, "weight": 1}]}
    conversation = normalise(row)
    (draft,) = renderer.drafts(conversation)
    assert draft.notes == ["unsupervised-reply"]
    assert "".join(piece.text for piece in draft.pieces if piece.supervised) == "Here.<|im_end|>"
    assert "5" in [piece.text for piece in draft.pieces]


def test_a_reply_that_isnt_to_be_learnt_is_none_of_all_text(kind: Kind) -> None:
    messages = [ASK, {**REPLY, "content": "5", "weight": 0}, ASK, REPLY]
    (draft,) = ChatRenderer(kind("plain")).drafts(normalise({"messages": messages}), "all")
    unlearnt = "".join(piece.text for piece in draft.pieces if not piece.supervised)
    assert unlearnt == "5<|im_end|>"
    assert len(draft.pieces) > 6
    messages[1] |= {"reasoning_content": "Hm."}  # which the template shows in the last reply alone
    with pytest.raises(RowRefused, match="train_on: all would learn it"):
        ChatRenderer(kind("last-thinks")).drafts(normalise({"messages": messages}), "all")


def test_sharegpt_turns_may_be_kept_out_too(kind: Kind) -> None:
    turns = [("human", "a", 1), ("gpt", "b", 0), ("human", "c", 1), ("gpt", "d", 1)]
    row = {"conversations": [{"from": who, "value": text, "weight": weight} for who, text, weight in turns]}
    assert learnt(ChatRenderer(kind("plain")), row) == ["d<|im_end|>"]


def test_a_row_sets_the_templates_variables_over_the_runs(kind: Kind) -> None:
    tokenizer = kind("last-thinks")
    row = {"messages": [ASK, REPLY]}
    thinking, not_thinking = "<think>\n\n</think>\n\nHere.<|im_end|>", "Here.<|im_end|>"
    assert learnt(ChatRenderer(tokenizer), row) == [thinking]
    off = ChatRenderer(tokenizer, Manner(variables={"enable_thinking": False}))
    assert learnt(off, row) == [not_thinking]
    for renderer, value, expected in ((ChatRenderer(tokenizer), False, not_thinking), (off, True, thinking)):
        assert learnt(renderer, {**row, "chat_template_kwargs": {"enable_thinking": value}}) == [expected]
    asked = prompt_ids(tokenizer, [ASK], variables={"enable_thinking": False})
    assert asked == prompt_ids(tokenizer, [ASK], manner=Manner(variables={"enable_thinking": False}))
    assert asked == tokenizer.apply_chat_template(
        [ASK], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )


def test_a_variable_that_the_template_doesnt_have_is_said(kind: Kind) -> None:
    tokenizer = kind("last-thinks")
    with pytest.raises(UserError, match="Did you mean 'enable_thinking'"):
        ChatRenderer(tokenizer, Manner(variables={"enable_thinkin": False}))
    (draft,) = ChatRenderer(tokenizer).drafts(normalise({"messages": [ASK, REPLY], "chat_template_kwargs": {"x": 1}}))
    assert draft.notes == ["unknown-variables"]
    with pytest.raises(UserError, match="no such variable"):
        prompt_ids(tokenizer, [ASK], variables={"x": 1})
    with pytest.raises(UserError, match="messages is no variable"):
        ChatRenderer(tokenizer, Manner(variables={"messages": []}))


def test_the_date_is_the_runs(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = kind("dated")
    day = date(2024, 2, 29)
    text = tokenizer.decode(prompt_ids(tokenizer, [ASK], manner=Manner(today=day)))
    assert "Today Date: 29 Feb 2024" in text
    assert date.today().strftime("%d %b %Y") in tokenizer.decode(prompt_ids(tokenizer, [ASK]))
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Where?", "output": "Here."}\n')
    config = Config.make(data=str(file), date="2024-02-29", max_length=4096)
    ids, _ = examine(config, tokenizer).train[0]
    assert "29 Feb 2024" in tokenizer.decode(ids)
    later = config.model_copy(update={"date": date(2024, 3, 1)})
    assert examine(later, tokenizer).key != examine(config, tokenizer).key
    plain = kind("plain")
    assert content_key(config, plain, [], []) == content_key(later, plain, [], [])


def test_a_manner_is_recorded_with_the_run() -> None:
    config = Config.make(date="2024-02-29", template_vars={"enable_thinking": False}, allow_control_tokens=True)
    assert Manner.recorded(config.model_dump(mode="json")) == Manner.of(config)
    assert Manner.recorded({}) == Manner()


def test_named_templates(kind: Kind) -> None:
    tokenizer = kind("last-thinks")
    default = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
    default += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    tokenizer.chat_template = {"default": default, "tool_use": tokenizer.chat_template}
    call = next(case for case in judge.CASES if case.name == "call")
    oracle = judge.Oracle(tokenizer)
    for case in (call, judge.CASES[0]):
        assert judge._judge("named", case, oracle, ChatRenderer(tokenizer)).verdict == "right"
    assert "<tools>" not in tokenizer.decode(prompt_ids(tokenizer, [ASK]))


def test_a_part_of_a_call_that_is_left_out_is_refused(kind: Kind) -> None:
    tokenizer = kind("squeezed")
    tokenizer.chat_template = tokenizer.chat_template.replace("v if v is string else v | tojson", "v")
    case = next(case for case in judge.CASES if case.name == "nested arguments")
    verdict = judge._judge("squeezed", case, judge.Oracle(tokenizer), ChatRenderer(tokenizer))
    assert verdict.verdict == "refused rightly"
    assert "as Python would" in verdict.why


@pytest.mark.parametrize(("as_json", "notes"), [(True, []), (False, ["python-values"])])
def test_values_that_a_template_writes_as_python_does_are_noted(kind: Kind, as_json: bool, notes: list[str]) -> None:
    tokenizer = kind("squeezed")
    if not as_json:
        tokenizer.chat_template = tokenizer.chat_template.replace("v if v is string else v | tojson", "v")
    call = {"function": {"name": "look", "arguments": {"place": "pot", "deep": False, "old": None}}}
    row = {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [TOOL]}
    renderer = ChatRenderer(tokenizer)
    assert ("None" in learnt(renderer, row)[0]) is not as_json
    assert [
        note for draft in renderer.drafts(normalise(row)) for note in draft.notes if note == "python-values"
    ] == notes


@pytest.mark.parametrize("content", ["    indented\n  code", "Here."])
def test_a_thought_that_the_prompt_opens_leaves_the_replys_indent(kind: Kind, content: str) -> None:
    (text,) = learnt(ChatRenderer(kind("opened")), {"messages": [ASK, {**REPLY, "content": content}]})
    assert text.endswith(content + "<|EndOfReply|>")
    inside = {**REPLY, "content": "<think>\nWhy.\n</think>\n\nHere."}
    (text,) = learnt(ChatRenderer(kind("opened")), {"messages": [ASK, inside]})
    assert text.endswith("</think>\n\nHere.<|EndOfReply|>")
