"""What rounding alone makes of a model: the least that can be asked of a copy whose weights lie in 16 bits."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["round_once_"]


@torch.no_grad()
def round_once_(model: Any, dtype: torch.dtype, seed: int) -> None:
    """Move every weight that an adapter stands beside as far as rounding to ``dtype`` could, at random.

    Rounding a number moves it by up to half of the distance to the next one, which is 2^e times the dtype's epsilon
    for numbers between 2^e and 2^(e + 1).

    Args:
        model: PEFT's wrapping of a model whose weights lie in fp32; they are changed.
        dtype: 16 bits.
        seed: Of the draws.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".base_layer." not in name:
            continue
        for part in weight if weight.dim() > 2 else (weight,):  # of a stack, one expert after the other
            distance = torch.ldexp(torch.full_like(part, torch.finfo(dtype).eps), torch.frexp(part).exponent - 1)
            share = torch.rand(part.shape, generator=draw).to(part.device) - 0.5
            part.add_(distance.mul_(share).mul_(part != 0))
