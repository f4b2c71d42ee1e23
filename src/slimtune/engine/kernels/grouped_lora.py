"""LoRA's skinny products for a stack of experts, each with adapters of its own.

Forward, for the rows r of expert e: u[r] = A[e] x[r]. Backward: dA[e] += Σ_r w[r] du[r] x[r]ᵀ; dx[r] += A[e]ᵀ du[r];
dB[e] += scaling · Σ_r w[r] dy[r] u[r]ᵀ. w is 1, or the router's weight of the row where dy and du are without it.

Layout: x, dx, dy and u, du by rows sorted by expert, with any row stride; A [E, r, K] and B [E, N, r]. What PEFT stores
for ``target_parameters`` is A as [E r, K], the same memory, and B as [N, r E], the expert fastest. The forward takes a
tile of rows as the grouped product does. The backward takes an expert and a block of columns, and walks over all of
the expert's rows, so that x and dx are passed over once and the sums come about in a fixed order: the same gradient
every time. No expert has more rows than there are tokens, which bounds a walk however uneven the routing is.

Source: Hu et al. 2021 (arXiv:2106.09685); PEFT's ``ParamWrapper``, which has no dropout.

Dtype traps: A is float32 in training and rounded to x's dtype before the product, and so is w · du; sums are float32,
and gradients stay so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_experts as reference
from slimtune.engine.kernels._triton import cdiv, jit, pow2, row_alignment, runs_on_triton, tl
from slimtune.engine.kernels.grouped import most_tiles, tile_of
from slimtune.engine.kernels.reference_experts import Routes

__all__ = ["expert_down", "expert_down_backward_", "expert_up_backward_"]


@jit
def _down(
    x: tl.tensor,
    a: tl.tensor,
    ends: tl.tensor,
    u: tl.tensor,
    size: int,
    x_stride: int,
    a_stride: int,
    u_stride: int,
    COUNT: tl.constexpr,
    COUNT_P: tl.constexpr,
    RANK: tl.constexpr,
    TAIL: tl.constexpr,
    ONES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    expert, first, end = tile_of(ends, tl.program_id(0), COUNT, COUNT_P, BLOCK_T)
    if expert < COUNT:
        row = first + tl.arange(0, BLOCK_T)
        rank = tl.arange(0, BLOCK_R)
        inside = (row < end)[:, None]
        source = x + tl.multiple_of(row.to(tl.int64) * x_stride, ALIGN)[:, None]
        matrix = a + expert.to(tl.int64) * a_stride + (rank * size)[None, :]
        total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for start in range(0, size, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            xt = tl.load(source + k[None, :], mask=inside & (k < size)[None, :], other=0.0)
            at = tl.load(matrix + k[:, None], mask=(k < size)[:, None] & (rank < RANK)[None, :], other=0.0)
            total = tl.dot(xt, at.to(xt.dtype), total, input_precision=PRECISION)
        target = u + (row.to(tl.int64) * u_stride)[:, None]
        tl.store(target + rank[None, :], total, mask=inside & (rank < RANK)[None, :])
        if TAIL > 0:
            tail = tl.arange(0, BLOCK_TAIL)[None, :]
            value = tl.zeros((BLOCK_T, BLOCK_TAIL), tl.float32)
            if ONES:
                value += tl.where(tail == 0, 1.0, 0.0)
            tl.store(target + RANK + tail, value, mask=inside & (tail < TAIL))


@jit
def _backward(
    du: tl.tensor,
    x: tl.tensor,
    a: tl.tensor,
    ends: tl.tensor,
    order: tl.tensor,
    weights: tl.tensor,
    da: tl.tensor,
    dx: tl.tensor,
    scale: float,
    size: int,
    du_stride: int,
    x_stride: int,
    a_stride: int,
    dx_stride: int,
    da_stride: int,
    rank_stride: int,
    column_stride: int,
    WITH_DA: tl.constexpr,
    WITH_DX: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    expert = tl.program_id(1).to(tl.int64)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    if first < end:
        column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        rank = tl.arange(0, BLOCK_R)
        inside_k = column < size
        inside_r = rank < RANK
        if WITH_DX:
            place = a + expert * a_stride + (rank * size)[:, None] + column[None, :]
            at = tl.load(place, mask=inside_r[:, None] & inside_k[None, :], other=0.0).to(x.dtype.element_ty)
        total = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
        for start in range(first, end, BLOCK_T):
            row = start + tl.arange(0, BLOCK_T)
            mask = (row < end)[:, None] & inside_k[None, :]
            d_place = du + (row.to(tl.int64) * du_stride)[:, None] + rank[None, :]
            d = tl.load(d_place, mask=(row < end)[:, None] & inside_r[None, :], other=0.0).to(x.dtype.element_ty)
            if WITH_DA:
                x_place = x + tl.multiple_of(row.to(tl.int64) * x_stride, ALIGN)[:, None] + column[None, :]
                xt = tl.load(x_place, mask=mask, other=0.0)
                weighted = d
                if WEIGHTED:
                    pair = tl.load(order + row, mask=row < end, other=0)
                    w = tl.load(weights + pair, mask=row < end, other=0.0).to(tl.float32)
                    weighted = (d.to(tl.float32) * w[:, None]).to(d.dtype)
                total = tl.dot(tl.trans(xt), weighted, total, input_precision=PRECISION)
            if WITH_DX:
                dx_place = dx + tl.multiple_of(row.to(tl.int64) * dx_stride, ALIGN)[:, None] + column[None, :]
                before = tl.load(dx_place, mask=mask, other=0.0).to(tl.float32)
                tl.store(dx_place, before + tl.dot(d, at, input_precision=PRECISION), mask=mask)
        if WITH_DA:
            place = da + expert * da_stride + (rank * rank_stride)[None, :] + (column * column_stride)[:, None]
            mask = inside_r[None, :] & inside_k[:, None]
            tl.store(place, tl.load(place, mask=mask, other=0.0) + total * scale, mask=mask)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def expert_down(x: Tensor, a: Tensor, routes: Routes, *, out: Tensor | None = None, ones: bool = False) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_experts.expert_down`."""
    if not runs_on_triton(x):
        return reference.expert_down(x, a, routes, out=out, ones=ones)
    (total, size), (count, rank) = x.shape, a.shape[:2]
    u = x.new_empty(total, rank) if out is None else out
    a = a.contiguous()
    block_r, block_t = max(pow2(rank), 16), min(max(pow2(cdiv(total, count)), 16), 64)
    block_k = 64 if block_r > 64 or x.dtype == torch.float32 else 128
    tail = u.shape[1] - rank
    _down[(most_tiles(total, count, block_t),)](
        x, a, routes.ends, u, size, x.stride(0), a.stride(0), u.stride(0),
        COUNT=count, COUNT_P=pow2(count), RANK=rank, TAIL=tail, ONES=ones,
        BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_R=block_r, BLOCK_TAIL=pow2(max(tail, 1)),
        ALIGN=row_alignment(x), PRECISION=_precision(x), num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return u


def expert_down_backward_(
    du: Tensor,
    x: Tensor,
    a: Tensor,
    routes: Routes,
    *,
    da: Tensor | None,
    dx: Tensor | None,
    weights: Tensor | None = None,
) -> None:
    """See :func:`slimtune.engine.kernels.reference_experts.expert_down_backward_`."""
    if not runs_on_triton(x):
        reference.expert_down_backward_(du, x, a, routes, da=da, dx=dx, weights=weights)
        return
    _launch_backward(du, x, a.contiguous(), routes, da, dx, weights, 1.0)


def expert_up_backward_(
    dy: Tensor, u: Tensor, routes: Routes, scaling: float, *, db: Tensor, weights: Tensor | None = None
) -> None:
    """See :func:`slimtune.engine.kernels.reference_experts.expert_up_backward_`."""
    if not runs_on_triton(dy):
        reference.expert_up_backward_(dy, u, routes, scaling, db=db, weights=weights)
        return
    # dBᵀ = scaling · (w u)ᵀ dy has the shape of dA = (w du)ᵀ x.
    _launch_backward(u, dy, u, routes, db.transpose(1, 2), None, weights, scaling)


def _launch_backward(
    du: Tensor,
    x: Tensor,
    a: Tensor,
    routes: Routes,
    da: Tensor | None,
    dx: Tensor | None,
    weights: Tensor | None,
    scale: float,
) -> None:
    size, rank = x.shape[1], du.shape[1]
    target, sums = x if dx is None else dx, x if da is None else da
    block_r = max(pow2(rank), 16)
    block_k = 32 if block_r > 64 else 64 if block_r > 16 else 128
    strides = (0, 0, 0) if da is None else da.stride()
    _backward[(cdiv(size, block_k), routes.ends.shape[0])](
        du, x, a, routes.ends, routes.order, x if weights is None else weights.contiguous(), sums, target, scale, size,
        du.stride(0), x.stride(0), a.stride(0), target.stride(0), *strides,
        WITH_DA=da is not None, WITH_DX=dx is not None, WEIGHTED=weights is not None, RANK=rank,
        BLOCK_T=64 if block_r <= 64 else 32, BLOCK_K=block_k, BLOCK_R=block_r, ALIGN=row_alignment(x, dx),
        PRECISION=_precision(x), num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
