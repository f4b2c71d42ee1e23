"""MXFP4 to numbers in plain torch, by the rules of :mod:`slimtune.engine.kernels.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels.formats import FP4_VALUES, MXFP4_BLOCK, table_of

__all__ = ["dequantize_stack"]


def dequantize_stack(blocks: Tensor, exponents: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A stack of MXFP4 weights [stack, rows, columns], to the bit Transformers' ``convert_moe_packed_tensors``.

    Args:
        blocks: uint8 [stack, rows, columns / 2], two codes to a byte, the earlier one in the low bits.
        exponents: uint8 [stack, rows, columns / 32], biased by 127.
        dtype: Dtype of the result when ``out`` isn't given.
        out: [stack, rows, columns] to write into.
    """
    stack, rows, half = blocks.shape
    table = table_of(FP4_VALUES, blocks.device)
    weight = torch.empty(stack, rows, 2 * half, dtype=dtype, device=blocks.device) if out is None else out
    for matrix, codes, powers in zip(weight, blocks, exponents, strict=True):  # a matrix's numbers at a time
        values = torch.stack((table[(codes & 0xF).int()], table[(codes >> 4).int()]), dim=-1)
        groups = values.view(rows, -1, MXFP4_BLOCK)
        matrix.copy_(torch.ldexp(groups, powers.int()[..., None] - 127).view(rows, 2 * half))
    return weight
