"""NF4 to numbers in plain torch, by the rules of :mod:`slimtune.engine.kernels.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels.formats import NF4_CODE, NestedScales, table_of

__all__ = ["block_scales", "dequantize", "dequantize_stack"]


def block_scales(absmax: Tensor, nested: NestedScales | None) -> Tensor:
    """Block scales, float32 [blocks] or of a stack [stack, blocks], from themselves or from their 8-bit codes."""
    if nested is None:
        return absmax
    scales = nested.code[absmax.int()]
    repeated = nested.absmax.repeat_interleave(nested.blocksize, dim=-1)[..., : scales.shape[-1]]
    return scales * repeated + nested.offset[..., None]


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
    """NF4 weight [out_features, in_features] in ``dtype``, equal to bitsandbytes' ``dequantize_4bit`` to the bit.

    Args:
        packed: uint8, two codes to a byte, the earlier one in the high bits; any shape of out x in / 2 elements.
        absmax: Block scales: float32, or uint8 codes when ``nested`` is given.
        shape: (out_features, in_features); in_features is even.
        dtype: Dtype of the result when ``out`` isn't given.
        nested: The scales' own quantisation.
        blocksize: Weights that share a block scale.
        out: [out_features, in_features] to write into.
    """
    absmax = block_scales(absmax, nested)
    code = table_of(NF4_CODE, packed.device)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)
    values = torch.nn.functional.embedding(packed.view(-1).int(), pairs).view(-1)
    full = values.numel() // blocksize * blocksize
    scaled = values[:full].view(-1, blocksize).mul_(absmax[: full // blocksize, None])
    if full < values.numel():
        values[full:] *= absmax[full // blocksize]
        scaled = values
    weight = scaled.view(shape)
    return weight.to(dtype) if out is None else out.copy_(weight)


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
    """A stack of NF4 weights [stack, out_features, in_features], each as :func:`dequantize` makes it.

    Args:
        packed: uint8 [stack, bytes], each matrix filled up to whole blocks.
        absmax: [stack, blocks], as in :func:`dequantize`.
        shape: (out_features, in_features) of one matrix; in_features is even.
        dtype: Dtype of the result when ``out`` isn't given.
        nested: The scales' own quantisation: absmax [stack, blocks / 256 rounded up], one code, offset [stack].
        blocksize: Weights that share a block scale.
        out: [stack, out_features, in_features] to write into.
    """
    size = shape[0] * shape[1] // 2
    weight = torch.empty(packed.shape[0], *shape, dtype=dtype, device=packed.device) if out is None else out
    for index, (codes, scales) in enumerate(zip(packed, absmax, strict=True)):
        own = nested and NestedScales(nested.absmax[index], nested.code, nested.offset[index], nested.blocksize)
        dequantize(codes[:size], scales, shape=shape, dtype=dtype, nested=own, blocksize=blocksize, out=weight[index])
    return weight
