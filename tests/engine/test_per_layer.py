"""Layers' inputs beside the stream: their table in RAM, and the adapter on their projection."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from slimtune.engine import CannotFuse, Engine, fuse
from slimtune.engine.inputs import Inputs
from slimtune.engine.per_layer import keep_in_ram
from tests.engine import models


def _gradients(model: Any, engine: Engine) -> dict[str, torch.Tensor]:
    engine.flat.grad.zero_()
    engine.forward_backward(models.pack(), 40)
    return models.gradients(model)


def test_a_table_in_ram_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose device buffer is filled from the host."""
    model: Any = models.add_lora(models.make_base("gemma4-e2b"))
    expected = _gradients(model, Engine(model, dtype=torch.float32, tokens=64))
    table = model.get_base_model().model.embed_tokens_per_layer.weight.detach()
    monkeypatch.setattr(Engine, "_table_in_ram", lambda _: table)
    engine = Engine(model, dtype=torch.float32, tokens=64)
    assert engine.in_ram == 0
    monkeypatch.setattr(Engine, "_table_rows", lambda self, key: Inputs.table_rows(self._inputs, key))
    for _ in range(3):  # more micro-batches than there are host buffers
        actual = _gradients(model, engine)
    assert models.worst_error(actual, expected) == 0.0


def test_a_table_in_ram_stays_there() -> None:
    model: Any = models.make_base("gemma4-e2b")
    tokens = models.pack()["input_ids"]
    expected = model(tokens).logits
    table = model.model.embed_tokens_per_layer
    keep_in_ram(table)
    for moved in (model, deepcopy(model)):
        assert torch.equal(moved(tokens).logits, expected)
        names = [name for name, parameter in moved.to("meta").named_parameters() if parameter.device.type == "cpu"]
        assert names == ["model.embed_tokens_per_layer.weight"]
    assert isinstance(table, torch.nn.Embedding)


def test_parts_of_documents_give_the_same_gradients() -> None:
    """What is lent belongs to one part."""
    model = models.add_lora(models.make_base("gemma4-e2b"))
    engine = Engine(model, dtype=torch.float32, tokens=64)
    whole = _gradients(model, engine)
    engine.plan = replace(engine.plan, part_tokens=30)
    assert models.worst_error(_gradients(model, engine), whole) < 1e-5


def test_the_projections_adapter_alone_gets_its_gradient_through_every_layer() -> None:
    model = models.add_lora(models.make_base("gemma4-e2b"), target_modules=["per_layer_model_projection"])
    _, expected = models.reference(model, models.pack(), 40)
    assert models.worst_error(_gradients(model, Engine(model, dtype=torch.float32, tokens=64)), expected) < 1e-4


def test_embedded_tokens_that_train_are_refused() -> None:
    """Their gradient runs through the layers' inputs too."""
    model = models.add_lora(models.make_base("gemma4-e2b"), modules_to_save=["embed_tokens"])
    with pytest.raises(CannotFuse, match="per-layer inputs are made of trains"):
        fuse(model)


def test_no_two_sites_draw_the_same_dropout_masks() -> None:
    engine = Engine(models.add_lora(models.make_base("gemma4-e2b")), dtype=torch.float32, tokens=64)
    assert engine._per_layer is not None
    streams = [site.stream for layer in engine.layers for site in layer.sites] + [engine._per_layer.site.stream]
    assert len(set(streams)) == len(streams)
