"""What layers keep in RAM: the same gradients to the bit, and no memory that a copy still needs is given away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from slimtune.engine import Engine
from slimtune.engine import engine as engine_module
from slimtune.engine.blocks import Keep, Memory
from slimtune.engine.decoder import Saved
from slimtune.engine.memory import MemoryPlan, plan_memory
from slimtune.engine.offload import KeptInRam
from tests.engine import models
from tests.engine.copies import LateCopies


def engine_of(model: nn.Module, ram: int, keep: Keep = Keep.INPUT) -> Engine:
    """With the least memory; weights stay where they are. In RAM layers keep so much."""

    def resident(layers: Any, tokens: int, *args: Any, **options: Any) -> MemoryPlan:
        plan = plan_memory(layers, tokens, *args, **{**options, "stored": ()})
        memory = Memory(plan.part_tokens, plan.mlp_tokens, options["ways"], plan.padded_room, plan.sparing)
        lent = {index: layers[index].kept_bytes(memory, Keep.INPUT) - plan.ram_sizes[0] for index in plan.in_ram}
        sizes = tuple(layers[index].kept_bytes(memory, keep) - lent[index] for index in plan.in_ram)
        levels = tuple(keep if index in plan.in_ram else level for index, level in enumerate(plan.keep))
        return replace(plan, ram_sizes=sizes, keep=levels)

    with mock.patch.object(engine_module, "plan_memory", resident):
        return Engine(model, dtype=torch.float32, tokens=64, memory=0, ram=ram)


@pytest.mark.parametrize(
    ("family", "keep"),
    [
        ("qwen2", Keep.INPUT), ("gemma4-e2b", Keep.ATTENDED), ("qwen3_moe", Keep.GATES), ("gpt_oss", Keep.ATTENDED),
        ("qwen3_5_text", Keep.ATTENDED), ("qwen3_next", Keep.ALL),
    ],
)  # fmt: skip
def test_gradients_are_those_without(family: str, keep: Keep) -> None:
    """By copies as late as they may be, over two micro-batches: the second one's take the same places."""
    model = models.add_lora(models.make_base(family), target_modules="all-linear")
    found = []
    for ram in (0, 1 << 30):
        engine = engine_of(model, ram, keep)
        if ram:
            assert engine._away is not None
            assert engine.plan.in_ram == tuple(range(len(engine.layers) - 1))
            late = engine._away.copies = LateCopies()
        for seed in (2, 3):
            engine.forward_backward(models.pack(seed), 40)
        found.append(engine.flat.grad.clone())
        if ram:
            assert late.begun == late.done > 0
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


def test_layers_below_the_lowest_adapter_send_nothing() -> None:
    model = models.add_lora(models.make_base("qwen3"), target_modules=r".*layers\.1\..*(q_proj|down_proj)")
    gradients = []
    for ram in (0, 1 << 30):
        engine = engine_of(model, ram)
        if engine._away is not None:
            engine._away.copies = late = LateCopies()
        engine.forward_backward(models.pack(), 40)
        gradients.append(engine.flat.grad.clone())
    assert torch.equal(*gradients)
    assert late.begun == 2 * len([layer for layer in engine.plan.in_ram if layer >= engine._lowest])


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_pass_that_breaks_off_leaves_nothing_to_the_next(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that runs out of memory, before the step is repeated in smaller pieces."""
    model = models.add_lora(models.make_base("qwen2"))
    expected = engine_of(model, 0)
    expected.forward_backward(models.pack(), 40)
    engine = engine_of(model, 1 << 30)
    assert engine._away is not None
    engine._away.copies = late = LateCopies()
    with monkeypatch.context() as context:
        context.setattr(engine.layers[1], broken, mock.Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            engine.forward_backward(models.pack(3), 40)
    engine.flat.grad.zero_()
    engine.forward_backward(models.pack(), 40)
    assert torch.equal(engine.flat.grad, expected.flat.grad)
    assert late.begun == late.done


@pytest.mark.parametrize("fault", ["let go", "not waited for", "late"])
def test_the_copies_see_what_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this file relies on: a store that lets go of memory too early, or reads it too early, is found out."""

    right = KeptInRam.put

    def put(self: KeptInRam, layer: int, saved: Saved) -> Saved:
        waiting = right(self, layer, saved)
        _, copied = self._leaving.pop()
        if fault == "let go":
            self._leaving.append(([], copied))
        return waiting

    model = models.add_lora(models.make_base("qwen2"))
    expected = engine_of(model, 0)
    expected.forward_backward(models.pack(), 40)
    if fault == "late":
        monkeypatch.setattr(KeptInRam, "take", lambda self, layer, saved, lowest: self._fetch(layer, saved))
    else:
        monkeypatch.setattr(KeptInRam, "put", put)
    engine = engine_of(model, 1 << 30, Keep.ATTENDED)
    assert engine._away is not None
    engine._away.copies = LateCopies()
    if fault == "let go":
        with pytest.raises(AssertionError, match="given away"):
            engine.forward_backward(models.pack(), 40)
        return
    engine.forward_backward(models.pack(), 40)
    assert not torch.equal(engine.flat.grad, expected.flat.grad)


def test_its_bytes_are_exactly_those_of_the_plan() -> None:
    store = KeptInRam({0: 100, 2: 28, 5: 3}, torch.device("cpu"))
    assert store.nbytes == 131
    assert 2 in store
    assert 1 not in store


@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.ATTENDED, Keep.ATTENTION, Keep.GATES])
def test_all_that_was_kept_is_in_ram_and_nothing_is_left(keep: Keep) -> None:
    engine = engine_of(models.add_lora(models.make_base("qwen3")), 1 << 30, keep)
    away, left = engine._away, []
    assert away is not None

    def put(layer: int, saved: Saved) -> Saved:
        waiting = KeptInRam.put(away, layer, saved)
        places = [copied.numel() for copied in away._leaving[-1][0]]
        left.append(engine.plan.ram_sizes[layer] - sum(places))
        return waiting

    with mock.patch.object(away, "put", put):
        engine.forward_backward(models.pack(lengths=(64,)), 40)
    assert left == [0] * len(engine.plan.in_ram)
