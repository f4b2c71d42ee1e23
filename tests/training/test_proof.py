"""The loss that trains is the model's own, and adapters without a gradient are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from slimtune.errors import GuardStop
from slimtune.training.proof import is_expert, named, without_gradient
from tests.training.small import SmallRun
from tests.training.tiny import tiny

MakeRun = Callable[..., SmallRun]


def wrapped(family: str, **lora: Any) -> Any:
    return get_peft_model(tiny(family), LoraConfig(r=2, task_type="CAUSAL_LM", **lora))


def backward(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()


def test_an_adapter_is_judged_by_its_b() -> None:
    model = wrapped("llama", target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    ids = torch.arange(3, 20)[None]
    backward(model, ids)
    assert without_gradient(model) == ([], 4)
    for name, parameter in model.named_parameters():
        if "layers.1" in name:
            parameter.grad = None
        if "lora_A" in name and parameter.grad is not None:
            assert not parameter.grad.any(), "A's is zero as long as B is"
    assert without_gradient(model) == (["model.layers.1.self_attn.q_proj"], 4)
    assert without_gradient(model, ["model.embed_tokens"]) == ([], 1)


def test_an_expert_that_no_token_was_sent_to_is_found() -> None:
    model = wrapped("qwen3_moe", target_parameters=["mlp.experts.down_proj"])
    backward(model, torch.tensor([[5, 5]]))  # one kind of token: two of four experts a layer
    idle, looked_at = without_gradient(model)
    assert looked_at == 8
    assert all(map(is_expert, idle))
    assert 2 <= len(idle) <= 4
    assert named(idle) == f"model.layers.*.mlp.experts expert * × {len(idle)}"
    inner = [
        "model.layers.0.mlp.experts.base_layer expert 3",
        "model.layers.1.mlp.experts.base_layer.base_layer.weight",
    ]
    assert named(inner) == "model.layers.*.mlp.experts expert *, model.layers.*.mlp.experts.weight"
    backward(model, torch.arange(3, 100)[None])
    assert without_gradient(model, idle) == ([], len(idle))


def test_what_had_no_gradient_is_told_once_and_not_forgotten_by_a_checkpoint(make_run: MakeRun) -> None:
    run = make_run()
    idle = [p for name, p in run.model.named_parameters() if "layers.1.self_attn.v_proj.lora_B" in name]
    for parameter in idle:
        parameter.register_hook(torch.zeros_like)
    run.fit()
    assert [event for event in run.events if event["event"] == "gradients"] == [
        {"event": "gradients", "step": step, "without": ["model.layers.1.self_attn.v_proj"]} for step in (1, 12)
    ]
    assert [line for line in run.warnings if "gradient" in line] == [
        "no gradient in 1 step: model.layers.*.self_attn.v_proj"
    ]
    assert make_run().fit() is None
    assert run.progress.silent == ["model.layers.1.self_attn.v_proj"]


def test_a_run_in_which_nothing_learns_is_stopped_before_it_begins(make_run: MakeRun) -> None:
    run = make_run()
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            parameter.register_hook(torch.zeros_like)
    before = run.digest()
    with pytest.raises(GuardStop, match="no adapter gets a gradient"):
        run.fit()
    assert run.digest() == before
