"""NF4 weights to 16 or 32 bits in one launch, double quantisation undone on the way.

Weight i = code[4-bit i] · scale[i // 64]; with double quantisation scale[b] = code8[8-bit b] · absmax[b // 256] +
offset. The backward of a frozen weight needs the same values and nothing else.

Layout (bitsandbytes 0.50, ``functional.py``: ``quantize_4bit``): a row-major weight [out_features, in_features], two
codes to a byte, the earlier one in the high bits. A thread takes four bytes and writes eight weights, 16 bytes in
16-bit dtypes, so reads and writes are both coalesced. ``out`` may have a row stride beyond in_features. A mixture's
experts are a stack of such matrices, each with codes and scales of its own, and are written in one launch.

Dtype traps: everything is multiplied in float32 and rounded once. Product and offset must not be fused into one FMA,
or the result would differ from bitsandbytes', which rounds between them, in a last bit here and there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_nf4 as reference
from slimtune.engine.kernels._triton import cdiv, jit, runs_on_triton, tl
from slimtune.engine.kernels.formats import NF4_CODE, NestedScales, table_of

__all__ = ["NestedScales", "dequantize", "dequantize_stack"]


@jit
def _dequantize(
    words: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    nested_offset: tl.tensor,
    out: tl.tensor,
    n_words: int,
    row_words: int,
    words_stride: int,
    absmax_stride: int,
    nested_stride: int,
    out_stride_words: int,
    out_row_words: int,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    matrix = tl.program_id(1).to(tl.int64)
    words += tl.multiple_of(matrix * words_stride, 8)  # whole blocks of codes
    absmax += matrix * absmax_stride
    nested_absmax += matrix * nested_stride
    out += matrix * out_stride_words * 8
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = word < n_words
    packed = tl.load(words + word, mask=mask, other=0)
    block = word // BLOCK_WORDS
    if NESTED:
        level = tl.load(nested_code + tl.load(absmax + block, mask=mask, other=0).to(tl.int32))
        scale = level * tl.load(nested_absmax + block // NESTED_BLOCK, mask=mask, other=0.0)
        scale += tl.load(nested_offset + matrix)
    else:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    # A word's bytes come lowest first, but within a byte the high four bits do: shifts 4, 0, 12, 8, 20, 16, 28, 24.
    lane = tl.arange(0, 8)
    values = tl.load(code + ((packed[:, None] >> ((lane ^ 1) * 4)[None, :]) & 0xF))
    row = word // row_words
    start = row.to(tl.int64) * out_row_words + (word - row * row_words)
    tl.store(out + (start * 8)[:, None] + lane[None, :], values * scale[:, None], mask=mask[:, None])


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    nested: NestedScales | None = None,
    blocksize: int = 64,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_nf4.dequantize`.

    in_features that isn't a multiple of 8, or rows of ``out`` that don't start at one, take the reference path.
    """
    columns = shape[1]
    stride = columns if out is None else out.stride(0)
    if not runs_on_triton(packed) or columns % 8 or stride % 8:
        return reference.dequantize(
            packed, absmax, shape=shape, dtype=dtype, nested=nested, blocksize=blocksize, out=out
        )
    weight = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    _launch(packed.view(1, -1), absmax.view(1, -1), nested, blocksize, weight[None])
    return weight


def dequantize_stack(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    nested: NestedScales | None = None,
    blocksize: int = 64,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_nf4.dequantize_stack`.

    The reference path is taken as by :func:`dequantize`, and where matrices of ``out`` don't start at a multiple of 8.
    """
    weight = torch.empty(packed.shape[0], *shape, dtype=dtype, device=packed.device) if out is None else out
    if not runs_on_triton(packed) or any(n % 8 for n in (shape[1], *weight.stride()[:2])):
        return reference.dequantize_stack(
            packed, absmax, shape=shape, dtype=dtype, nested=nested, blocksize=blocksize, out=weight
        )
    _launch(packed, absmax, nested, blocksize, weight)
    return weight


def _launch(packed: Tensor, absmax: Tensor, nested: NestedScales | None, blocksize: int, out: Tensor) -> None:
    """Write ``out`` [stack, rows, columns] from packed [stack, bytes] and absmax [stack, blocks]."""
    stack, rows, columns = out.shape
    code = table_of(NF4_CODE, packed.device)
    words = packed.view(torch.int32)
    n_words, block = rows * columns // 8, 512
    _dequantize[(cdiv(n_words, block), stack)](
        words, absmax, code,
        code if nested is None else nested.absmax, code if nested is None else nested.code,
        code if nested is None else nested.offset,
        out, n_words, columns // 8, words.stride(0), absmax.stride(0),
        0 if nested is None else nested.absmax.stride(0), out.stride(0) // 8, out.stride(1) // 8,
        NESTED=nested is not None, NESTED_BLOCK=256 if nested is None else nested.blocksize,
        BLOCK_WORDS=blocksize // 8, BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
