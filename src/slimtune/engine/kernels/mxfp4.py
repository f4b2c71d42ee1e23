"""MXFP4 weights to 16 or 32 bits in one launch.

Weight i = value[4-bit i] · 2^(exponent[i // 32] - 127), with E2M1's sixteen values.

Layout: a stack of row-major matrices, two codes to a byte, the earlier one in the low bits; one exponent to 32 codes of
a row. A thread takes four bytes and writes eight weights, as for NF4. ``out`` may have a row stride beyond the columns.

Source: OCP Microscaling Formats 1.0, section 5.2; gpt-oss's files as Transformers reads them
(``integrations/mxfp4.py``, ``convert_moe_packed_tensors``).

Dtype traps: 2^-127 is no normal float32, and the exponent 255, which the format has for no number, makes none here.
A value has two bits, so bfloat16 and float32 hold each product exactly; float16 rounds it once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_mxfp4 as reference
from slimtune.engine.kernels._triton import cdiv, jit, runs_on_triton, tl
from slimtune.engine.kernels.formats import FP4_VALUES, table_of

__all__ = ["dequantize_stack"]


@jit
def _dequantize(
    words: tl.tensor,
    exponents: tl.tensor,
    code: tl.tensor,
    out: tl.tensor,
    n_words: int,
    row_words: int,
    out_stride_words: int,
    out_row_words: int,
    BLOCK: tl.constexpr,
) -> None:
    matrix = tl.program_id(1).to(tl.int64)
    words += matrix * n_words
    exponents += matrix * (n_words // 4)
    out += matrix * out_stride_words * 8
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = word < n_words
    packed = tl.load(words + word, mask=mask, other=0)
    power = tl.load(exponents + word // 4, mask=mask, other=0).to(tl.int32)
    scale = tl.where(power == 0, 1 << 22, power << 23).to(tl.float32, bitcast=True)  # 2^-127 has no exponent
    lane = tl.arange(0, 8)
    values = tl.load(code + ((packed[:, None] >> (lane * 4)[None, :]) & 0xF))
    row = word // row_words
    start = row.to(tl.int64) * out_row_words + (word - row * row_words)
    tl.store(out + (start * 8)[:, None] + lane[None, :], values * scale[:, None], mask=mask[:, None])


def dequantize_stack(blocks: Tensor, exponents: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_mxfp4.dequantize_stack`.

    Matrices or rows of ``out`` that don't start at a multiple of 8 take the reference path.
    """
    stack, rows, half = blocks.shape
    weight = torch.empty(stack, rows, 2 * half, dtype=dtype, device=blocks.device) if out is None else out
    if not runs_on_triton(blocks) or weight.dtype == torch.float64 or any(n % 8 for n in weight.stride()[:2]):
        return reference.dequantize_stack(blocks, exponents, dtype=dtype, out=weight)
    words, block = blocks.contiguous().view(torch.int32), 512
    n_words, row_words = rows * half // 4, half // 4
    _dequantize[(cdiv(n_words, block), stack)](
        words, exponents.contiguous(), table_of(FP4_VALUES, blocks.device), weight, n_words, row_words,
        weight.stride(0) // 8, weight.stride(1) // 8, BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return weight
