"""Products in FP8 beside the same weight's in 16 bits, of random numbers: what the proof before a run compares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimtune.engine.fp8_head import Fp8Head
from slimtune.engine.loss import loss_and_grad_of_chunk
from slimtune.engine.stacks import Stack
from slimtune.engine.weights import Site

__all__ = ["InBoth", "head_in_both", "in_both"]

_HEAVY = 32
"""How much more than others the channels weigh here that have further columns."""
_LIKELY = 6.0
"""How far logits are apart here, so that a few tokens of a vocabulary have most of the probability: their rows of the
head make as much of the gradient as the target's own, which is no part of the product."""


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


def head_in_both(head: Tensor, in_fp8: Fp8Head, draw: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """The gradient through the head of random numbers, in FP8 and in 16 bits.

    Args:
        head: [V, H].
        in_fp8: The same.
        draw: Where the numbers come from.
        rows: Of numbers.
    """
    x = torch.randn(rows, head.shape[1], generator=draw, dtype=head.dtype, device=head.device)
    x *= _LIKELY / (x @ head.t()).float().std(1, keepdim=True)
    targets = torch.randint(head.shape[0], (rows,), generator=draw, device=head.device)
    buffer, eighths = x.new_empty(rows, in_fp8.width), x.clone()
    loss_and_grad_of_chunk(eighths, head, targets, buffer, in_fp8=in_fp8)
    with in_fp8.switch.off():
        loss_and_grad_of_chunk(x, head, targets, buffer, in_fp8=in_fp8)
    return eighths, x
