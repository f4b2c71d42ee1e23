"""What a model could before: the general questions with the adapter off and on, as chat would answer them."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from slimtune.data.render import Manner
from slimtune.errors import UserError
from slimtune.use import forgetting
from slimtune.use.ask import ask
from slimtune.use.forgetting import general_change
from slimtune.use.general import GENERAL
from slimtune.use.load import Opened


def test_both_sides_are_asked_as_chat_asks(
    opened: Opened, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, tokens = GENERAL[:4], 10
    for name, value in (("GENERAL", questions), ("TOKENS", tokens), ("LEAST", 2), ("GROUP", 2), ("SECONDS", 600.0)):
        monkeypatch.setattr(forgetting, name, value)
    beats: list[int] = []
    told: list[str] = []
    found = general_change(opened.model, tokenizer, Manner(), lambda: beats.append(1) is None, told.append)
    assert found is not None
    right = []
    for side in (opened.as_base, opened.as_tuned):
        with side():
            replies = ask(opened.model, tokenizer, [question.messages for question in questions], tokens)
        right.append([question.is_right(reply) for question, reply in zip(questions, replies, strict=True)])
    assert (found["questions"], found["before"], found["after"]) == (4, sum(right[0]), sum(right[1]))
    assert found["before"] > 0
    assert found["change"]["value"] == pytest.approx((sum(right[1]) - sum(right[0])) / 4)
    assert len(beats) > 8
    # Stopped, too slow, or not to be asked: nothing is said.
    assert general_change(opened.model, tokenizer, Manner(), lambda: False, told.append) is None
    monkeypatch.setattr(forgetting, "SECONDS", 0.0)
    assert general_change(opened.model, tokenizer, Manner(), lambda: True, told.append) is None
    for error in (UserError("no chat template"), torch.OutOfMemoryError("full")):

        def refuse(*words: object, error: Exception = error, **named: object) -> list[int]:
            raise error

        monkeypatch.setattr(forgetting, "prompt_ids", refuse)
        assert general_change(opened.model, tokenizer, Manner(), lambda: True, told.append) is None
    assert [line.partition(":")[0] for line in told] == [
        "in 0 s both sides answered 0 questions, too few to say something", "not asked", "not asked",
    ]  # fmt: skip
