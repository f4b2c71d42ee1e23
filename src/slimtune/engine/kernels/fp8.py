"""FP8 operands and their product: NF4 weights to e4m3 in both layouts, activations and gradients row by row.

y = x Wᵀ is Σ_k x8[t, k] w8[o, k] · s_x[t] · s_w[o]. In dx = dy W the sum is over o, which s_w belongs to: it goes into
dy before that is quantised, so that the backward multiplies with the transpose of the very numbers that the forward
took, and a row of small weights counts as little in dy as it does in the sum.

Layout: the product wants both operands' summed dimension contiguous. So the forward reads [out_features, in_features],
the backward [in_features, out_features]; a pass over the 4 bits writes either. A program of the weight's
takes a tile, one of the activations' a row, which stays in registers.

What comes behind the numbers of a row (:mod:`slimtune.engine.kernels.reference_fp8`) is a gather of a few of its
channels, which the row's own program reads once more from the cache. A weight's is a launch of its own.

Dtype traps: NF4's largest code is 1, so that a row's largest weight is its largest block scale, known without looking
at a code. A conversion to e4m3 doesn't overflow: what is above 448 by a rounding becomes 448.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_fp8 as reference
from slimtune.engine.kernels._triton import cdiv, constant, jit, pow2, row_alignment, runs_on_triton, tl
from slimtune.engine.kernels.formats import NF4_CODE, NestedScales, table_of
from slimtune.engine.kernels.reference_fp8 import E4M3, LARGEST, LEAST, row_scales

__all__ = ["E4M3", "from_nf4", "product", "quantize", "row_scale", "row_scales"]

_LARGEST, _LEAST = constant(LARGEST), constant(LEAST)


@jit
def row_scale(most: tl.tensor) -> tl.tensor:
    """Of a row with this largest number."""
    return tl.maximum(most, _LEAST) * (1.0 / _LARGEST)


@jit
def lost(exact: tl.tensor) -> tl.tensor:
    """What rounding to e4m3 takes away.

    Rounded by arithmetic: e4m3 has three binary digits behind the first, and below 2⁻⁶ multiples of 2⁻⁹. The assembler
    of Triton 3.6 (ptxas 12.8) loses half of the numbers that are stored in e4m3 and read back from it as well.
    """
    exponent = tl.maximum((exact.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
    # A number whose last binary digit is worth e4m3's there: what is added is rounded to that digit, ties to even.
    large = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (exact - ((exact + large) - large)).to(tl.float8e4nv)


@jit
def _quantize(
    x: tl.tensor,
    factors: tl.tensor,
    again: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    x_stride: int,
    size: int,
    count: int,
    WITH_FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    AGAIN: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    value = tl.load(x + tl.multiple_of(row * x_stride, ALIGN) + columns, mask=mask, other=0.0).to(tl.float32)
    if WITH_FACTORS:
        value *= tl.load(factors + columns, mask=mask, other=0.0)
    scale = row_scale(tl.max(tl.abs(value), axis=0))
    tl.store(scales + row, scale)
    inverse = tl.div_rn(1.0, scale)
    out += row * (size + 2 * count)
    tl.store(out + columns, (value * inverse).to(tl.float8e4nv), mask=mask)
    if AGAIN > 0:
        each = tl.arange(0, AGAIN)
        mask = each < count
        channel = tl.load(again + each, mask=mask, other=0)
        value = tl.load(x + row * x_stride + channel).to(tl.float32)
        if WITH_FACTORS:
            value *= tl.load(factors + channel)
        value *= inverse
        tl.store(out + size + each, value.to(tl.float8e4nv), mask=mask)
        tl.store(out + size + count + each, lost(value), mask=mask)


@jit
def _again_from_nf4(
    packed: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    nested_offset: tl.tensor,
    scales: tl.tensor,
    again: tl.tensor,
    out: tl.tensor,
    rows: int,
    size: int,
    count: int,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    each = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_r, inside_c = row < rows, each < count
    mask = inside_r[:, None] & inside_c[None, :]
    channel = tl.load(again + each, mask=inside_c, other=0)
    place = row.to(tl.int64)[:, None] * size + channel[None, :]
    block = place // BLOCK_SIZE
    if NESTED:
        level = tl.load(nested_code + tl.load(absmax + block, mask=mask, other=0).to(tl.int32))
        scale = level * tl.load(nested_absmax + block // NESTED_BLOCK, mask=mask, other=0.0)
        scale += tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    scale *= tl.div_rn(1.0, tl.load(scales + row, mask=inside_r, other=1.0))[:, None]
    both = tl.load(packed + place // 2, mask=mask, other=0).to(tl.int32)
    values = tl.load(code + ((both >> ((1 - channel % 2) * 4)[None, :]) & 0xF)) * scale
    behind = out + row.to(tl.int64)[:, None] * (size + 2 * count) + size + each[None, :]
    tl.store(behind, lost(values), mask=mask)
    tl.store(behind + count, values.to(tl.float8e4nv), mask=mask)


@jit
def _from_nf4(
    words: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    nested_offset: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    rows: int,
    row_words: int,
    out_stride: int,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    first_row, first_word = tl.program_id(0) * ROWS, tl.program_id(1) * WORDS
    row, word = tl.arange(0, ROWS), tl.arange(0, WORDS)
    inside_r, inside_w = first_row + row < rows, first_word + word < row_words
    mask = inside_r[:, None] & inside_w[None, :]
    start = first_row.to(tl.int64) * row_words + first_word
    packed = tl.load(words + start + (row * row_words)[:, None] + word[None, :], mask=mask, other=0)
    # A row is a whole number of blocks.
    block = (first_row + row).to(tl.int64)[:, None] * (row_words // BLOCK_WORDS)
    block += ((first_word + word) // BLOCK_WORDS)[None, :]
    if NESTED:
        level = tl.load(nested_code + tl.load(absmax + block, mask=mask, other=0).to(tl.int32))
        scale = level * tl.load(nested_absmax + block // NESTED_BLOCK, mask=mask, other=0.0)
        scale += tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    scale *= tl.div_rn(1.0, tl.load(scales + first_row + row, mask=inside_r, other=1.0))[:, None]
    # As in nf4's kernel: a word's bytes come lowest first, but within a byte the high four bits do.
    lane = tl.arange(0, 8)
    values = tl.load(code + ((packed[:, :, None] >> ((lane ^ 1) * 4)[None, None, :]) & 0xF))
    tile = tl.reshape((values * scale[:, :, None]).to(tl.float8e4nv), (ROWS, WORDS * 8))
    column = tl.arange(0, WORDS * 8)
    inside_c = first_word * 8 + column < row_words * 8
    if TURNED:
        place = out + (first_word * 8).to(tl.int64) * out_stride + first_row
        place += (column * out_stride)[:, None] + row[None, :]
        tl.store(place, tl.trans(tile), mask=inside_c[:, None] & inside_r[None, :])
    else:
        place = out + first_row.to(tl.int64) * out_stride + first_word * 8
        place += (row * out_stride)[:, None] + column[None, :]
        tl.store(place, tile, mask=inside_r[:, None] & inside_c[None, :])


def quantize(x: Tensor, *, factors: Tensor | None = None, again: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`slimtune.engine.kernels.reference_fp8.quantize`."""
    if not runs_on_triton(x):
        return reference.quantize(x, factors=factors, again=again)
    (rows, size), count = x.shape, 0 if again is None else again.numel()
    out = torch.empty(rows, size + 2 * count, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = pow2(size)
    _quantize[(rows,)](
        x, scales if factors is None else factors, scales if again is None else again, out, scales, x.stride(0), size,
        count, WITH_FACTORS=factors is not None, BLOCK=block, AGAIN=pow2(count) if count else 0,
        ALIGN=row_alignment(x),
        num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=False,
    )  # fmt: skip
    return out, scales


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
    again: Tensor | None = None,
) -> None:
    """See :func:`slimtune.engine.kernels.reference_fp8.from_nf4`."""
    if not runs_on_triton(packed):
        reference.from_nf4(
            packed, absmax, scales, shape=shape, nested=nested, blocksize=blocksize, out=out, turned=turned, again=again
        )
        return
    code, words = table_of(NF4_CODE, packed.device), packed.view(-1).view(torch.int32)
    rows, row_words = shape[0], shape[1] // 8
    over = (absmax, code, *((code,) * 3 if nested is None else (nested.absmax, nested.code, nested.offset)), scales)
    how = {"NESTED": nested is not None, "NESTED_BLOCK": 256 if nested is None else nested.blocksize}
    # A launch for each: Triton 3.6 wrote another transpose where a program stored its tile both ways.
    for place, across, block_rows, block_words in ((out, False, 16, 64), (turned, True, 128, 8)):
        if place is None:
            continue
        _from_nf4[(cdiv(rows, block_rows), cdiv(row_words, block_words))](
            words, *over, place, rows, row_words, place.stride(0), **how, BLOCK_WORDS=blocksize // 8, TURNED=across,
            ROWS=block_rows, WORDS=block_words, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    if out is not None and again is not None:
        _again_from_nf4[(cdiv(rows, 32), cdiv(again.numel(), 64))](
            packed.view(-1), *over, again, out, rows, shape[1], again.numel(), **how, BLOCK_SIZE=blocksize, ROWS=32,
            COLUMNS=64, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def product(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_fp8.product`."""
    if not x.is_cuda:
        return reference.product(x, x_scales, weight, scales, out=out)
    return torch._scaled_mm(
        x, weight.t(), x_scales, scales[None], out_dtype=torch.bfloat16, use_fast_accum=True, out=out
    )
