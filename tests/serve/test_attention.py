"""Attention by request gives what Transformers' own path for continuous batching gives, in batches of every make-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from slimtune.serve.attention import attend_by_request
from slimtune.serve.models import sharing
from slimtune.serve.upstream import OLD_TRANSFORMERS
from tests.engine.models import make_base
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(OLD_TRANSFORMERS, reason="not used there: its cache is handed over in another way")

PROMPTS = [[7], list(range(40, 52)), list(range(100, 170)), list(range(40, 60))]


def logits_of_each_step(model: PreTrainedModel, by_request: bool) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """What the model says in each step, and the step's tokens and requests.

    Steps hold 24 tokens at most, so the long prompt is computed in parts, beside the others' next tokens.
    """
    model = sharing(model.eval())
    manager: Any = model.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(
            page_size=8, num_blocks=64, max_batch_tokens=24, max_requests_per_batch=4, auto_switch_to_flash=False
        ),
    )
    if by_request:
        attend_by_request(model)
    processor = manager._create_batch_processor()
    said: list[Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda module, given, made: said.append(made[0]))
    for number, prompt in enumerate(PROMPTS):
        manager.add_request(prompt, request_id=str(number), max_new_tokens=20)
    steps = []
    while processor.prepare_next_batch():
        batch = processor.inputs_and_outputs
        assert (batch.attention_mask is None) == by_request
        steps.append((batch.num_q_tokens, batch.num_request_in_batch))
        processor._generation_step(model)
        processor.update_batch()
    return said, steps


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_it_is_the_packages_own_attention(kind: str, tiny_model: Path) -> None:
    full = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa")
    model: Any = full if kind == "full" else make_base("mistral-window")
    expected, steps = logits_of_each_step(model, by_request=False)
    actual, same = logits_of_each_step(model, by_request=True)
    assert steps == same
    assert any(tokens == requests > 1 for tokens, requests in steps)
    assert any(tokens > requests > 1 for tokens, requests in steps)
    for one, other in zip(actual, expected, strict=True):
        # Every layer's sums run in another order.
        assert_close(one, other, dtype=torch.float32, factor=4)


def test_the_model_itself_keeps_its_attention(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa")
    attend_by_request(copy := sharing(model))
    assert copy.config._attn_implementation != "sdpa"
    assert model.config._attn_implementation == "sdpa"
