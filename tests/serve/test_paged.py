"""Continuous batching says what the model says without a cache, or it is known before that it doesn't."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from slimtune.serve import attention as attention_module
from slimtune.serve.api import Api
from slimtune.serve.engine import Engine
from slimtune.serve.in_turn import InTurn
from slimtune.serve.limits import Limits
from slimtune.serve.paged import make_manager, why_not_paged
from slimtune.serve.upstream import OLD_TRANSFORMERS
from slimtune.use.load import Opened
from slimtune.words import in_chinese
from tests.use.families import WINDOW, adapted, greedy, make_opened, make_turning, prompts

NEW = 12
ASKED = prompts(5, WINDOW + 9, 3 * WINDOW, 1)


def _paged(opened: Opened) -> list[list[int]]:
    """The engine's replies, its steps made by hand; a step is shorter than the long prompts."""
    model, manager = make_manager(opened, pages=40, step_tokens=24, requests=4)
    processor = manager._create_batch_processor()
    said: dict[str, list[int]] = {}
    processor.output_router.deliver_batch = lambda outputs: said.update(
        {o.request_id: o.generated_tokens for o in outputs}
    )
    for number, prompt in enumerate(ASKED):
        manager.add_request(prompt, request_id=str(number), max_new_tokens=NEW)
    with torch.inference_mode():
        while processor.prepare_next_batch():
            processor._generation_step(model)
            processor.update_batch()
    return [[token for token in said[str(number)] if token not in opened.stop_ids] for number in range(len(ASKED))]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_windows_sinks_and_experts_are_computed_together(family: str) -> None:
    opened = make_opened(family)
    assert why_not_paged(opened) is None
    assert _paged(opened) == [greedy(opened, prompt, NEW) for prompt in ASKED]


def test_an_adapter_on_experts_beside_sinks_is_computed_together() -> None:
    opened = adapted(make_opened("gpt_oss"))
    assert why_not_paged(opened) is None
    assert _paged(opened) == [greedy(opened, prompt, NEW) for prompt in ASKED]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("qwen3_5_text", "more than keys and values"),
        ("falcon_h1", "more than keys and values"),
        ("bloom", "a way of its own"),
        ("gemma2", "softcap"),
        ("gemma4_text", "head_dim"),
        ("llama4_text", "chunked_attention"),
        ("deepseek_v3", "same slice shapes"),
    ],
)
def test_what_it_leaves_out_is_known_before(family: str, why: str) -> None:
    assert why in str(why_not_paged(make_opened(family)))


def test_a_window_that_the_models_class_does_not_know_is_known_before() -> None:
    opened = make_opened("llama")
    opened.model.config.sliding_window = 4096  # longer than anything that is tried
    assert "its class has no window" in str(why_not_paged(opened))


def test_requests_that_would_turn_each_others_tokens_are_not_computed_together() -> None:
    opened = make_turning(90)
    reason = str(why_not_paged(opened))
    assert "more than 90 tokens" in reason
    assert "旋转" in in_chinese(reason)
    assert why_not_paged(opened, 90) is None


@pytest.mark.skipif(OLD_TRANSFORMERS, reason="attention by request isn't used there")
def test_scores_that_are_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = attention_module._attention
    monkeypatch.setattr(
        attention_module, "_attention", lambda q, k, v, scaling, window: attention(q, k, v, 2 * scaling, window)
    )
    assert "of their spread off" in str(why_not_paged(make_opened("llama")))


def test_the_server_takes_the_engine_that_is_right() -> None:
    with ThreadPoolExecutor(1) as computing:
        together = Api({"m": make_opened("mistral")}, Limits(cache_tokens=64, prompt_tokens=64), computing)
        assert isinstance(together.engines["m"], Engine)
        assert together.slow is None
        in_turn = Api({"m": make_opened("lfm2")}, Limits(), computing)
        assert isinstance(in_turn.engines["m"], InTurn)
        assert "one by one" in str(in_turn.slow)
