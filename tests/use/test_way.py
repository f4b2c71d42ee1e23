"""A way that a model doesn't bear is found out before it answers anything, and the next slower one is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimtune.use.cache import BatchCache
from slimtune.use.generate import generate
from slimtune.use.rows import KeptRows
from slimtune.use.sampling import Sampling
from slimtune.use.way import way_of
from tests.use.families import greedy, make_opened, prompts

ASKED = prompts(9, 20, 27, shared=8)


def _answers(opened: Any) -> None:
    replies = {reply.index: reply.ids for reply in generate(opened, ASKED, Sampling(max_new_tokens=12))}
    assert [replies[index] for index in range(3)] == [greedy(opened, prompt, 12) for prompt in ASKED]


def test_a_layer_that_keeps_something_else_is_computed_alone() -> None:
    """DeepSeek's sparse attention keeps an index beside keys and values."""
    opened = make_opened("deepseek_v32")
    assert "one prompt is answered at a time" in str(way_of(opened).slow) or "slow" in str(way_of(opened).slow)
    _answers(opened)


@pytest.mark.parametrize("fault", ["shifted", "raises"])
def test_a_batch_that_would_be_wrong_is_answered_one_by_one(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model would be that counts what stands before a row's first token."""
    place = BatchCache.place

    def shifted(self: BatchCache, read: Any, rows: slice, of: int, lengths: list[int], width: int) -> None:
        if fault == "raises":
            raise NotImplementedError("no such thing")
        place(self, read, rows, of, [length - (length < width) for length in lengths], width)

    monkeypatch.setattr(BatchCache, "place", shifted)
    opened = make_opened("llama")
    way = way_of(opened)
    assert way.rows == 1
    assert str(way.slow).startswith("LlamaForCausalLM: one prompt is answered at a time (otherwise ")
    _answers(opened)


def test_without_any_cache_that_is_right_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = make_opened("llama")
    forward = opened.model.model.forward

    def forgetful(*arguments: Any, **named: Any) -> Any:
        kept = ("past_key_values", "cache")  # its name in Transformers to 5.23, and from 5.24 on
        return forward(*arguments, **{name: value for name, value in named.items() if name not in kept})

    monkeypatch.setattr(opened.model.model, "forward", forgetful)
    assert "every token computes the whole text again" in str(way_of(opened).slow)
    _answers(opened)


def test_rounding_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("llama", "qwen3_moe", "qwen3_5_text"):
        opened = make_opened(family)
        opened.model.to(torch.bfloat16)
        assert way_of(opened).slow is None
    step = KeptRows.step

    def noisy(self: KeptRows, ids: Tensor) -> Tensor:
        logits = step(self, ids)
        return logits + 0.05 * logits.std() * torch.randn(logits.shape).to(logits.dtype)

    monkeypatch.setattr(KeptRows, "step", noisy)
    opened = make_opened("llama")
    assert "otherwise its scores are" in str(way_of(opened).slow)  # in fp32 it is one
    opened = make_opened("llama")
    opened.model.to(torch.bfloat16)
    assert way_of(opened).slow is None


def test_a_model_that_transformers_makes_no_cache_for_is_computed_without() -> None:
    """BLT is three models in one, and its config has no number of layers."""
    opened = make_opened("blt")
    assert "every token computes the whole text again" in str(way_of(opened).slow)
    _answers(opened)
