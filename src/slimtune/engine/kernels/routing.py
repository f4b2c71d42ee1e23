"""Tokens to their experts and back: the sort by expert, and the rows' gather and weighted sum.

Sort: a stable counting sort. With c[e, b] the pairs of expert e in block b and C its inclusive sum over all (e, b), e
first, a pair of expert e in block b goes to row C[e, b] - c[e, b] + (pairs of e before it in its block).
Gather: rows[r] = w · x[t] for the pair (t, s) at row r. Combine: y[t] = Σ_s w[t, s] · rows[place[t, s]] + addend[t].
These two are transposes of each other, so each is the other's backward: drows = gather(dy, w), dx = combine(drows, w).
The weights' gradient is dw[t, s] = rows[r] · dy[t].

Layout: x and y [T, H], rows [R, H] with any row stride. A block of the sort is compared with itself, each pair with
each, which needs no histogram whatever E is; one launch counts, torch adds up, one launch places. Gather takes a row to
a program; combine takes a token and reads its k rows, so that nothing is added atomically: the same sums every time.

Source: Shazeer et al. 2017 (arXiv:1701.06538), equation 2; the transposed pair of gather and sum as in MegaBlocks (Gale
et al. 2022, arXiv:2211.15841).

Dtype traps: Transformers rounds each expert's weighted output before it adds it; here the sum is float32 and rounded
once. Rows times width passes 2³¹, so a row's start is 64 bits. ``torch.topk`` numbers experts in int64; rows are int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_experts as reference
from slimtune.engine.kernels._triton import cdiv, jit, pow2, row_alignment, runs_on_triton, tl
from slimtune.engine.kernels.reference_experts import Routes

__all__ = ["Routes", "combine", "gather_rows", "row_dot", "sort_by_expert"]

_PAIRS = 128
"""Pairs to a block of the sort: 16,384 comparisons, 128 to a thread."""


@jit
def _ranks(experts: tl.tensor, block: int, pairs: int, BLOCK: tl.constexpr) -> tl.tensor:
    """A block's pairs, which of them exist, their experts, and how many in it share a pair's: before it, and in all."""
    lane = tl.arange(0, BLOCK)
    pair = block * BLOCK + lane
    inside = pair < pairs
    expert = tl.load(experts + pair, mask=inside, other=-1).to(tl.int32)
    same = (expert[:, None] == expert[None, :]).to(tl.int32)
    before = tl.sum(tl.where(lane[None, :] < lane[:, None], same, 0), axis=1)
    return pair, inside, expert, before, tl.sum(same, axis=1)


@jit
def _count(experts: tl.tensor, counts: tl.tensor, pairs: int, blocks: int, BLOCK: tl.constexpr) -> None:
    block = tl.program_id(0)
    _, inside, expert, before, total = _ranks(experts, block, pairs, BLOCK)
    tl.store(counts + expert * blocks + block, total, mask=inside & (before == 0))


@jit
def _place(
    experts: tl.tensor,
    sums: tl.tensor,
    order: tl.tensor,
    place: tl.tensor,
    ends: tl.tensor,
    pairs: int,
    blocks: int,
    count: int,
    BLOCK: tl.constexpr,
    COUNT_P: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    pair, inside, expert, before, total = _ranks(experts, block, pairs, BLOCK)
    row = tl.load(sums + expert * blocks + block, mask=inside, other=0) - total + before
    tl.store(order + row, pair, mask=inside)
    tl.store(place + pair, row, mask=inside)
    if block == 0:
        every = tl.arange(0, COUNT_P)
        last = tl.load(sums + every * blocks + blocks - 1, mask=every < count, other=0)
        tl.store(ends + every, last, mask=every < count)


@jit
def _gather(
    x: tl.tensor,
    order: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    x_stride: int,
    rows_stride: int,
    size: int,
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    pair = tl.load(order + row)
    token = (pair // SLOTS).to(tl.int64)
    value = tl.load(x + tl.multiple_of(token * x_stride, ALIGN) + columns, mask=mask, other=0.0)
    if WEIGHTED:
        value = value.to(tl.float32) * tl.load(weights + pair).to(tl.float32)
    tl.store(rows + tl.multiple_of(row * rows_stride, ALIGN) + columns, value, mask=mask)


@jit
def _combine(
    rows: tl.tensor,
    place: tl.tensor,
    weights: tl.tensor,
    addend: tl.tensor,
    y: tl.tensor,
    rows_stride: int,
    addend_stride: int,
    y_stride: int,
    size: int,
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(place + token * SLOTS + slot).to(tl.int64)
        value = tl.load(rows + tl.multiple_of(row * rows_stride, ALIGN) + columns, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * SLOTS + slot).to(tl.float32)
        total += value
    if ADD:
        total += tl.load(addend + tl.multiple_of(token * addend_stride, ALIGN) + columns, mask=mask, other=0.0)
    tl.store(y + tl.multiple_of(token * y_stride, ALIGN) + columns, total, mask=mask)


@jit
def _row_dot(
    a: tl.tensor,
    b: tl.tensor,
    order: tl.tensor,
    products: tl.tensor,
    a_stride: int,
    b_stride: int,
    size: int,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    a += tl.multiple_of(row * a_stride, ALIGN)
    b += tl.multiple_of(row * b_stride, ALIGN)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(a + columns, mask=columns < size, other=0.0).to(tl.float32)
        total += value * tl.load(b + columns, mask=columns < size, other=0.0).to(tl.float32)
    tl.store(products + tl.load(order + row), tl.sum(total, axis=0))


def sort_by_expert(experts: Tensor, count: int) -> Routes:
    """See :func:`slimtune.engine.kernels.reference_experts.sort_by_expert`."""
    if not runs_on_triton(experts):
        return reference.sort_by_expert(experts, count)
    chosen = experts.reshape(-1)
    pairs = chosen.shape[0]
    blocks = cdiv(pairs, _PAIRS)
    counts = torch.zeros(count * blocks, dtype=torch.int32, device=chosen.device)
    _count[(blocks,)](chosen, counts, pairs, blocks, BLOCK=_PAIRS, num_warps=4)
    sums = torch.cumsum(counts, 0, dtype=torch.int32)
    routes = Routes(
        torch.empty(pairs, dtype=torch.int32, device=chosen.device),
        torch.empty(experts.shape, dtype=torch.int32, device=chosen.device),
        torch.empty(count, dtype=torch.int32, device=chosen.device),
        experts.contiguous(),
    )
    _place[(blocks,)](
        chosen, sums, routes.order, routes.place, routes.ends, pairs, blocks, count,
        BLOCK=_PAIRS, COUNT_P=pow2(count), num_warps=4,
    )  # fmt: skip
    return routes


def _block(size: int) -> int:
    """Columns to a program; with 4 warps 16 elements to a thread: two 16-byte loads of each operand in flight."""
    return min(pow2(size), 2048)


def _num_warps(block: int) -> int:
    return max(block // 512, 1)


def gather_rows(x: Tensor, routes: Routes, *, weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_experts.gather_rows`."""
    if not runs_on_triton(x):
        return reference.gather_rows(x, routes, weights=weights, out=out)
    count, size = routes.order.shape[0], x.shape[1]
    rows = x.new_empty(count, size) if out is None else out
    block = _block(size)
    _gather[(count, cdiv(size, block))](
        x, routes.order, x if weights is None else weights.contiguous(), rows, x.stride(0), rows.stride(0), size,
        SLOTS=routes.place.shape[1], WEIGHTED=weights is not None, BLOCK=block, ALIGN=row_alignment(x, rows),
        num_warps=_num_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return rows


def combine(
    rows: Tensor,
    routes: Routes,
    *,
    weights: Tensor | None = None,
    addend: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_experts.combine`."""
    if not runs_on_triton(rows):
        return reference.combine(rows, routes, weights=weights, addend=addend, out=out)
    (tokens, slots), size = routes.place.shape, rows.shape[1]
    y = rows.new_empty(tokens, size) if out is None else out
    block = _block(size)
    _combine[(tokens, cdiv(size, block))](
        rows, routes.place, rows if weights is None else weights.contiguous(), rows if addend is None else addend, y,
        rows.stride(0), 0 if addend is None else addend.stride(0), y.stride(0), size,
        SLOTS=slots, WEIGHTED=weights is not None, ADD=addend is not None, BLOCK=block,
        ALIGN=row_alignment(rows, addend, y), num_warps=_num_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return y


def row_dot(a: Tensor, b: Tensor, routes: Routes, *, out: Tensor | None = None) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_experts.row_dot`."""
    if not runs_on_triton(a):
        return reference.row_dot(a, b, routes, out=out)
    count, size = a.shape
    products = torch.empty(routes.place.shape, dtype=torch.float32, device=a.device) if out is None else out
    block = _block(size)
    _row_dot[(count,)](
        a, b, routes.order, products, a.stride(0), b.stride(0), size,
        BLOCK=block, ALIGN=row_alignment(a, b), num_warps=_num_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return products
