"""The data formats that the engine shares with others: NF4's values, nested scales and the optimizer's 8-bit state with
bitsandbytes, MXFP4's with gpt-oss's files.

What is trained here is what bitsandbytes would have trained: the same bytes in the 4-bit weights, the same bytes in a
checkpoint's optimizer state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "FP4_VALUES",
    "HALVES",
    "MIN_8BIT",
    "MXFP4_BLOCK",
    "NF4_CODE",
    "ZERO_CODE",
    "AdamWState",
    "NestedScales",
    "Nf4Weight",
    "Pairs",
    "aligned_offsets",
    "dynamic_map",
    "table_of",
]

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The sixteen values of NF4 (Dettmers et al. 2023, appendix E; bitsandbytes' ``get_4bit_type("nf4")``)."""

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Of E2M1's codes 0 to 15 (OCP Microscaling Formats 1.0, section 5.3.3)."""
MXFP4_BLOCK = 32
"""Codes that share an exponent in MXFP4."""


@cache
def table_of(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 on ``device``, made once: no CUDA graph records what comes from the host."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class NestedScales:
    """What undoes double quantisation: block scale = code[absmax] x nested absmax + offset (bitsandbytes' ``state2``).

    Attributes:
        absmax: float32, one for each ``blocksize`` block scales.
        code: float32 [256], the values of the 8-bit codes.
        offset: float32 scalar tensor, the mean that was taken off the block scales.
        blocksize: Block scales that share one nested absmax.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int = 256


class Nf4Weight(NamedTuple):
    """A weight of NF4 as bitsandbytes holds it."""

    packed: Tensor
    """uint8, two codes to a byte."""
    absmax: Tensor
    """Block scales, or their codes."""
    shape: tuple[int, int]
    """(out_features, in_features)."""
    nested: NestedScales | None
    """The scales' own quantisation."""
    blocksize: int
    """Weights that share a scale."""


BLOCK = 256
"""Elements that share one absmax in the optimizer's 8-bit state."""
MIN_8BIT = 4096
"""Tensors of fewer elements keep their state in 32 bits."""
ZERO_CODE = 127
"""The signed code that stands for 0."""


def aligned_offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes start in a flat buffer, each at a multiple of ``BLOCK``; the buffer's length.

    The gaps hold zeros: a parameter of zero with no gradient stays zero and changes no absmax.
    """
    padded = [-(-size // BLOCK) * BLOCK for size in sizes]
    return [sum(padded[:i]) for i in range(len(sizes))], sum(padded)


@dataclass(frozen=True)
class AdamWState:
    """bitsandbytes' AdamW state of many tensors in one flat buffer laid out by :func:`aligned_offsets`.

    Attributes:
        codes1: uint8 [N], the first moment's codes.
        codes2: uint8 [N], the second moment's.
        absmax1: float32 [N / 256].
        absmax2: float32 [N / 256].
        map1: float32 [256], values of the signed codes (bitsandbytes' ``create_dynamic_map``).
        map2: float32 [256], values of the unsigned codes.
        small: int32 [N / 256], for a block of a tensor under 4096 elements its row in exact1 and exact2, else -1.
        exact1: float32 [rows, 256], the first moment of the small tensors.
        exact2: float32 [rows, 256], the second.
    """

    codes1: Tensor
    codes2: Tensor
    absmax1: Tensor
    absmax2: Tensor
    map1: Tensor
    map2: Tensor
    small: Tensor
    exact1: Tensor
    exact2: Tensor

    @classmethod
    def zeros(cls, sizes: Sequence[int], device: torch.device | str) -> AdamWState:
        """The state before the first step, for tensors of these sizes in this order."""
        small: list[int] = []
        rows = 0
        for size in sizes:
            blocks = -(-size // BLOCK)
            exact = size < MIN_8BIT
            small += range(rows, rows + blocks) if exact else [-1] * blocks
            rows += blocks if exact else 0
        total = len(small) * BLOCK
        return cls(
            codes1=torch.zeros(total, dtype=torch.uint8, device=device),
            codes2=torch.zeros(total, dtype=torch.uint8, device=device),
            absmax1=torch.zeros(len(small), dtype=torch.float32, device=device),
            absmax2=torch.zeros(len(small), dtype=torch.float32, device=device),
            map1=dynamic_map(signed=True).to(device),
            map2=dynamic_map(signed=False).to(device),
            small=torch.tensor(small, dtype=torch.int32, device=device),
            exact1=torch.zeros(rows, BLOCK, dtype=torch.float32, device=device),
            exact2=torch.zeros(rows, BLOCK, dtype=torch.float32, device=device),
        )

    def of_tensor(self, offset: int, size: int) -> dict[str, Tensor]:
        """Views of one tensor's state under bitsandbytes' names, flat: what its optimizer would hold for it."""
        blocks = slice(offset // BLOCK, -(-(offset + size) // BLOCK))
        if size < MIN_8BIT:
            row = int(self.small[offset // BLOCK]) * BLOCK
            part = slice(row, row + size)
            return {"state1": self.exact1.view(-1)[part], "state2": self.exact2.view(-1)[part]}
        return {
            "state1": self.codes1[offset : offset + size],
            "state2": self.codes2[offset : offset + size],
            "qmap1": self.map1,
            "qmap2": self.map2,
            "absmax1": self.absmax1[blocks],
            "absmax2": self.absmax2[blocks],
        }


def dynamic_map(*, signed: bool) -> Tensor:
    """float32 [256], ascending: the dynamic 8-bit data type (Dettmers 2015, arXiv:1511.04561), as bitsandbytes has it.

    Decades 1e-6 … 1 share the codes: each decade has twice the values of the one below.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    values += [0.0] * (256 - len(values))
    return torch.tensor(sorted(values), dtype=torch.float32)


class Pairs(NamedTuple):
    """Which columns of a head rotate against each other."""

    dim: int | None = None
    """Columns that are rotated, from the first; the others pass. None: all."""
    interleaved: bool = False
    """Neighbouring columns are pairs; else column i and i + dim / 2."""

    def columns(self, size: int) -> tuple[Tensor, Tensor]:
        """The firsts and the seconds of the pairs of a head of ``size`` columns, int64 [size / 2] each.

        What passes makes pairs of its own, after the others; their angle is zero.
        """
        pair = torch.arange(size // 2)
        if self.interleaved:
            return 2 * pair, 2 * pair + 1
        turned = size if self.dim is None else self.dim
        first = torch.where(pair < turned // 2, pair, pair + turned // 2)
        return first, first + torch.where(pair < turned // 2, turned // 2, (size - turned) // 2)


HALVES = Pairs()
"""A head's first half against its second, as in Llama."""
