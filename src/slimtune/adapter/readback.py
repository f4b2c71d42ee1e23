"""The last proof of a run: its adapter, read back from the disk into a fresh base, is whole and does something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from slimtune.adapter.files import attach_adapter
from slimtune.adapter.settings import ADAPTER_WEIGHTS
from slimtune.adapter.state import adapter_tensors
from slimtune.base.quantize import is_adapters

__all__ = ["ReadBack", "read_back"]


@dataclass(frozen=True)
class ReadBack:
    """What was found."""

    keys_match: bool
    """The file's tensors are exactly those that the adapter has in the model, and are there bit by bit."""
    all_finite: bool
    outputs_differ: bool
    largest_difference: float
    """Largest difference of a logit with the adapter on and off."""

    @property
    def problem(self) -> str:
        """What is wrong with the adapter; empty if nothing is."""
        if not self.all_finite:
            return "it holds a NaN or an infinity"
        if not self.keys_match:
            return "its tensors are not those of the model"
        return "" if self.outputs_differ else "it changes nothing: outputs with it and without it are equal"


@torch.no_grad()
def read_back(
    base: PreTrainedModel, folder: Path, ids: list[int], then: Callable[[PeftModel], None] | None = None
) -> ReadBack:
    """Attach the adapter in ``folder`` to a fresh base and look at it.

    Args:
        base: Just loaded, not wrapped.
        folder: With ``adapter_model.safetensors`` and ``adapter_config.json``.
        ids: Some tokens to run, at least one.
        then: Called with the model, if nothing is wrong with its adapter.
    """
    saved = load_file(folder / ADAPTER_WEIGHTS)
    model: PeftModel = attach_adapter(base, folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapters(name))
    loaded = adapter_tensors(model)
    matching = saved.keys() == loaded.keys() and all(
        torch.equal(saved[name].to(loaded[name].dtype), loaded[name].detach().cpu()) for name in saved
    )
    model.eval()
    tokens = torch.tensor([ids], device=base.device)
    on = model(input_ids=tokens).logits.float()
    with model.disable_adapter():
        off = model(input_ids=tokens).logits.float()
    difference = float((on - off).abs().max())
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in saved.values()) and difference == difference
    found = ReadBack(matching, finite, difference > 0.0, difference)
    if then is not None and not found.problem:
        then(model)
    return found
