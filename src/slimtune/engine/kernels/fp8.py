"""FP8 operands and their product: NF4 weights to e4m3 in both layouts, activations and gradients row by row.

y = x Wᵀ is Σ_k x8[t, k] w8[o, k] · s_x[t] · s_w[o]. In dx = dy W the sum is over o, which s_w belongs to: it goes into
dy before that is quantised, so that the backward multiplies with the transpose of the very numbers that the forward
took, and a row of small weights counts as little in dy as it does in the sum.

Layout: the product wants both operands' summed dimension contiguous. So the forward reads [out_features, in_features],
the backward [in_features, out_features]; a pass over the 4 bits writes either. A program of the weight's
takes a tile, one of the activations' a row, which stays in registers.

What comes behind the numbers of a row (:mod:`slimtune.engine.kernels.reference_fp8`) is a gather of a few of its
channels, which the row's own program reads once more from the cache; a weight's programs of it run beside those that
read the same rows. A stack of experts is a weight for each, in one launch; a mixture's rows are quantised as they are
gathered, by their experts' factors and channels.

A block of NF4 has sixteen numbers of e4m3. They are rounded once, and looked up in registers by byte permutes, which
Triton has no operation for; under its interpreter, in the table in memory.

Dtype traps: NF4's largest code is 1, so that a row's largest weight is its largest block scale, known without looking
at a code. A conversion to e4m3 doesn't overflow: what is above 448 by a rounding becomes 448.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_fp8 as reference
from slimtune.engine.kernels._triton import cdiv, constant, interpreted, jit, pow2, row_alignment, runs_on_triton, tl
from slimtune.engine.kernels.formats import NF4_CODE, NestedScales, table_of
from slimtune.engine.kernels.reference_experts import Routes
from slimtune.engine.kernels.reference_fp8 import E4M3, LARGEST, LEAST, row_scales

__all__ = [
    "E4M3",
    "from_nf4",
    "grouped_product",
    "has_grouped_product",
    "product",
    "quantize",
    "row_scale",
    "row_scales",
    "stack_from_nf4",
]

_LARGEST, _LEAST = constant(LARGEST), constant(LEAST)
_SIXTEEN = constant(
    "{\n.reg .f32 v<16>;\n.reg .b16 e<8>;\n"
    + "".join(f"mul.rn.f32 v{i}, $4, 0f{struct.pack('>f', value).hex()};\n" for i, value in enumerate(NF4_CODE))
    + "".join(f"cvt.rn.satfinite.e4m3x2.f32 e{i}, v{2 * i + 1}, v{2 * i};\n" for i in range(8))
    + "".join(f"mov.b32 ${i}, {{e{2 * i}, e{2 * i + 1}}};\n" for i in range(4))
    + "}"
)
"""NF4's sixteen numbers times a scale, in e4m3, four to a word."""
_HALF = "prmt.b32 low, $3, $4, pick;\nprmt.b32 high, $5, $6, pick;\nprmt.b32 ${}, low, high, side;\n"
_LOOKED_UP = constant(
    "{\n.reg .b32 pick, side, low, high;\n"
    # Within a byte the earlier code is in the high bits.
    "shl.b32 side, $2, 4;\nshr.u32 pick, $2, 4;\n"
    "and.b32 side, side, 0xF0F0F0F0;\nand.b32 pick, pick, 0x0F0F0F0F;\nor.b32 side, side, pick;\n"
    # Three bits of a code pick one of eight bytes, the fourth which eight.
    "and.b32 pick, side, 0x77777777;\n"
    "shr.u32 side, side, 1;\nand.b32 side, side, 0x44444444;\nor.b32 side, side, 0x32103210;\n"
    + _HALF.format(0) + "shr.u32 pick, pick, 16;\nshr.u32 side, side, 16;\n" + _HALF.format(1) + "}"
)  # fmt: skip
"""A word's eight codes in those sixteen, as two words."""
_AGAIN = 64
"""Channels to a program that writes a weight's further columns."""


@jit
def row_scale(most: tl.tensor) -> tl.tensor:
    """Of a row with this largest number."""
    return tl.maximum(most, _LEAST) * (1.0 / _LARGEST)


@jit
def nearest(exact: tl.tensor) -> tl.tensor:
    """The number of e4m3 that is nearest, in float32.

    By arithmetic: e4m3 has three binary digits behind the first, and below 2⁻⁶ multiples of 2⁻⁹. The assembler of
    Triton 3.6 (ptxas 12.8) loses half of the numbers that are stored in e4m3 and read back from it as well.
    """
    exponent = tl.maximum((exact.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
    # A number whose last binary digit is worth e4m3's there: what is added is rounded to that digit, ties to even.
    large = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (exact + large) - large


@jit
def lost(exact: tl.tensor) -> tl.tensor:
    """What rounding to e4m3 takes away."""
    return (exact - nearest(exact)).to(tl.float8e4nv)


@jit
def _quantize(
    x: tl.tensor,
    factors: tl.tensor,
    again: tl.tensor,
    order: tl.tensor,
    experts: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    x_stride: int,
    size: int,
    count: int,
    WITH_FACTORS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    AGAIN: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    source = row
    if SLOTS > 0:
        pair = tl.load(order + row)
        source = (pair // SLOTS).to(tl.int64)
        expert = tl.load(experts + pair).to(tl.int64)
        if WITH_FACTORS:
            factors += expert * size
        again += expert * count
    x += tl.multiple_of(source * x_stride, ALIGN)
    value = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
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
        value = tl.load(x + channel).to(tl.float32)
        if WITH_FACTORS:
            value *= tl.load(factors + channel)
        value *= inverse
        tl.store(out + size + each, value.to(tl.float8e4nv), mask=mask)
        tl.store(out + size + count + each, lost(value), mask=mask)


@jit
def _relative_scales(
    block: tl.tensor,
    over: tl.tensor,
    mask: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    nested_offset: tl.tensor,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Of blocks of NF4, over their rows' scales."""
    if NESTED:
        level = tl.load(nested_code + tl.load(absmax + block, mask=mask, other=0).to(tl.int32))
        scale = level * tl.load(nested_absmax + block // NESTED_BLOCK, mask=mask, other=0.0)
        scale += tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    return scale * tl.div_rn(1.0, over)


@jit
def _permuted(packed: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Words of NF4 [ROWS, BLOCKS, 8] in e4m3, two words of four for each: [ROWS, BLOCKS, 8, 2].

    A block has sixteen numbers: they are rounded once, and looked up in registers, four at a time.
    """
    a, b, c, d = tl.inline_asm_elementwise(
        _SIXTEEN, "=r,=r,=r,=r,f", [scale], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
    )
    first, second = tl.inline_asm_elementwise(
        _LOOKED_UP, "=&r,=&r,r,r,r,r,r", [packed, a[:, :, None], b[:, :, None], c[:, :, None], d[:, :, None]],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return tl.join(first, second)


@jit
def _from_nf4(
    words: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    nested_offset: tl.tensor,
    scales: tl.tensor,
    again: tl.tensor,
    out: tl.tensor,
    rows: int,
    row_words: int,
    count: int,
    words_stride: int,
    absmax_stride: int,
    nested_stride: int,
    matrix_stride: int,
    out_stride: int,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    AGAIN: tl.constexpr,
    PERMUTES: tl.constexpr,
) -> None:
    matrix = tl.program_id(2).to(tl.int64)
    words += tl.multiple_of(matrix * words_stride, 8)  # whole blocks of codes
    absmax += matrix * absmax_stride
    nested_absmax += matrix * nested_stride
    nested_offset += matrix
    scales += matrix * rows
    out += tl.multiple_of(matrix * matrix_stride, 16)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_r = row < rows
    over = tl.load(scales + row, mask=inside_r, other=1.0)
    row_blocks, tile = row_words // BLOCK_WORDS, tl.program_id(1)
    tiles = tl.cdiv(row_words, WORDS)
    if tile < tiles:
        # A block's scale is worked out once, for all of its words.
        BLOCKS: tl.constexpr = WORDS // BLOCK_WORDS
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        mask = inside_r[:, None] & (block < row_blocks)[None, :]
        index = (row * row_blocks)[:, None] + block[None, :]
        scale = _relative_scales(
            index, over[:, None], mask, absmax, nested_absmax, nested_code, nested_offset, NESTED, NESTED_BLOCK
        )
        place = words + (index.to(tl.int64) * BLOCK_WORDS)[:, :, None] + tl.arange(0, BLOCK_WORDS)[None, None, :]
        packed = tl.load(place, mask=mask[:, :, None], other=0)
        if PERMUTES:
            pairs = tl.reshape(_permuted(packed, scale), (ROWS, WORDS * 2))
        else:
            lane = tl.arange(0, 8)  # a word's bytes come lowest first, but within a byte the high four bits do
            values = tl.load(code + ((packed[:, :, :, None] >> ((lane ^ 1) * 4)[None, None, None, :]) & 0xF))
            eighths = tl.reshape((values * scale[:, :, None, None]).to(tl.float8e4nv), (ROWS, WORDS * 8))
        column = tile * (WORDS * 8) + tl.arange(0, WORDS * 8)
        inside_c = column < row_words * 8
        if TURNED:
            if PERMUTES:
                parts = pairs[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]
                eighths = tl.reshape(parts.to(tl.uint8), (ROWS, WORDS * 8)).to(tl.float8e4nv, bitcast=True)
            turned = out + (column.to(tl.int64) * out_stride)[:, None] + row[None, :]
            tl.store(turned, tl.trans(eighths), mask=inside_c[:, None] & inside_r[None, :])
        elif PERMUTES:
            fours = tile * (WORDS * 2) + tl.arange(0, WORDS * 2)
            upright = (out + row.to(tl.int64) * out_stride).to(tl.pointer_type(tl.int32), bitcast=True)
            tl.store(
                upright[:, None] + fours[None, :], pairs, mask=inside_r[:, None] & (fours < row_words * 2)[None, :]
            )
        else:
            upright = out + (row.to(tl.int64) * out_stride)[:, None] + column[None, :]
            tl.store(upright, eighths, mask=inside_r[:, None] & inside_c[None, :])
    elif AGAIN > 0:
        # Beside the programs that read the same rows, so that these come from the cache.
        each = (tile - tiles) * AGAIN + tl.arange(0, AGAIN)
        chosen = each < count
        channel = tl.load(again + matrix * count + each, mask=chosen, other=0)
        there = inside_r[:, None] & chosen[None, :]
        own = _relative_scales(
            (row * row_blocks)[:, None] + (channel // (BLOCK_WORDS * 8))[None, :], over[:, None], there, absmax,
            nested_absmax, nested_code, nested_offset, NESTED, NESTED_BLOCK,
        )  # fmt: skip
        bits = tl.load(words + (row.to(tl.int64) * row_words)[:, None] + (channel // 8)[None, :], mask=there, other=0)
        exact = tl.load(code + ((bits >> (((channel & 7) ^ 1) * 4)[None, :]) & 0xF)) * own
        behind = out + (row.to(tl.int64) * out_stride)[:, None] + (row_words * 8 + each)[None, :]
        tl.store(behind, lost(exact), mask=there)
        tl.store(behind + count, exact.to(tl.float8e4nv), mask=there)


def quantize(
    x: Tensor, *, factors: Tensor | None = None, again: Tensor | None = None, routes: Routes | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`slimtune.engine.kernels.reference_fp8.quantize`."""
    if not runs_on_triton(x):
        return reference.quantize(x, factors=factors, again=again, routes=routes)
    (rows, size), count = x.shape, 0 if again is None else again.shape[-1]
    slots, order, experts = 0, x, x
    if routes is not None:
        rows, slots, order, experts = routes.order.shape[0], routes.place.shape[1], routes.order, routes.experts
    out = torch.empty(rows, size + 2 * count, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = pow2(size)
    _quantize[(rows,)](
        x, scales if factors is None else factors, scales if again is None else again,
        order, experts, out, scales, x.stride(0), size, count, WITH_FACTORS=factors is not None, SLOTS=slots,
        BLOCK=block, AGAIN=pow2(count) if count else 0, ALIGN=row_alignment(x),
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
    _write(
        packed.view(1, -1), absmax.view(1, -1), scales[None], shape, nested, blocksize,
        None if out is None else out[None], None if turned is None else turned[None],
        None if again is None else again[None],
    )  # fmt: skip


def stack_from_nf4(
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
    """See :func:`slimtune.engine.kernels.reference_fp8.stack_from_nf4`."""
    if not runs_on_triton(packed):
        reference.stack_from_nf4(
            packed, absmax, scales, shape=shape, nested=nested, blocksize=blocksize, out=out, turned=turned, again=again
        )
        return
    _write(packed, absmax, scales, shape, nested, blocksize, out, turned, again)


def _write(
    packed: Tensor,
    absmax: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    nested: NestedScales | None,
    blocksize: int,
    out: Tensor | None,
    turned: Tensor | None,
    again: Tensor | None,
) -> None:
    """Write ``out`` and ``turned`` [stack, ...] from packed [stack, bytes], absmax [stack, blocks]."""
    code, words, stack = table_of(NF4_CODE, packed.device), packed.view(torch.int32), packed.shape[0]
    rows, row_words = shape[0], shape[1] // 8
    over = (absmax, code, *((code,) * 3 if nested is None else (nested.absmax, nested.code, nested.offset)), scales)
    how = {"NESTED": nested is not None, "NESTED_BLOCK": 256 if nested is None else nested.blocksize}
    strides = (absmax.stride(0), 0 if nested is None or nested.absmax.ndim == 1 else nested.absmax.stride(0))
    # A launch for each: Triton 3.6 wrote another transpose where a program stored its tile both ways.
    for place, across, block_rows, block_words, warps in ((out, False, 16, 32, 2), (turned, True, 128, 16, 4)):
        if place is None:
            continue
        count = 0 if across or again is None else again.shape[1]
        columns = cdiv(row_words, block_words) + cdiv(count, _AGAIN)
        _from_nf4[(cdiv(rows, block_rows), columns, stack)](
            words, *over, scales if again is None else again, place, rows, row_words, count, words.stride(0), *strides,
            place.stride(0), place.stride(1), **how, BLOCK_WORDS=blocksize // 8, TURNED=across, ROWS=block_rows,
            WORDS=block_words, AGAIN=_AGAIN if count else 0, PERMUTES=not interpreted(), num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip


def product(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    *,
    out: Tensor | None = None,
    long_sum: bool = False,
) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_fp8.product`."""
    if not x.is_cuda:
        return reference.product(x, x_scales, weight, scales, out=out, long_sum=long_sum)
    return torch._scaled_mm(
        x, weight.t(), x_scales, scales[None], out_dtype=torch.bfloat16, use_fast_accum=not long_sum, out=out
    )


def has_grouped_product(device: torch.device, matrices: int) -> bool:
    """Whether :func:`grouped_product` takes so many; by torch 2.11's ``GroupedBlas.cpp``: on sm_90 and sm_100."""
    return device.type != "cuda" or (torch.cuda.get_device_capability(device)[0] in (9, 10) and matrices <= 1023)


def grouped_product(x: Tensor, x_scales: Tensor, weights: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_fp8.grouped_product`."""
    if not x.is_cuda:
        return reference.grouped_product(x, x_scales, weights, scales, ends)
    return torch._scaled_grouped_mm(
        x, weights.transpose(1, 2), x_scales.view(-1), scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
    )
