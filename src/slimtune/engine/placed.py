"""Carries a memory plan out: what is to be in RAM goes there, and what isn't comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from slimtune.engine.decoder import LayerComputation
from slimtune.engine.memory import MemoryPlan
from slimtune.engine.offload import KeptInRam
from slimtune.engine.ram import ram_to_lock
from slimtune.engine.streamed import StreamedWeights, embedding_places, make_resident, move_to_ram
from slimtune.engine.structure import Decoder
from slimtune.errors import UserError
from slimtune.ranks.host import here

__all__ = ["carry_out", "most_ram"]


def most_ram(device: torch.device) -> int:
    """Bytes of RAM that a plan may take beside a device, unless more or less is said."""
    return ram_to_lock() if device.type == "cuda" else 0


def carry_out(
    planned: Callable[..., MemoryPlan], decoder: Decoder, layers: Sequence[LayerComputation], device: torch.device
) -> tuple[MemoryPlan, StreamedWeights | None, KeptInRam | None]:
    """The plan, the weights that stream, and the places in RAM for what layers keep.

    Args:
        planned: Plans the memory, as :func:`slimtune.engine.memory.plan_memory` does, with all but ``lavish`` given.
        decoder: The model's.
        layers: Its layers.
        device: Where they compute.

    Raises:
        UserError: The system doesn't give the RAM that has to be.
    """
    plan = planned()
    away = _kept_in_ram(plan, device, must=not plan.spare_ram_bytes)
    # A system may lock less than is free. What only spares time isn't worth a run; all ranks plan alike.
    if plan.spare_ram_bytes and not here().least("RAM that spares time", away is not None):
        away, plan = None, planned(lavish=False)
        away = _kept_in_ram(plan, device, must=True)
    if plan.embedding_bytes:
        move_to_ram(embedding_places(decoder), device, "embedding")
    else:
        make_resident(embedding_places(decoder))
    for index, layer in enumerate(layers):
        if index not in plan.streamed:
            make_resident(layer.places)
    streamed = {index: layers[index] for index in plan.streamed}
    return plan, StreamedWeights(streamed, device) if streamed else None, away


def _kept_in_ram(plan: MemoryPlan, device: torch.device, *, must: bool) -> KeptInRam | None:
    """The places, if there are to be any; None too where the system doesn't give them, and they needn't be."""
    try:
        return KeptInRam(dict(zip(plan.in_ram, plan.ram_sizes, strict=True)), device) if plan.in_ram else None
    except UserError:
        if must:
            raise
        return None
