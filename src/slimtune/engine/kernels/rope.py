"""Rotary position embedding of queries and keys, and Qwen3's RMS norm over each of their heads.

Forward, a pair (a, b) of a head's columns at a position with angles c = cos, s = sin: (a·c - b·s, b·c + a·s). A
rotation's transpose is its inverse, so the backward is the same with -s. With norms, a head h of D elements becomes
h · rstd · weight first; the backward of that is RMS norm's (see ``norm.py``), the weight being frozen.

Which columns make a pair differs (:class:`~slimtune.engine.kernels.formats.Pairs`); where only some are rotated, the
tables go on with c = 1, s = 0 for the others, up to D / 2 columns.

Layout: q, k [T, heads, D], each token's heads neighbours in memory, tokens with any stride: views of a fused
[T, (heads + 2 kv_heads) · D] buffer. cos and sin are float32 tables [positions, D / 2]. One program takes one token.
Source: Su et al. 2021 (arXiv:2104.09864), paired as in Transformers' ``rotate_half``s.

Dtype traps: Transformers rounds cos and sin to the model's dtype; here the angles stay in float32 and a result is
rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimtune.engine.kernels import reference
from slimtune.engine.kernels._triton import jit, pow2, row_alignment, runs_on_triton, tl
from slimtune.engine.kernels.formats import HALVES, Pairs

__all__ = ["merge_qkv_grad", "qk_norm_rope", "qk_norm_rope_backward", "rope_"]


@jit
def _rotated(a: tl.tensor, b: tl.tensor, c: tl.tensor, s: tl.tensor) -> tl.tensor:
    return a * c - b * s, b * c + a * s


@jit
def _columns(DIM: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, HALF_P: tl.constexpr) -> tl.tensor:
    """Where a head's pairs lie: the columns of the first and of the second of each, [HALF_P]."""
    pair = tl.arange(0, HALF_P)
    if INTERLEAVED:
        first = 2 * pair
        second = first + 1
    elif TURNED == DIM:
        first = pair
        second = pair + DIM // 2
    else:
        # What isn't rotated makes pairs of its own, whose angle is zero.
        turned = pair < TURNED // 2
        first = tl.where(turned, pair, pair + TURNED // 2)
        second = first + tl.where(turned, TURNED // 2, (DIM - TURNED) // 2)
    return first, second


@jit
def _pairs(
    x: tl.tensor, start: int, HEADS: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS_P: tl.constexpr, HALF_P: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Pointers to the firsts and seconds of a token's pairs, [HEADS_P, HALF_P] each, and the mask."""
    head = tl.arange(0, HEADS_P)
    first, second = _columns(DIM, TURNED, INTERLEAVED, HALF_P)
    mask = (head < HEADS)[:, None] & (tl.arange(0, HALF_P) < DIM // 2)[None, :]
    row = x + start + head[:, None] * DIM
    return row + first[None, :], row + second[None, :], mask


@jit
def _angles(cos: tl.tensor, sin: tl.tensor, position: int, DIM: tl.constexpr, HALF_P: tl.constexpr) -> tl.tensor:
    column = tl.arange(0, HALF_P)
    offset = position * (DIM // 2) + column
    inside = column < DIM // 2
    c = tl.load(cos + offset, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + offset, mask=inside, other=0.0).to(tl.float32)
    return c[None, :], s[None, :]


@jit
def _turn(
    x: tl.tensor,
    out: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    x_start: int,
    out_start: int,
    c: tl.tensor,
    s: tl.tensor,
    eps: float,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS_P: tl.constexpr,
    HALF_P: tl.constexpr,
) -> None:
    """The heads of one token of x, normalised if NORM, rotated, to out."""
    source_a, source_b, mask = _pairs(x, x_start, HEADS, DIM, TURNED, INTERLEAVED, HEADS_P, HALF_P)
    a = tl.load(source_a, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source_b, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        first, second = _columns(DIM, TURNED, INTERLEAVED, HALF_P)
        inside = tl.arange(0, HALF_P) < DIM // 2
        head = tl.arange(0, HEADS_P)
        wa = tl.load(weight + first, mask=inside, other=0.0).to(tl.float32)
        wb = tl.load(weight + second, mask=inside, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, axis=1) / DIM + eps)
        tl.store(rstd + head, r, mask=head < HEADS)
        a *= r[:, None] * wa[None, :]
        b *= r[:, None] * wb[None, :]
    a, b = _rotated(a, b, c, s)
    target_a, target_b, mask = _pairs(out, out_start, HEADS, DIM, TURNED, INTERLEAVED, HEADS_P, HALF_P)
    tl.store(target_a, a, mask=mask)
    tl.store(target_b, b, mask=mask)


@jit
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    rstd: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    position_ids: tl.tensor,
    q_stride: int,
    k_stride: int,
    q_out_stride: int,
    k_out_stride: int,
    eps: float,
    INVERSE: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS_P: tl.constexpr,
    KV_HEADS_P: tl.constexpr,
    HALF_P: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    c, s = _angles(cos, sin, tl.load(position_ids + token), DIM, HALF_P)
    if INVERSE:
        s = -s
    rstd += token * (HEADS + KV_HEADS)
    _turn(
        q, q_out, q_weight, rstd, tl.multiple_of(token * q_stride, ALIGN), tl.multiple_of(token * q_out_stride, ALIGN),
        c, s, eps, NORM, HEADS, DIM, TURNED, INTERLEAVED, HEADS_P, HALF_P,
    )  # fmt: skip
    _turn(
        k, k_out, k_weight, rstd + HEADS, tl.multiple_of(token * k_stride, ALIGN),
        tl.multiple_of(token * k_out_stride, ALIGN), c, s, eps,
        NORM, KV_HEADS, DIM, TURNED, INTERLEAVED, KV_HEADS_P, HALF_P,
    )  # fmt: skip


@jit
def _turn_back(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    out: tl.tensor,
    dy_start: int,
    x_start: int,
    out_start: int,
    c: tl.tensor,
    s: tl.tensor,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS_P: tl.constexpr,
    HALF_P: tl.constexpr,
) -> None:
    """The gradient of the heads of one token, from after the rotation to before it and before the norm."""
    source_a, source_b, mask = _pairs(dy, dy_start, HEADS, DIM, TURNED, INTERLEAVED, HEADS_P, HALF_P)
    a = tl.load(source_a, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source_b, mask=mask, other=0.0).to(tl.float32)
    a, b = _rotated(a, b, c, -s)
    if NORM:
        first, second = _columns(DIM, TURNED, INTERLEAVED, HALF_P)
        inside = tl.arange(0, HALF_P) < DIM // 2
        head = tl.arange(0, HEADS_P)
        wa = tl.load(weight + first, mask=inside, other=0.0).to(tl.float32)
        wb = tl.load(weight + second, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + head, mask=head < HEADS, other=0.0)[:, None]
        before_a, before_b, mask = _pairs(x, x_start, HEADS, DIM, TURNED, INTERLEAVED, HEADS_P, HALF_P)
        xa = tl.load(before_a, mask=mask, other=0.0).to(tl.float32) * r
        xb = tl.load(before_b, mask=mask, other=0.0).to(tl.float32) * r
        a *= wa[None, :]
        b *= wb[None, :]
        mean = (tl.sum(a * xa + b * xb, axis=1) / DIM)[:, None]
        a = (a - xa * mean) * r
        b = (b - xb * mean) * r
    target_a, target_b, mask = _pairs(out, out_start, HEADS, DIM, TURNED, INTERLEAVED, HEADS_P, HALF_P)
    tl.store(target_a, a, mask=mask)
    tl.store(target_b, b, mask=mask)


@jit
def _backward(
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    rstd: tl.tensor,
    out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    position_ids: tl.tensor,
    dq_stride: int,
    dk_stride: int,
    dv_stride: int,
    q_stride: int,
    k_stride: int,
    out_stride: int,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS_P: tl.constexpr,
    KV_HEADS_P: tl.constexpr,
    HALF_P: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    c, s = _angles(cos, sin, tl.load(position_ids + token), DIM, HALF_P)
    rstd += token * (HEADS + KV_HEADS)
    target = tl.multiple_of(token * out_stride, ALIGN)
    dv_start = tl.multiple_of(token * dv_stride, ALIGN)
    value_a, value_b, mask = _pairs(dv, dv_start, KV_HEADS, DIM, DIM, False, KV_HEADS_P, HALF_P)
    va = tl.load(value_a, mask=mask, other=0.0)
    vb = tl.load(value_b, mask=mask, other=0.0)
    _turn_back(
        dq, q, q_weight, rstd, out, tl.multiple_of(token * dq_stride, ALIGN), tl.multiple_of(token * q_stride, ALIGN),
        target, c, s, NORM, HEADS, DIM, TURNED, INTERLEAVED, HEADS_P, HALF_P,
    )  # fmt: skip
    _turn_back(
        dk, k, k_weight, rstd + HEADS, out + HEADS * DIM, tl.multiple_of(token * dk_stride, ALIGN),
        tl.multiple_of(token * k_stride, ALIGN), target, c, s,
        NORM, KV_HEADS, DIM, TURNED, INTERLEAVED, KV_HEADS_P, HALF_P,
    )  # fmt: skip
    values = out + (HEADS + KV_HEADS) * DIM
    place_a, place_b, mask = _pairs(values, target, KV_HEADS, DIM, DIM, False, KV_HEADS_P, HALF_P)
    tl.store(place_a, va, mask=mask)
    tl.store(place_b, vb, mask=mask)


def _shape(q: Tensor, k: Tensor, others: Sequence[Tensor], pairs: Pairs) -> dict[str, int]:
    """The constants that a launch is compiled for.

    Raises:
        ValueError: A token's heads aren't neighbours in memory.
    """
    heads, dim = q.shape[1:]
    kv_heads = k.shape[1]
    tensors = (q, k, *others)
    if any(x.stride(2) != 1 or (x.stride(1) != dim and x.shape[1] > 1) for x in tensors):
        raise ValueError("a token's heads must lie one after the other")
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "TURNED": dim if pairs.dim is None else pairs.dim,
        "INTERLEAVED": pairs.interleaved,
        "HEADS_P": pow2(heads),
        "KV_HEADS_P": pow2(kv_heads),
        "HALF_P": pow2(dim // 2),
        "ALIGN": row_alignment(*(x[:, 0] for x in tensors)),
    }


def _num_warps(shape: dict[str, int]) -> int:
    """16 elements to a thread."""
    return min(max(shape["HEADS_P"] * shape["HALF_P"] // 256, 1), 16)


def rope_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    pairs: Pairs = HALVES,
    *,
    inverse: bool = False,
) -> None:
    """See :func:`slimtune.engine.kernels.reference.rope_`."""
    if not runs_on_triton(q):
        reference.rope_(q, k, cos, sin, position_ids, pairs, inverse=inverse)
        return
    shape = _shape(q, k, (), pairs)
    _forward[(q.shape[0],)](
        q, k, q, k, q, k, cos, cos, sin, position_ids,
        q.stride(0), k.stride(0), q.stride(0), k.stride(0), 0.0,
        INVERSE=inverse, NORM=False, **shape, num_warps=_num_warps(shape), enable_fp_fusion=True,
    )  # fmt: skip


def merge_qkv_grad(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    pairs: Pairs = HALVES,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference.merge_qkv_grad`."""
    if not runs_on_triton(dq):
        return reference.merge_qkv_grad(dq, dk, dv, cos, sin, position_ids, pairs, out=out)
    merged = _merged(dq, dk) if out is None else out
    shape = _shape(dq, dk, (dv, merged), pairs)
    _backward[(dq.shape[0],)](
        dq, dk, dv, dq, dk, dq, dk, cos, merged, cos, sin, position_ids,
        dq.stride(0), dk.stride(0), dv.stride(0), 0, 0, merged.stride(0),
        NORM=False, **shape, num_warps=_num_warps(shape), enable_fp_fusion=True,
    )  # fmt: skip
    return merged


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    pairs: Pairs = HALVES,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`slimtune.engine.kernels.reference.qk_norm_rope`."""
    if not runs_on_triton(q):
        return reference.qk_norm_rope(q, k, q_weight, k_weight, eps, cos, sin, position_ids, pairs)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    rstd = torch.empty(q.shape[0], q.shape[1] + k.shape[1], dtype=torch.float32, device=q.device)
    shape = _shape(q, k, (q_out, k_out), pairs)
    _forward[(q.shape[0],)](
        q, k, q_out, k_out, q_weight, k_weight, rstd, cos, sin, position_ids,
        q.stride(0), k.stride(0), q_out.stride(0), k_out.stride(0), eps,
        INVERSE=False, NORM=True, **shape, num_warps=_num_warps(shape), enable_fp_fusion=True,
    )  # fmt: skip
    return q_out, k_out, rstd


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    pairs: Pairs = HALVES,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference.qk_norm_rope_backward`."""
    if not runs_on_triton(dq):
        return reference.qk_norm_rope_backward(
            dq, dk, dv, q, k, q_weight, k_weight, rstd, cos, sin, position_ids, pairs, out=out
        )
    merged = _merged(dq, dk) if out is None else out
    shape = _shape(dq, dk, (dv, q, k, merged), pairs)
    _backward[(dq.shape[0],)](
        dq, dk, dv, q, k, q_weight, k_weight, rstd, merged, cos, sin, position_ids,
        dq.stride(0), dk.stride(0), dv.stride(0), q.stride(0), k.stride(0), merged.stride(0),
        NORM=True, **shape, num_warps=_num_warps(shape), enable_fp_fusion=True,
    )  # fmt: skip
    return merged


def _merged(dq: Tensor, dk: Tensor) -> Tensor:
    return dq.new_empty(dq.shape[0], dq.shape[1] + 2 * dk.shape[1], dq.shape[2])
