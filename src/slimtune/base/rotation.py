"""A model's rotary embeddings as they turn a text by its own length."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

__all__ = ["forget_lengths"]


def forget_lengths(model: nn.Module) -> None:
    """Let rotary embeddings of the type ``dynamic`` begin anew with every forward pass.

    Past the model's positions their angles follow from the longest text, and Transformers keeps those of the longest
    that it has seen until a text of fewer than the model's positions comes: the same text has other logits before and
    after another one, and a loss hangs on the order of documents.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        each = {f"{layer}_": kind for layer, kind in kinds.items()} if isinstance(kinds, dict) else {"": kinds}
        prefixes = [prefix for prefix, kind in each.items() if "dynamic" in str(kind)]
        if prefixes:
            module.register_forward_pre_hook(partial(_as_made, prefixes=prefixes))


def _as_made(module: Any, inputs: Any, *, prefixes: list[str]) -> None:
    for prefix in prefixes:
        here = getattr(module, f"{prefix}inv_freq").device
        setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(here))
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
