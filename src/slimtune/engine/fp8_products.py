"""Products in FP8 beside the same weight's in 16 bits, of random numbers: what the proof before a run compares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimtune.engine.stacks import Stack
from slimtune.engine.weights import Site

__all__ = ["InBoth", "in_both"]

_HEAVY = 32
"""How much more than others the channels weigh here that have further columns."""


class InBoth(NamedTuple):
    """Products of one weight, forward and back."""

    name: str
    in_fp8: tuple[Tensor, Tensor]
    in_16_bits: tuple[Tensor, Tensor]


def in_both(part: Site | Stack, draw: torch.Generator, rows: int) -> InBoth:
    """Both of a weight that is multiplied in FP8.

    Args:
        part: The weight's.
        draw: Where the numbers come from.
        rows: Of numbers; of a stack each expert has a sixteenth of them.
    """
    eight = part.in_fp8
    assert eight is not None
    count = max(1, rows // 16) * part.experts if isinstance(part, Stack) else rows
    x, dy = (
        torch.randn(count, columns, generator=draw, dtype=part.dtype, device=part.device)
        for columns in (part.inputs, part.outputs)
    )
    if isinstance(part, Stack):
        x.view(part.experts, -1, part.inputs).transpose(1, 2)[torch.arange(part.experts)[:, None], eight.again] *= (
            _HEAVY
        )
    else:
        x[:, eight.again] *= _HEAVY
    in_fp8 = part.products(x, dy)
    with eight.switch.off():
        in_16_bits = part.products(x, dy)
    return InBoth(part.name, in_fp8, in_16_bits)
