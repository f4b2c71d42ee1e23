"""A causal convolution of a few taps, each column by itself, and silu, inside documents.

Forward: y = silu(pre), pre_t = bias + Σ_b w_b x_{t-b} over the tokens t - b of t's document. Backward: with
dpre = dy · σ(pre) (1 + pre (1 - σ(pre))), dx_t = Σ_b w_b dpre_{t+b}. pre is computed again for each of the sum's terms:
what is read for it lies in the caches, and a buffer for it would be as large as x.

Layout: [T, C] with any row stride. A program takes a tile of tokens and columns.
"""

from __future__ import annotations

from torch import Tensor

from slimtune.engine.kernels import reference_delta as reference
from slimtune.engine.kernels._triton import cdiv, jit, jit_one_for_all, row_alignment, runs_on_triton, tl

__all__ = ["conv_silu_backward", "conv_silu_forward"]

_TOKENS, _COLUMNS = 32, 128


@jit
def _pre(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, first: tl.tensor, token: tl.tensor, column: tl.tensor,
    inside: tl.tensor, stride: int, size: int, TAPS: tl.constexpr, BIAS: tl.constexpr, ALIGN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """pre of some tokens [tokens, columns]."""
    has = column < size
    if BIAS:
        total = tl.load(bias + column, mask=has, other=0.0).to(tl.float32)[None, :] + (token * 0.0)[:, None]
    else:
        total = (token * 0.0)[:, None] + (column * 0.0)[None, :]
    for back in tl.static_range(TAPS):
        w = tl.load(weight + column * TAPS + (TAPS - 1 - back), mask=has, other=0.0).to(tl.float32)
        reached = inside & (token - back >= first)
        place = x + tl.multiple_of((token - back).to(tl.int64) * stride, ALIGN)[:, None] + column[None, :]
        total += tl.load(place, mask=reached[:, None] & has[None, :], other=0.0).to(tl.float32) * w[None, :]
    return total


@jit_one_for_all("tokens")
def _forward(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    starts: tl.tensor,
    y: tl.tensor,
    tokens: int,
    size: int,
    x_stride: int,
    y_stride: int,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = token < tokens
    first = tl.load(starts + token, mask=inside, other=0)
    pre = _pre(x, weight, bias, first, token, column, inside, x_stride, size, TAPS, BIAS, ALIGN)
    place = y + tl.multiple_of(token.to(tl.int64) * y_stride, ALIGN)[:, None] + column[None, :]
    tl.store(place, pre * tl.sigmoid(pre), mask=inside[:, None] & (column < size)[None, :])


@jit_one_for_all("tokens")
def _backward(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    starts: tl.tensor,
    dx: tl.tensor,
    tokens: int,
    size: int,
    dy_stride: int,
    x_stride: int,
    dx_stride: int,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    has = column < size
    total = (token * 0.0)[:, None] + (column * 0.0)[None, :]
    for ahead in tl.static_range(TAPS):
        later = token + ahead
        inside = later < tokens
        first = tl.load(starts + later, mask=inside, other=0)
        reached = inside & (first <= token)
        pre = _pre(x, weight, bias, first, later, column, reached, x_stride, size, TAPS, BIAS, ALIGN)
        place = dy + tl.multiple_of(later.to(tl.int64) * dy_stride, ALIGN)[:, None] + column[None, :]
        d = tl.load(place, mask=reached[:, None] & has[None, :], other=0.0).to(tl.float32)
        sigma = tl.sigmoid(pre)
        w = tl.load(weight + column * TAPS + (TAPS - 1 - ahead), mask=has, other=0.0).to(tl.float32)
        total += d * sigma * (1.0 + pre * (1.0 - sigma)) * w[None, :]
    place = dx + tl.multiple_of(token.to(tl.int64) * dx_stride, ALIGN)[:, None] + column[None, :]
    tl.store(place, total, mask=(token < tokens)[:, None] & has[None, :])


def conv_silu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_delta.conv_silu_forward`."""
    if not runs_on_triton(x):
        return reference.conv_silu_forward(x, weight, bias, starts)
    tokens, size = x.shape
    y = x.new_empty(tokens, size)
    _forward[(cdiv(tokens, _TOKENS), cdiv(size, _COLUMNS))](
        x, weight.contiguous(), weight if bias is None else bias, starts, y, tokens, size, x.stride(0), y.stride(0),
        TAPS=weight.shape[1], BIAS=bias is not None, BLOCK_T=_TOKENS, BLOCK_C=_COLUMNS, ALIGN=row_alignment(x, y),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def conv_silu_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_delta.conv_silu_backward`."""
    if not runs_on_triton(x):
        return reference.conv_silu_backward(dy, x, weight, bias, starts)
    tokens, size = x.shape
    dx = x.new_empty(tokens, size)
    _backward[(cdiv(tokens, _TOKENS), cdiv(size, _COLUMNS))](
        dy, x, weight.contiguous(), weight if bias is None else bias, starts, dx, tokens, size,
        dy.stride(0), x.stride(0), dx.stride(0), TAPS=weight.shape[1], BIAS=bias is not None,
        BLOCK_T=_TOKENS, BLOCK_C=_COLUMNS, ALIGN=row_alignment(dy, x, dx), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return dx
