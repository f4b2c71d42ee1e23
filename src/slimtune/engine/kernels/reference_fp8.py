"""FP8 products in plain torch: what :mod:`slimtune.engine.kernels.fp8` is held to.

A matrix is numbers of e4m3 (four bits of exponent, three of mantissa, no infinity) beside a float32 scale for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_nf4
from slimtune.engine.kernels.formats import NestedScales

__all__ = ["E4M3", "LARGEST", "LEAST", "from_nf4", "product", "quantize", "row_scales"]

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
LEAST = 1e-30
"""What a row's largest number counts as at least: a row of zeros has a scale too."""


def quantize(x: Tensor, *, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row by a scale of its own, so that its largest number becomes e4m3's: x · factors = e4m3 · scale.

    Args:
        x: [T, N] with any row stride.
        factors: float32 [N], what the columns are multiplied with first.

    Returns:
        e4m3 [T, N], contiguous, and the scales, float32 [T, 1]. A number that is none stays none; beside an infinite
        one the whole row becomes none or zero by an infinite scale, so that its products are no numbers.
    """
    wide = x.float() if factors is None else x.float() * factors
    most = wide.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(1, keepdim=True).clamp(min=LEAST)
    scale = most * (1.0 / LARGEST)
    return (wide * (1.0 / scale)).clamp(-LARGEST, LARGEST).to(E4M3), scale


def row_scales(absmax: Tensor, rows: int, *, nested: NestedScales | None = None) -> Tensor:
    """The scale of each row of an NF4 weight, float32 [rows]: its largest block's over e4m3's largest number.

    Args:
        absmax: Block scales, float32 or codes, as :func:`slimtune.engine.kernels.reference_nf4.dequantize` takes them;
            a row is a whole number of blocks.
        rows: Rows of the weight.
        nested: The scales' own quantisation.
    """
    blocks = reference_nf4.block_scales(absmax, nested)
    return blocks.view(rows, -1).abs().amax(1).clamp(min=LEAST) * (1.0 / LARGEST)


def from_nf4(
    packed: Tensor,
    absmax: Tensor,
    scales: Tensor,
    *,
    shape: tuple[int, int],
    nested: NestedScales | None = None,
    blocksize: int = 64,
    out: Tensor | None = None,
    turned: Tensor | None = None,
) -> None:
    """An NF4 weight's rows in e4m3, each over its scale.

    Args:
        packed: As :func:`slimtune.engine.kernels.reference_nf4.dequantize` takes it.
        absmax: Likewise; a row is a whole number of blocks.
        scales: float32 [out_features], from :func:`row_scales`.
        shape: (out_features, in_features), multiples of 16.
        nested: The scales' own quantisation.
        blocksize: Weights that share a block scale.
        out: e4m3 [out_features, in_features] to write into, contiguous rows: what the forward multiplies with.
        turned: e4m3 [in_features, out_features], the transpose, with any row stride: what the backward multiplies with.
    """
    blocks = reference_nf4.block_scales(absmax, nested)
    over = (blocks.view(shape[0], -1) * (1.0 / scales)[:, None]).view(-1)
    weight = reference_nf4.dequantize(packed, over, shape=shape, dtype=torch.float32, blocksize=blocksize)
    weight = weight.clamp(-LARGEST, LARGEST).to(E4M3)
    for place, value in ((out, weight), (turned, weight.t())):
        if place is not None:
            place.copy_(value)


def product(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, *, out: Tensor | None = None) -> Tensor:
    """bfloat16 [T, N]: x · weightᵀ times x's scales and the weight's, summed in float32.

    Args:
        x: e4m3 [T, K].
        x_scales: float32 [T, 1].
        weight: e4m3 [N, K].
        scales: float32 [N].
        out: bfloat16 [T, N] to write into.
    """
    y = (x.float() @ weight.float().t()) * x_scales * scales
    return y.bfloat16() if out is None else out.copy_(y)
