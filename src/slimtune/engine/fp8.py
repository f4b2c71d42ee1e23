"""Which projections are multiplied in FP8, and how their weights lie.

W in FP8 can carry no adapter and no bias: those stay in 16 bits, and are added to the product in a pass of their own.

    y = x8 · W8ᵀ + [u | 1 | 0] · [sB | bias | 0]ᵀ          dx = dy8 · W8          du = dy · sB

Of the channels that weigh most x8 and W8 have in further columns what rounding lost (the kernels' reference says how),
in the forward alone: what is lost on the way back is noise, what is lost in the forward is another model's loss.

The forward reads W8 and the backward its transpose, so a buffer of 16 bits for [W | sB | bias | 0] holds either, and
[sB | bias | 0] behind it; evaluation, which is in 16 bits, takes the same buffers by turns. What is kept is W8, half of
a weight in 16 bits, and of as many layers its transpose too as take no more together than they would in 16 bits:
elsewhere that is written from the 4 bits at each use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from slimtune.engine.kernels import fp8
from slimtune.engine.kernels.formats import Nf4Weight
from slimtune.engine.kernels.reference_experts import Routes

__all__ = ["Fp8", "Fp8Weight", "Lost", "Rows", "channels", "pays"]

Rows = tuple[Tensor, Tensor]
"""Rows of e4m3, and their scales."""
Channels = list[int] | list[list[int]]
"""A projection's that were chosen; of a stack each expert's."""

_BLOCK = 64
"""Weights to an NF4 scale: a row that is a whole number of them has its largest weight among its scales."""
_MULTIPLE = 16
"""What a product in FP8 wants of both its sides."""
_INPUTS, _OUTPUTS, _WEIGHTS, _PRODUCTS = 2048, 1024, 1 << 22, 1 << 33
"""With fewer inputs, outputs, weights or multiply-adds, what is quantised and added beside takes the time it spares:
so was it on an H200, of nine shapes at 256 to 8,192 tokens (benchmarks/results/2026-11-29-fp8-shapes-h200.json). With
these both take the same; 2,048 x 512 and 1,024 x 3,072 never gained, and by their slopes 1,024 x anything doesn't."""

_EXPERT, _EXPERT_ROWS = 1 << 20, 64
"""The same of an expert's matrix, and of the rows that each has on average."""

_CHANNELS = 64
"""Channels whose losses are taken in come by so many: two columns each make a tile's 128."""


def pays(tokens: int, inputs: int, outputs: int, experts: int = 0) -> bool:
    """Whether a product of this shape is faster in FP8, with all that it needs beside it.

    Args:
        tokens: Rows; of a stack all experts' together.
        inputs: Of one matrix.
        outputs: Likewise.
        experts: In a stack; 0: a projection.
    """
    if experts:
        return inputs * outputs >= _EXPERT and tokens >= experts * _EXPERT_ROWS
    weights = inputs * outputs
    return inputs >= _INPUTS and outputs >= _OUTPUTS and weights >= _WEIGHTS and tokens * weights >= _PRODUCTS


def channels(inputs: int, outputs: int) -> int:
    """Of how many input channels a product of this shape takes in what rounding lost.

    A channel's two columns cost two of all outputs. So a product with few outputs has more of them, up to half of its
    channels: more would not fit a buffer of 16 bits.
    """
    wanted = max(_CHANNELS, round(4 * inputs / outputs) * _CHANNELS)
    return min(wanted, inputs // (2 * _MULTIPLE) * _MULTIPLE)


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
    weighing: bool = False
    """Whether each weight is told what it multiplies in 16 bits (:meth:`Fp8Weight.weigh`)."""
    weights: dict[str, Fp8Weight] = field(default_factory=dict)
    """Those with channels, by the names of their linear layers or stacks."""
    chosen: dict[str, Channels] = field(default_factory=dict)
    """Of each weight the channels that were chosen; empty before."""

    @contextmanager
    def off(self) -> Iterator[None]:
        """While the body runs, nothing is multiplied so."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    @contextmanager
    def counting(self) -> Iterator[Fp8]:
        """While the body runs, what gradients lose is counted."""
        self.counted = []
        try:
            yield self
        finally:
            self.counted = None

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """The body multiplies each weight in 16 bits; then the channels are taken that weighed most in it."""
        self.weighing = True
        try:
            yield
        finally:
            self.weighing = False
        self.take({name: weight.heaviest() for name, weight in self.weights.items()})

    def take(self, chosen: Mapping[str, Channels]) -> None:
        """Take in what rounding lost of these channels. A weight that isn't named was in 16 bits when they were chosen,
        and keeps its own."""
        for name, weight in self.weights.items():
            if name in chosen and chosen[name] != self.chosen.get(name):
                self.chosen[name] = chosen[name]
                weight.take(chosen[name])

    def quantize(self, dy: Tensor, factors: Tensor | None = None, routes: Routes | None = None) -> Rows:
        """A gradient's rows in e4m3 and their scales; with routes as :func:`slimtune.engine.kernels.fp8.quantize`."""
        values, scales = fp8.quantize(dy, factors=factors, routes=routes)
        if self.counted is not None:
            before = torch.count_nonzero(dy) * (len(values) // len(dy))
            self.counted.append((before, torch.count_nonzero(values.view(torch.uint8) & 0x7F)))
        return values, scales

    def lost(self) -> Lost:
        """What was counted."""
        before, after = (sum(int(pair[side]) for pair in self.counted or ()) for side in (0, 1))
        return Lost(before - after, before)


class Fp8Weight:
    """One projection's weight in FP8: its scales, and what of it is held.

    Args:
        parts: Gives the NF4 weights of its linear layers, one below the other, wherever they are just now.
        inputs: Columns.
        count: C, the channels that have further columns.
        switch: The model's.
    """

    def __init__(self, parts: Callable[[], Sequence[Nf4Weight]], inputs: int, count: int, switch: Fp8) -> None:
        self._parts, self.inputs, self.count, self.switch = parts, inputs, count, switch
        self.outputs = sum(part.shape[0] for part in parts())
        scales = [fp8.row_scales(part.absmax, part.shape[0], nested=part.nested) for part in parts()]
        self.scales = torch.cat(scales)
        """float32 [outputs]."""
        self.ones = torch.ones(inputs, dtype=torch.float32, device=self.scales.device)
        """The transpose's: the weight's own are in dy."""
        self.again = torch.arange(count, dtype=torch.int32, device=self.scales.device)
        """int32 [C], the channels whose losses come behind: the first ones until they are chosen."""
        self.kept: Tensor | None = None
        """W8 with its further columns, where that is held."""
        self.kept_turned: Tensor | None = None
        """Its transpose, where that is held too."""
        self._energy: Tensor | None = None

    @staticmethod
    def takes(parts: Sequence[Nf4Weight]) -> bool:
        """Whether these weights can be multiplied in FP8."""
        return all(
            part.blocksize == _BLOCK and part.shape[1] % _BLOCK == 0 and part.shape[0] % _MULTIPLE == 0
            for part in parts
        )

    def keep(self, extra: int, *, turned: bool) -> Tensor:
        """Hold W8 from now on, and its transpose if that is asked for.

        One behind the other, as many small pieces would leave more between them.

        Args:
            extra: Columns of 16 bits that are held beside them.
            turned: Whether the transpose is held.

        Returns:
            Those columns [outputs, extra], zeros.
        """
        columns = self.inputs + 2 * self.count, self.inputs * turned, 2 * extra
        sizes = [self.outputs * each for each in columns]
        held = torch.zeros(sum(sizes), dtype=torch.uint8, device=self.scales.device)
        eighths, across, beside = torch.split(held, sizes)
        self.kept = eighths.view(fp8.E4M3).view(self.outputs, -1)
        self.kept_turned = across.view(fp8.E4M3).view(self.inputs, -1) if turned else None
        self.write(self.kept, self.kept_turned)
        return beside.view(torch.bfloat16).view(self.outputs, extra)

    def operand(self, buffer: Callable[[], Tensor], *, turned: bool) -> Tensor:
        """W8 [outputs, inputs + 2 C] or its transpose [inputs, outputs], as held or written.

        Args:
            buffer: Gives a flat one of 16 bits, with room for [outputs, inputs]; what is written begins where it does.
            turned: Whether the transpose is asked for.
        """
        held = self.kept_turned if turned else self.kept
        if held is None:
            rows, columns = (self.inputs, self.outputs) if turned else (self.outputs, self.inputs + 2 * self.count)
            held = buffer().view(fp8.E4M3)[: rows * columns].view(rows, columns)
            self.write(None if turned else held, held if turned else None)
        return held

    def weigh(self, x: Tensor, weight: Tensor) -> None:
        """Add what each channel puts into a product in 16 bits: its inputs' squares times its weights'.

        Args:
            x: [rows, inputs].
            weight: [outputs, inputs].
        """
        own, other = (torch.linalg.vector_norm(each, dim=0, dtype=torch.float32) for each in (x, weight))
        energy = (own * other).square()
        self._energy = energy if self._energy is None else self._energy + energy

    def heaviest(self) -> Channels:
        """The channels that weigh most in all that was weighed since it was asked last, in order."""
        assert self._energy is not None
        # Stable, so that of equal ones the first are taken wherever this is done again.
        order = self._energy.sort(descending=True, stable=True).indices
        self._energy = None
        heaviest: Channels = order[..., : self.count].sort().values.tolist()
        return heaviest

    def take(self, chosen: Channels) -> None:
        """Take in what rounding lost of these channels, in the weight that is kept too."""
        self.again.copy_(torch.tensor(chosen, dtype=torch.int32))
        if self.kept is not None:
            self.write(self.kept, None)

    def write(self, weight: Tensor | None, turned: Tensor | None) -> None:
        """Write W8 with its further columns, its transpose, or both."""
        row = 0
        for part in self._parts():
            rows = slice(row, row + part.shape[0])
            fp8.from_nf4(
                part.packed, part.absmax, self.scales[rows], shape=part.shape, nested=part.nested,
                out=None if weight is None else weight[rows], turned=None if turned is None else turned[:, rows],
                again=self.again,
            )  # fmt: skip
            row = rows.stop
