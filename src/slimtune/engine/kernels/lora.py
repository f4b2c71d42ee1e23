"""LoRA's skinny products, with dropout drawn inside.

Forward, for adapters g that share an input x: u_g = (mask_g ∘ x) A_gᵀ / (1 - p), each with a mask of its own.
Backward: dA_g += du_gᵀ (mask_g ∘ x) / (1 - p); dx += Σ_g mask_g ∘ (du_g A_g) / (1 - p); dB += scaling · dyᵀ u.

Layout: x and dx [T, H], u and du [T, R] with any row stride; A stacked [R, H]. The forward takes a block of tokens
and walks over H; the backward takes a block of columns and walks over a share of the tokens, so that x and dx are
passed over once and the mask is hashed once for both gradients. The shares' dA are added up in a second small launch,
in a fixed order: the same gradient every time.

Source: Hu et al. 2021 (arXiv:2106.09685); dropout on the adapter's input as PEFT's ``LoraLayer`` has it. The masks are
those of ``reference.dropout_keep``, to the bit.

Dtype traps: A is float32 in training and rounded to x's dtype before the product, as autocast does; products
accumulate in float32; a float32 x is multiplied in float32, not TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from slimtune.engine.kernels import reference
from slimtune.engine.kernels._triton import cdiv, jit, jit_one_for_all, pow2, row_alignment, runs_on_triton, tl

__all__ = ["lora_down", "lora_down_backward_", "lora_up_backward_"]


@jit
def _mix(x: tl.tensor) -> tl.tensor:
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0xD35A2D97
    return x ^ (x >> 15)


@jit
def _keys(seed: tl.tensor, stream: int) -> tl.tensor:
    value = tl.load(seed)
    high = (value >> 32).to(tl.uint32) ^ stream
    key = _mix(value.to(tl.uint32) ^ _mix(high.to(tl.uint32)))
    return key, _mix(key ^ 0x9E3779B9)


@jit
def _draws(row: tl.tensor, column: tl.tensor) -> tl.tensor:
    """The first group's draws, 32 bits each, from the mixed keys of rows and columns."""
    x = (row[:, None] ^ column[None, :]) * 0x21F0AAAD
    return x ^ (x >> 15)


@jit_one_for_all("stream", "threshold")
def _down(
    x: tl.tensor,
    a: tl.tensor,
    u: tl.tensor,
    copy: tl.tensor,
    seed: tl.tensor,
    stream: int,
    threshold: tl.tensor,
    scale: float,
    tokens: int,
    size: int,
    x_stride: int,
    a_stride: int,
    u_stride: int,
    copy_stride: int,
    DROPOUT: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    TAIL: tl.constexpr,
    ONES: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.arange(0, BLOCK_R)
    inside_t = (token < tokens)[:, None]
    inside_r = (rank < RANK)[None, :]
    x_rows = x + tl.multiple_of(token.to(tl.int64) * x_stride, ALIGN)[:, None]
    copy_rows = copy + tl.multiple_of(token.to(tl.int64) * copy_stride, ALIGN)[:, None]
    first = tl.program_id(1)  # the only group of this program where they are split, else 0
    a_rows = a + ((first * RANK + rank) * a_stride)[None, :]
    if DROPOUT:
        key0, key1 = _keys(seed, stream)
        row = _mix(token.to(tl.uint32) ^ key0)
        limit = threshold.to(tl.uint32)
    u0 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    u1 = u0
    u2 = u0
    for start in range(0, size, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        inside_a = inside_r & (column < size)[:, None]
        mask = inside_t & (column < size)[None, :]
        xt = tl.load(x_rows + column[None, :], mask=mask, other=0.0)
        a0 = tl.load(a_rows + column[:, None], mask=inside_a, other=0.0).to(xt.dtype)
        if COPY:  # noqa: SIM102 (the outer condition is a constant of the compilation, the inner a value)
            if first == 0:
                tl.store(copy_rows + column[None, :], xt, mask=mask)
        if DROPOUT:
            draw = _draws(row, _mix(column.to(tl.uint32) ^ key1))
            if SPLIT:
                draw *= tl.where(first == 0, 1, tl.where(first == 1, 0x9E3779B1, 0x85EBCA77)).to(tl.uint32)
            u0 = tl.dot(tl.where(draw >= limit, xt, 0.0), a0, u0, input_precision=PRECISION)
            if GROUPS > 1:
                a1 = tl.load(a_rows + RANK * a_stride + column[:, None], mask=inside_a, other=0.0).to(xt.dtype)
                u1 = tl.dot(tl.where(draw * 0x9E3779B1 >= limit, xt, 0.0), a1, u1, input_precision=PRECISION)
            if GROUPS > 2:
                a2 = tl.load(a_rows + 2 * RANK * a_stride + column[:, None], mask=inside_a, other=0.0).to(xt.dtype)
                u2 = tl.dot(tl.where(draw * 0x85EBCA77 >= limit, xt, 0.0), a2, u2, input_precision=PRECISION)
        else:
            u0 = tl.dot(xt, a0, u0, input_precision=PRECISION)
    u_rows = u + (token.to(tl.int64) * u_stride)[:, None]
    place = u_rows + first * RANK + rank[None, :]
    tl.store(place, u0 * scale, mask=inside_t & inside_r)
    if GROUPS > 1:
        tl.store(place + RANK, u1 * scale, mask=inside_t & inside_r)
    if GROUPS > 2:
        tl.store(place + 2 * RANK, u2 * scale, mask=inside_t & inside_r)
    if TAIL > 0:
        tail = tl.arange(0, BLOCK_TAIL)[None, :]
        value = tl.zeros((BLOCK_T, BLOCK_TAIL), tl.float32)
        if ONES:
            value += tl.where(tail == 0, 1.0, 0.0)
        if first == 0:
            tl.store(u_rows + RANKS + tail, value, mask=inside_t & (tail < TAIL))


@jit_one_for_all("stream", "threshold")
def _down_backward(
    du: tl.tensor,
    x: tl.tensor,
    a: tl.tensor,
    partial: tl.tensor,
    dx: tl.tensor,
    seed: tl.tensor,
    stream: int,
    threshold: tl.tensor,
    scale: float,
    tokens: int,
    share: int,
    size: int,
    du_stride: int,
    x_stride: int,
    a_stride: int,
    dx_stride: int,
    WITH_DA: tl.constexpr,
    WITH_DX: tl.constexpr,
    SPLIT1: tl.constexpr,
    SPLIT2: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    column = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    rank = tl.arange(0, BLOCK_R)
    inside_h = column < size
    inside_r = rank < RANK
    first = tl.program_id(1) * share
    if SPLIT1 > 0:  # several adapters' outputs side by side: each block of columns has its own adapter's u
        du += (tl.program_id(0) * BLOCK_H >= SPLIT1).to(tl.int32) * RANK
        if SPLIT2 > 0:
            du += (tl.program_id(0) * BLOCK_H >= SPLIT2).to(tl.int32) * RANK
    if DROPOUT:
        key0, key1 = _keys(seed, stream)
        column_key = _mix(column.to(tl.uint32) ^ key1)
        limit = threshold.to(tl.uint32)
    if WITH_DX:
        a_place = a + (rank * a_stride)[:, None] + column[None, :]
        a_mask = inside_r[:, None] & inside_h[None, :]
        a0 = tl.load(a_place, mask=a_mask, other=0.0).to(x.dtype.element_ty)
        if GROUPS > 1:
            a1 = tl.load(a_place + RANK * a_stride, mask=a_mask, other=0.0).to(x.dtype.element_ty)
        if GROUPS > 2:
            a2 = tl.load(a_place + 2 * RANK * a_stride, mask=a_mask, other=0.0).to(x.dtype.element_ty)
    da0 = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    da1 = da0
    da2 = da0
    for start in range(first, tl.minimum(first + share, tokens), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        mask = (token < tokens)[:, None] & inside_h[None, :]
        d_place = du + (token.to(tl.int64) * du_stride)[:, None] + rank[None, :]
        d_mask = (token < tokens)[:, None] & inside_r[None, :]
        d0 = tl.load(d_place, mask=d_mask, other=0.0).to(x.dtype.element_ty)
        if WITH_DA:
            x_place = x + tl.multiple_of(token.to(tl.int64) * x_stride, ALIGN)[:, None] + column[None, :]
            xt = tl.load(x_place, mask=mask, other=0.0)
        if WITH_DX:
            dx_place = dx + tl.multiple_of(token.to(tl.int64) * dx_stride, ALIGN)[:, None] + column[None, :]
            before = tl.load(dx_place, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            draw = _draws(_mix(token.to(tl.uint32) ^ key0), column_key)
            keep = draw >= limit
            if WITH_DA:
                da0 = tl.dot(tl.trans(tl.where(keep, xt, 0.0)), d0, da0, input_precision=PRECISION)
            if WITH_DX:
                add = tl.where(keep, tl.dot(d0, a0, input_precision=PRECISION), 0.0)
            if GROUPS > 1:
                d1 = tl.load(d_place + RANK, mask=d_mask, other=0.0).to(x.dtype.element_ty)
                keep = draw * 0x9E3779B1 >= limit
                if WITH_DA:
                    da1 = tl.dot(tl.trans(tl.where(keep, xt, 0.0)), d1, da1, input_precision=PRECISION)
                if WITH_DX:
                    add += tl.where(keep, tl.dot(d1, a1, input_precision=PRECISION), 0.0)
            if GROUPS > 2:
                d2 = tl.load(d_place + 2 * RANK, mask=d_mask, other=0.0).to(x.dtype.element_ty)
                keep = draw * 0x85EBCA77 >= limit
                if WITH_DA:
                    da2 = tl.dot(tl.trans(tl.where(keep, xt, 0.0)), d2, da2, input_precision=PRECISION)
                if WITH_DX:
                    add += tl.where(keep, tl.dot(d2, a2, input_precision=PRECISION), 0.0)
        else:
            if WITH_DA:
                da0 = tl.dot(tl.trans(xt), d0, da0, input_precision=PRECISION)
            if WITH_DX:
                add = tl.dot(d0, a0, input_precision=PRECISION)
        if WITH_DX:
            tl.store(dx_place, before + add * scale, mask=mask)
    if WITH_DA:
        first_row = tl.program_id(1).to(tl.int64) * (GROUPS * RANK)
        place = partial + (first_row + rank)[None, :] * size + column[:, None]
        inside = inside_r[None, :] & inside_h[:, None]
        tl.store(place, da0 * scale, mask=inside)
        if GROUPS > 1:
            tl.store(place + RANK * size, da1 * scale, mask=inside)
        if GROUPS > 2:
            tl.store(place + 2 * RANK * size, da2 * scale, mask=inside)


@jit
def _add_partials(
    partial: tl.tensor,
    da: tl.tensor,
    shares: int,
    ranks: int,
    size: int,
    rank_stride: int,
    column_stride: int,
    BLOCK: tl.constexpr,
) -> None:
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < ranks * size
    rank = element // size
    place = da + rank * rank_stride + (element - rank * size) * column_stride
    total = tl.load(place, mask=mask, other=0.0)
    for share in range(shares):
        total += tl.load(partial + tl.cast(share, tl.int64) * ranks * size + element, mask=mask, other=0.0)
    tl.store(place, total, mask=mask)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _signed32(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def _dropout(dropout: float, groups: int, ranks: int, seed: Tensor | None, x: Tensor) -> tuple[Tensor, int, float]:
    """The seed (any tensor where there's no dropout), the threshold and the scale.

    Raises:
        ValueError: Dropout without a seed, groups of unequal rank, or masks for more than three.
    """
    if dropout and groups > 3:
        raise ValueError(f"{groups} adapters on one input with dropout; the kernel draws masks for three")
    if ranks % groups:
        raise ValueError(f"{ranks} rows of A don't make {groups} groups of one rank")
    if dropout == 0.0:
        return x, 0, 1.0
    if seed is None:
        raise ValueError("dropout needs a seed")
    return seed, reference.dropout_threshold(dropout), reference.dropout_scale(dropout)


def lora_down(
    x: Tensor,
    a: Tensor,
    *,
    groups: int = 1,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    out: Tensor | None = None,
    ones: bool = False,
    copy: Tensor | None = None,
) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference.lora_down`."""
    if not runs_on_triton(x):
        return reference.lora_down(
            x, a, groups=groups, dropout=dropout, seed=seed, stream=stream, out=out, ones=ones, copy=copy
        )
    (tokens, size), ranks = x.shape, a.shape[0]
    source, threshold, scale = _dropout(dropout, groups, ranks, seed, x)
    u = x.new_empty(tokens, ranks) if out is None else out
    masks = groups if dropout else 1  # without masks the adapters are one of their ranks together
    # Enough programs for small batches too: fewer tokens each, and a group each.
    block_t = 64 if tokens >= 8192 else 32 if tokens >= 4096 else 16
    split = masks > 1 and tokens <= 4096
    block_r = max(pow2(ranks // masks), 16)
    tail = u.shape[1] - ranks
    target = x if copy is None else copy
    _down[(cdiv(tokens, block_t), masks if split else 1)](
        x, a, u, target, source, _signed32(reference.stream_key(stream)), threshold, scale, tokens, size,
        x.stride(0), a.stride(0), u.stride(0), target.stride(0),
        DROPOUT=dropout > 0.0, GROUPS=1 if split else masks, SPLIT=split, RANK=ranks // masks, RANKS=ranks,
        TAIL=tail, ONES=ones, COPY=copy is not None,
        BLOCK_T=block_t, BLOCK_H=64 if masks > 1 or block_r > 64 else 128, BLOCK_R=block_r,
        BLOCK_TAIL=pow2(max(tail, 1)), ALIGN=row_alignment(x, copy),
        PRECISION=_precision(x), num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return u


def lora_down_backward_(
    du: Tensor,
    x: Tensor,
    a: Tensor,
    *,
    da: Tensor | None,
    dx: Tensor | None,
    groups: int = 1,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> None:
    """See :func:`slimtune.engine.kernels.reference.lora_down_backward_`."""
    if not runs_on_triton(x):
        reference.lora_down_backward_(du, x, a, da=da, dx=dx, groups=groups, dropout=dropout, seed=seed, stream=stream)
        return
    source, threshold, scale = _dropout(dropout, groups, a.shape[0], seed, x)
    _launch_backward(du, x, a, da, dx, groups if dropout else 1, source, stream, threshold, scale)


def lora_up_backward_(
    dy: Tensor, u: Tensor, scaling: float, *, db: Tensor, outputs: Sequence[int] | None = None
) -> None:
    """See :func:`slimtune.engine.kernels.reference.lora_up_backward_`."""
    if not runs_on_triton(dy):
        reference.lora_up_backward_(dy, u, scaling, db=db, outputs=outputs)
        return
    # dBᵀ = scaling · uᵀ dy has the shape of dA = duᵀ x.
    widths = tuple(outputs or ())
    if len(widths) < 2:
        _launch_backward(u, dy, u, db.T, None, 1, u, 0, 0, scaling)
    elif len(widths) < 4 and all(width % 128 == 0 for width in widths):
        ends = (*accumulate(widths), 0)
        rank = db.shape[1]
        _launch_backward(u[:, :rank], dy, u, db.T, None, 1, u, 0, 0, scaling, (ends[0], ends[1] * (len(widths) > 2)))
    else:
        start, rank = 0, db.shape[1]
        for index, width in enumerate(widths):
            columns = slice(start, start + width)
            part = u[:, index * rank : (index + 1) * rank]
            _launch_backward(part, dy[:, columns], u, db[columns].T, None, 1, u, 0, 0, scaling)
            start += width


def _launch_backward(
    du: Tensor,
    x: Tensor,
    a: Tensor,
    da: Tensor | None,
    dx: Tensor | None,
    groups: int,
    seed: Tensor,
    stream: int,
    threshold: int,
    scale: float,
    splits: tuple[int, int] = (0, 0),
) -> None:
    (tokens, size), ranks = x.shape, du.shape[1]
    block_r = max(pow2(ranks // groups), 16)
    block_t = 64 if threshold == 0 and block_r <= 64 else 32
    block_h = 32 if block_r > 64 else 64 if groups > 1 or tokens < 4096 or block_r > 16 else 128
    # Shares of at least 128 tokens, 256 where no dx is written; enough of them to fill the device.
    wanted = min(cdiv(tokens, 256), 16) if dx is None else min(cdiv(tokens, 128), 32)
    share = cdiv(cdiv(tokens, wanted), block_t) * block_t
    shares = cdiv(tokens, share)
    partial = x if da is None else torch.empty(shares, ranks, size, dtype=torch.float32, device=x.device)
    target = x if dx is None else dx
    _down_backward[(cdiv(size, block_h), shares)](
        du, x, a, partial, target, seed, _signed32(reference.stream_key(stream)), threshold, scale,
        tokens, share, size, du.stride(0), x.stride(0), a.stride(0), target.stride(0),
        WITH_DA=da is not None, WITH_DX=dx is not None, SPLIT1=splits[0], SPLIT2=splits[1],
        DROPOUT=threshold > 0, GROUPS=groups, RANK=ranks // groups, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_R=block_r,
        ALIGN=row_alignment(x, dx), PRECISION=_precision(x), num_warps=8 if threshold and block_h == 128 else 4,
        num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    if da is not None:
        block = 256
        _add_partials[(cdiv(ranks * size, block),)](
            partial, da, shares, ranks, size, da.stride(0), da.stride(1), BLOCK=block, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
