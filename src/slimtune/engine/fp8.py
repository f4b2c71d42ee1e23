"""Which projections are multiplied in FP8, and how their weights lie.

W in FP8 can carry no adapter and no bias: those stay in 16 bits, and are added to the product in a pass of their own.

    y = x8 · W8ᵀ + [u | 1 | 0] · [sB | bias | 0]ᵀ          dx = dy8 · W8          du = dy · sB

A buffer of 16 bits for [W | sB | bias | 0] holds exactly W8, its transpose, and [sB | bias | 0]: a weight takes the
same memory in either precision, and evaluation, which is in 16 bits, takes the same buffers by turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimtune.engine.kernels import fp8
from slimtune.engine.kernels.formats import Nf4Weight

__all__ = ["Fp8", "Fp8Weight", "Lost", "Rows", "pays"]

Rows = tuple[Tensor, Tensor]
"""Rows of e4m3, and their scales."""

_BLOCK = 64
"""Weights to an NF4 scale: a row that is a whole number of them has its largest weight among its scales."""
_MULTIPLE = 16
"""What a product in FP8 wants of both its sides."""
_INPUTS, _OUTPUTS, _WEIGHTS, _PRODUCTS = 2048, 1024, 1 << 22, 1 << 33
"""With fewer inputs, outputs, weights or multiply-adds, what is quantised and added beside takes the time it spares:
so was it on an H200, of nine shapes at 256 to 8,192 tokens (benchmarks/results/2026-11-29-fp8-shapes-h200.json). With
these both take the same; 2,048 x 512 and 1,024 x 3,072 never gained, and by their slopes 1,024 x anything doesn't."""


def pays(tokens: int, inputs: int, outputs: int) -> bool:
    """Whether a product of this shape is faster in FP8, with all that it needs beside it."""
    weights = inputs * outputs
    return inputs >= _INPUTS and outputs >= _OUTPUTS and weights >= _WEIGHTS and tokens * weights >= _PRODUCTS


class Lost(NamedTuple):
    """Numbers that were no zeros, and of those, how many became zeros in FP8."""

    lost: int
    of: int

    @property
    def share(self) -> float:
        """Of the numbers."""
        return self.lost / max(1, self.of)


@dataclass
class Fp8:
    """How all of a model's projections are multiplied just now."""

    on: bool = True
    """Off: in 16 bits."""
    counted: list[tuple[Tensor, Tensor]] | None = None
    """Where what gradients lose is counted, if it is."""

    def quantize(self, dy: Tensor, factors: Tensor) -> Rows:
        """A gradient's rows in e4m3 and their scales."""
        values, scales = fp8.quantize(dy, factors=factors)
        if self.counted is not None:
            self.counted.append((torch.count_nonzero(dy), torch.count_nonzero(values.view(torch.uint8) & 0x7F)))
        return values, scales

    def lost(self) -> Lost:
        """What was counted."""
        before, after = (sum(int(pair[side]) for pair in self.counted or ()) for side in (0, 1))
        return Lost(before - after, before)


class Fp8Weight:
    """One projection's weight in FP8: its scales, and views of a buffer.

    Args:
        parts: Gives the NF4 weights of its linear layers, one below the other, wherever they are just now.
        inputs: Columns.
        switch: The model's.
    """

    def __init__(self, parts: Callable[[], Sequence[Nf4Weight]], inputs: int, switch: Fp8) -> None:
        self._parts, self.inputs, self.switch = parts, inputs, switch
        self.outputs = sum(part.shape[0] for part in parts())
        scales = [fp8.row_scales(part.absmax, part.shape[0], nested=part.nested) for part in parts()]
        self.scales = torch.cat(scales)
        """float32 [outputs]."""
        self.ones = torch.ones(inputs, dtype=torch.float32, device=self.scales.device)
        """The transpose's: the weight's own are in dy."""

    @staticmethod
    def takes(parts: Sequence[Nf4Weight]) -> bool:
        """Whether these weights can be multiplied in FP8."""
        return all(
            part.blocksize == _BLOCK and part.shape[1] % _BLOCK == 0 and part.shape[0] % _MULTIPLE == 0
            for part in parts
        )

    def views(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W8 [outputs, inputs], its transpose [inputs, outputs] and [sB | bias | 0] [outputs, extra] of a buffer.

        Args:
            buffer: Of 16 bits, [outputs, inputs + extra].
        """
        size, flat = self.outputs * self.inputs, buffer.view(-1)
        weight, turned = flat[:size].view(fp8.E4M3).view(2, size)
        beside = flat[size:].view(self.outputs, buffer.shape[1] - self.inputs)
        return weight.view(self.outputs, self.inputs), turned.view(self.inputs, self.outputs), beside

    def write(self, weight: Tensor | None, turned: Tensor | None) -> None:
        """Write W8, its transpose, or both."""
        row = 0
        for part in self._parts():
            rows = slice(row, row + part.shape[0])
            fp8.from_nf4(
                part.packed, part.absmax, self.scales[rows], shape=part.shape, nested=part.nested,
                out=None if weight is None else weight[rows], turned=None if turned is None else turned[:, rows],
            )  # fmt: skip
            row = rows.stop
