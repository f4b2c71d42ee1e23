"""Tiny models that answer, of the kinds of architecture that decode differently, and what they say without a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from slimtune.adapter.lora import lora_config
from slimtune.adapter.targets import find_targets
from slimtune.config import Config
from slimtune.use.load import Found, Opened
from tests.families.tiny import SIZES, SPECIAL, VOCABULARY, made, small_config, tokenizer

STOP = SPECIAL.index("<|im_end|>")
WINDOW = SIZES["sliding_window"]


def make_opened(family: str) -> Opened:
    """A model as the verbs have it, whose replies go on changing: a head that is tied says what it was told."""
    return _opened(family, made(family))


def make_turning(turns: int, family: str = "phi3") -> Opened:
    """As Phi-3's long models are: in a text of more than ``turns`` tokens all are turned by other angles."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": turns,
        "short_factor": [1.0] * 8, "long_factor": [4.0 + at for at in range(8)],
    }  # fmt: skip
    own = {"rope_parameters": rope, "original_max_position_embeddings": turns, "sliding_window": None}
    torch.manual_seed(0)
    config = small_config(family)
    return _opened(family, AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | own)))


def _opened(family: str, model: Any) -> Opened:
    model.eval().requires_grad_(False)
    head = model.get_output_embeddings()
    draw = torch.Generator().manual_seed(7)
    head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=draw) * 0.2, requires_grad=False)
    return Opened(Found(family, Path(family), None, None), model, tokenizer(), (STOP,))


def adapted(opened: Opened) -> Opened:
    """The same with an adapter on all of its linear layers and experts, whose matrices are random."""
    config = Config.make(targets="all-linear", lora_r=4, lora_dropout=0.0)
    model: Any = get_peft_model(opened.model, lora_config(config, find_targets(config, opened.model)))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return replace(opened, model=model.eval().requires_grad_(False))


def prompts(*lengths: int, shared: int = 0) -> list[list[int]]:
    """Random tokens, the first ``shared`` of each the same."""
    draw = torch.Generator().manual_seed(5)
    start = _tokens(shared, draw)
    return [start + _tokens(length - shared, draw) for length in lengths]


@torch.inference_mode()
def greedy(opened: Opened, prompt: list[int], tokens: int) -> list[int]:
    """What the model says to ``prompt`` alone, computed from the first token at every step, without any cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens:
        token = int(opened.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == STOP:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _tokens(count: int, draw: torch.Generator) -> list[int]:
    ids: list[int] = torch.randint(len(SPECIAL), VOCABULARY, (count,), generator=draw).tolist()
    return ids
