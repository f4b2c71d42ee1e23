"""Weights in RAM: the same gradients to the bit, no buffer written while a layer reads it, and a model still whole."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from slimtune.base.quantize import keep_trainable_layout
from slimtune.engine import Engine
from slimtune.engine import engine as engine_module
from slimtune.engine.memory import MemoryPlan, plan_memory
from slimtune.engine.stored import places_of
from slimtune.engine.streamed import StreamedWeights, embedding_places, in_ram
from tests.engine import models
from tests.engine.copies import LateCopies


def engine_of(model: nn.Module, ram: int) -> Engine:
    """With the least memory; inputs stay where they are."""

    def planned(*args: Any, **options: Any) -> MemoryPlan:
        plan = plan_memory(*args, **options)
        assert not ram or len(plan.streamed) == len(options["stored"])
        return plan

    with mock.patch.object(engine_module, "plan_memory", planned):
        return Engine(model, dtype=torch.float32, tokens=64, memory=-(1 << 40), ram=ram)


def late(engine: Engine) -> LateCopies:
    """Copies as late as they may be, from now on."""
    assert engine._streamed is not None
    copies = engine._streamed.copies = LateCopies()
    return copies


def two_steps(engine: Engine) -> Tensor:
    for seed in (2, 3):
        engine.forward_backward(models.pack(seed), 40)
    return engine.flat.grad.clone()


def make(family: str, *, four_bit: bool = True, layers: int | None = None, **options: Any) -> nn.Module:
    base = models.make_base(family)
    model = models.add_lora(models.quantize(base, double=True) if four_bit else base, **options)
    keep_trainable_layout(model)
    return model


@pytest.mark.parametrize(
    ("family", "four_bit"),
    [("qwen2", True), ("qwen2", False), ("gemma4-e2b", True), ("qwen3_moe", True), ("gpt_oss", True),
     ("qwen3_5_text", True)],
)  # fmt: skip
def test_gradients_are_those_without(family: str, four_bit: bool) -> None:
    """By copies as late as they may be, over two micro-batches; then resident again, by an engine made anew."""
    model = make(family, four_bit=four_bit, target_modules="all-linear")
    resident = engine_of(model, 0)
    expected, loss = two_steps(resident), resident.evaluate(models.pack())[0]
    engine = engine_of(model, 1 << 30)
    copies = late(engine)
    assert torch.equal(two_steps(engine), expected)
    assert torch.equal(engine.evaluate(models.pack())[0], loss)
    assert copies.begun == copies.done > 0
    again = engine_of(model, 0)
    assert torch.equal(two_steps(again), expected)


def test_what_is_there_is_not_brought_again() -> None:
    """Three layers and two buffers: of a forward's and a backward's six, the last two of each are there at its turn."""
    engine = engine_of(make("qwen2"), 1 << 30)
    copies = late(engine)
    begun = []
    for _ in range(3):
        engine.forward_backward(models.pack(), 40)
        begun.append(copies.begun)
    assert begun == [4, 6, 8]


def test_the_layers_own_forward_finds_its_weights() -> None:
    """Samples, proofs and whoever else calls the model, between the engine's passes; gradients too."""
    model, batch = make("qwen3"), {"input_ids": torch.arange(3, 40)[None]}
    expected = model(**batch).logits
    wanted = torch.autograd.grad(expected.square().sum(), [p for p in model.parameters() if p.requires_grad])
    engine = engine_of(model, 1 << 30)
    late(engine)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    first = two_steps(engine)
    found = torch.autograd.grad(
        model(**batch).logits.square().sum(), [p for p in model.parameters() if p.requires_grad]
    )
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    engine.flat.grad.zero_()
    engine.draws = 0
    assert torch.equal(two_steps(engine), first)


def test_a_streamed_layers_tensors_are_whole_and_come_back() -> None:
    model = make("qwen3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = engine_of(model, 1 << 30)
    engine.forward_backward(models.pack(), 40)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    embedding = model.get_input_embeddings().weight
    assert engine.plan.embedding_bytes == embedding.nbytes
    assert in_ram(embedding_places(engine.decoder)) == embedding.nbytes
    assert engine.plan.streamed_bytes == sum(layer.stored_bytes for layer in engine.layers)
    assert sum(in_ram(layer.places) for layer in engine.layers) > 0
    engine_of(model, 0)
    assert not any(in_ram(places) for places in (embedding_places(engine.decoder), *(x.places for x in engine.layers)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gpt_oss"])
def test_a_model_moved_between_passes_stays_whole(family: str) -> None:
    """A trainer moves its model when training begins, after passes that left layers in buffers."""
    model = make(family)
    before = [bytes_of(parameter) for parameter in model.parameters() if not parameter.requires_grad]
    engine = engine_of(model, 1 << 30)
    engine.evaluate(models.pack())
    model.to("cpu")
    two_steps(engine)
    after = [bytes_of(parameter) for parameter in model.parameters() if not parameter.requires_grad]
    assert all(all(map(torch.equal, was, now)) for was, now in zip(before, after, strict=True))


def bytes_of(weight: Any) -> list[Tensor]:
    """Copies of what holds a frozen weight's bytes."""
    return [place.tensor.clone() for place in places_of(weight)]


@pytest.mark.parametrize("fault", ["not waited for", "one buffer"])
def test_the_copies_see_what_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this file relies on: weights that are read too early, or overwritten while they are read, are found out."""
    model = make("qwen2")
    expected = two_steps(engine_of(model, 0))
    if fault == "not waited for":
        monkeypatch.setattr(LateCopies, "wait", lambda self, copied: None)
    else:
        fetch = StreamedWeights._fetch

        def into_the_one_that_is_read(self: StreamedWeights, layer: int, computing: int | None) -> None:
            with mock.patch.object(StreamedWeights, "_put"):
                fetch(self, layer, None)

        monkeypatch.setattr(StreamedWeights, "_fetch", into_the_one_that_is_read)
    engine = engine_of(model, 1 << 30)
    late(engine)
    assert not torch.equal(two_steps(engine), expected)
