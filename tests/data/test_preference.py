"""Preference data in its published shapes: refused unless asked for, then the better reply alone is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from slimtune.config import Config
from slimtune.data.conversation import normalise
from slimtune.data.preflight import examine, prove
from slimtune.data.rows import RowRefused
from slimtune.errors import UserError

ASK, GOOD, BAD = ({"role": role, "content": text} for role, text in (
    ("user", "Key?"), ("assistant", "Under the pot."), ("assistant", "Go away.")))  # fmt: skip
OLD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def shared(message: dict[str, str]) -> dict[str, str]:
    return {"from": "human" if message["role"] == "user" else "gpt", "value": message["content"]}


PAIRS: dict[str, tuple[dict[str, Any], int]] = {
    "TRL, text": ({"prompt": "Key?", "chosen": "Under the pot.", "rejected": "Go away."}, 1),
    "TRL, turns": ({"prompt": [*OLD, ASK], "chosen": [GOOD], "rejected": [BAD]}, 3),
    "the whole conversation twice": ({"chosen": [*OLD, ASK, GOOD], "rejected": [*OLD, ASK, BAD]}, 3),
    "UltraFeedback": (
        {"prompt": "Key?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]}, 1,
    ),
    "HH-RLHF": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Key?\n\nAssistant: Under the pot.",
         "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Key?\n\nAssistant: Go away."}, 3,
    ),
    "LLaMA-Factory, sharegpt": (
        {"conversations": [shared(turn) for turn in [*OLD, ASK]], "chosen": shared(GOOD), "rejected": shared(BAD)}, 3,
    ),
    "LLaMA-Factory, alpaca": (
        {"instruction": "Key?", "input": "", "chosen": "Under the pot.", "rejected": "Go away.",
         "history": [["Hi", "Hello."]]}, 3,
    ),
    "Orca": ({"question": "Key?", "chosen": "Under the pot.", "rejected": "Go away."}, 1),
    "OpenAI": ({"input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}, 1),
    "ms-swift": ({"messages": [ASK, GOOD], "rejected_response": "Go away."}, 0),
    "a list of outputs": ({"instruction": "Key?", "input": "", "output": ["Under the pot.", "Go away."]}, 0),
    "KTO": ({"prompt": "Key?", "completion": "Under the pot.", "label": True}, 1),
    "KTO from csv": ({"prompt": "Key?", "completion": "Under the pot.", "label": "True"}, 1),
    "KTO with turns": ({"messages": [ASK, GOOD], "label": True}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_refused_unless_asked_for_and_then_the_better_reply_is_the_completion(name: str) -> None:
    row, completion = PAIRS[name]
    with pytest.raises(RowRefused, match="preference data") as refused:
        normalise(row)
    assert refused.value.name == "preference"
    made = normalise(row, prefer="chosen")
    assert made.messages[-2:] == [ASK, GOOD]
    assert made.completion_from == completion
    assert "Go away." not in json.dumps(made.messages)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Key?", "response_0": "a", "response_1": "b", "better_response_id": 0},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"prompt": "Key?", "chosen": 4, "rejected": 5},
    ],
)
def test_what_does_not_say_which_reply_answers_what_stays_refused(row: dict[str, Any]) -> None:
    with pytest.raises(RowRefused):
        normalise(row, prefer="chosen")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, GOOD], "label": "greeting"},
        {"instruction": "Key?", "output": "Under the pot.", "label": 1},
        {"instruction": "Key?", "output": "Under the pot.", "rejected": None},
        {"text": "A film.", "label": True},
    ],
)
def test_labels_of_other_kinds_are_no_preference(row: dict[str, Any]) -> None:
    assert normalise(row)


@pytest.mark.parametrize(
    ("said", "wanted"), [(True, True), (False, False), ("desirable", True), ("undesirable", False)]
)
@pytest.mark.parametrize("name", ["label", "chosen", "is_preferred"])
def test_a_label_under_any_of_its_names_is_heard(name: str, said: bool | str, wanted: bool) -> None:
    row = {"prompt": "Key?", "response": "Pot.", name: said}
    if isinstance(said, str) and name != "label":  # a text there is a reply, or somebody's own word
        assert normalise(row)
        return
    with pytest.raises(RowRefused, match=f"stands in '{name}'"):
        normalise(row)
    if wanted:
        assert normalise(row, prefer="chosen").messages[-1]["content"] == "Pot."
        return
    with pytest.raises(RowRefused, match="isn't wanted"):
        normalise(row, prefer="chosen")


def test_rows_left_out_as_asked_count_as_dropped_but_stop_no_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"prompt": f"{n}?", "completion": f"It is {n}.", "label": n % 2 == 0} for n in range(6)]
    file = tmp_path / "kto.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="6 of 6 rows can't be trained on") as refused:
        prove(Config.make(data=str(file)), tokenizer)
    assert refused.value.way_out == "Take the better replies by --prefer chosen."
    proof = examine(Config.make(data=str(file), prefer="chosen"), tokenizer)
    assert proof.refusal is None
    assert proof.facts["dropped"] == {"not-preferred": 3}
    assert (proof.facts["rows_trained"], proof.facts["rows"]) == (3, 6)
    for number in range(3):
        ids, mask = proof.train[number]
        assert tokenizer.decode(ids[mask]).startswith(f"It is {2 * number}.")
    file.write_text("".join(json.dumps({**row, "label": False}) + "\n" for row in rows))
    with pytest.raises(UserError, match="no row has a reply that is wanted"):
        prove(Config.make(data=str(file), prefer="chosen"), tokenizer)


def test_two_replies_of_which_none_is_named_better_are_not_advised_to_be_preferred(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "arena.jsonl"
    file.write_text(json.dumps({"conversation_a": [ASK, GOOD], "conversation_b": [ASK, BAD], "winner": "model_a"}))
    with pytest.raises(UserError, match="which is better isn't read") as refused:
        prove(Config.make(data=str(file)), tokenizer)
    assert "Mend the rows" in str(refused.value.way_out)
    assert "--prefer" not in str(refused.value)
