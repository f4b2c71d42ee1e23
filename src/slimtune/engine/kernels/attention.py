"""Causal attention inside documents for what PyTorch's kernels don't take: soft caps, sinks, heads of up to 512.

What is computed: :mod:`slimtune.engine.kernels.reference_attention`. How: softmax as it goes, over blocks of keys
(FlashAttention-2, Dao 2023, arXiv:2307.08691), so that no score leaves the chip.

- The device alone reads where documents end, so a CUDA graph follows new ones. Blocks don't cross documents: document
  i's first block has the number boundaries[i] // block + i, which leaves room for all of those before it, and a program
  finds its document by that (``place``). The grid has tokens // block + documents programs a head; what is too
  many ends at once.
- Blocks that no query sees are not visited, and only those that lie across the diagonal, the window's edge or the
  document's end are masked. They are visited first, in one loop, so that one kernel serves layers with a window and
  without.
- The backward makes dk and dv in programs over key blocks, each for all query heads of its kv head, and dq in programs
  over query blocks: everything is summed in one place and in one order, so it repeats to the bit. Past a head dimension
  of 256 the sums of dk and dv don't fit the registers together; each has programs of its own.

Layout: q, do [T, N, D], k, v [T, K, D] with any strides over tokens and heads, D neighbours in memory. A block's
columns are a power of two: a D between is filled up with zeros.

Dtype traps: scores are kept times log2(e), as 2^x is what the device computes. p and ds are rounded to the inputs'
dtype for their products, which are summed in float32, as FlashAttention-2 does; results are rounded once. float32 is
multiplied as such, not in TF32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.engine.kernels import reference_attention as reference
from slimtune.engine.kernels._triton import (
    cdiv,
    constant,
    jit,
    jit_one_for_all,
    row_alignment,
    runs_on_triton,
    shared_memory,
    tl,
)
from slimtune.engine.kernels.attention_blocks import (
    LOG2E,
    bend,
    is_seen,
    keys_of,
    load_tile,
    masked_at,
    place,
    queries_of,
    store_tile,
)
from slimtune.engine.kernels.attention_tiles import Tile, Tiles, columns_of, tiles_for

__all__ = ["attention_backward", "attention_forward"]

_TOGETHER = 256
"""The largest head dimension of which one program sums dk and dv."""
_NOTHING = constant(-1e30)  # under any score, and finite: no NaN of inf - inf


@jit
def _forward_step(
    made: tl.tensor,
    total: tl.tensor,
    peak: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_token: int,
    v_token: int,
    first: int,
    query: int,
    key: int,
    length: int,
    window: int,
    scale: float,
    softcap: float,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAP: tl.constexpr,
    MASK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    k_tile = load_tile(k + (first + key) * k_token, k_token, length - key, KEYS, D, COLUMNS, MASK)
    scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
    scores = bend(scores, scale, softcap) * (softcap * LOG2E) if CAP else scores * (scale * LOG2E)
    if MASK:
        scores = tl.where(is_seen(query, key, window, QUERIES, KEYS), scores, -float("inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    p = tl.exp2(scores - higher[:, None])
    fading = tl.exp2(peak - higher)
    v_tile = load_tile(v + (first + key) * v_token, v_token, length - key, KEYS, D, COLUMNS, MASK)
    made = tl.dot(p.to(v_tile.dtype), v_tile, made * fading[:, None], input_precision="ieee")
    return made, total * fading + tl.sum(p, 1), higher


@jit_one_for_all("documents", "tokens", "window")
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    o: tl.tensor,
    logsumexp: tl.tensor,
    sinks: tl.tensor,
    boundaries: tl.tensor,
    q_token: int,
    q_head: int,
    k_token: int,
    k_head: int,
    v_token: int,
    v_head: int,
    o_token: int,
    documents: int,
    tokens: int,
    window: int,
    group: int,
    scale: float,
    softcap: float,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    # A document's last queries see the most keys: they begin first.
    start, length, query = place(boundaries, documents, tl.num_programs(1) - 1 - tl.program_id(1), QUERIES)
    if query >= length:
        return
    # Strides come in units of ALIGN elements, so that the compiler knows how wide it may read.
    q_token, k_token, v_token = q_token * ALIGN, k_token * ALIGN, v_token * ALIGN
    first, row = start.to(tl.int64), (start + query).to(tl.int64)
    q_tile = load_tile(q + head * q_head * ALIGN + row * q_token, q_token, length - query, QUERIES, D, COLUMNS, True)
    k += head // group * k_head * ALIGN
    v += head // group * v_head * ALIGN
    made = tl.zeros([QUERIES, COLUMNS], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    peak = tl.full([QUERIES], _NOTHING, tl.float32)
    if SINKS:
        total += 1.0
        peak = tl.zeros([QUERIES], tl.float32) + tl.maximum(tl.load(sinks + head).to(tl.float32) * LOG2E, _NOTHING)
    a, b, c, d = keys_of(query, length, window, QUERIES, KEYS)
    for number in range(tl.cdiv(b - a + d - c, KEYS)):
        made, total, peak = _forward_step(
            made, total, peak, q_tile, k, v, k_token, v_token, first, query, masked_at(number, a, b, c, KEYS),
            length, window, scale, softcap, D, COLUMNS, QUERIES, KEYS, CAP, True,
        )  # fmt: skip
    for key in range(b, c, KEYS):
        made, total, peak = _forward_step(
            made, total, peak, q_tile, k, v, k_token, v_token, first, query, key,
            length, window, scale, softcap, D, COLUMNS, QUERIES, KEYS, CAP, False,
        )  # fmt: skip
    store_tile(o + head * D + row * o_token, o_token, length - query, made / total[:, None], QUERIES, D, COLUMNS)
    at = tl.arange(0, QUERIES)
    tl.store(logsumexp + head * tokens + row + at, (peak + tl.log2(total)) / LOG2E, mask=at < length - query)


# -- backward ---------------------------------------------------------------------------------------------------------


@jit_one_for_all("tokens")
def _delta(
    do: tl.tensor,
    o: tl.tensor,
    delta: tl.tensor,
    do_token: int,
    do_head: int,
    o_token: int,
    o_head: int,
    tokens: int,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    """delta [N, T] = do · o."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    left, row = tokens - first, first.to(tl.int64)
    do_token, o_token = do_token * ALIGN, o_token * ALIGN
    x = load_tile(do + head * do_head * ALIGN + row * do_token, do_token, left, BLOCK, D, COLUMNS, True).to(tl.float32)
    y = load_tile(o + head * o_head * ALIGN + row * o_token, o_token, left, BLOCK, D, COLUMNS, True).to(tl.float32)
    at = tl.arange(0, BLOCK)
    tl.store(delta + head * tokens + row + at, tl.sum(x * y, 1), mask=at < left)


@jit
def _keys_step(
    dk: tl.tensor,
    dv: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q: tl.tensor,
    do: tl.tensor,
    logsumexp: tl.tensor,
    delta: tl.tensor,
    q_token: int,
    do_token: int,
    first: int,
    query: int,
    key: int,
    length: int,
    window: int,
    scale: float,
    softcap: float,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    MASK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What a block of queries adds; everything between is [KEYS, QUERIES], so that no product needs it turned."""
    at = tl.arange(0, QUERIES)
    q_tile = load_tile(q + (first + query) * q_token, q_token, length - query, QUERIES, D, COLUMNS, MASK)
    sums = tl.load(logsumexp + first + query + at, mask=at < length - query, other=float("inf"))  # infinity: p = 0
    scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
    if CAP:
        bent = bend(scores, scale, softcap)
        scores = bent * (softcap * LOG2E)
    else:
        bent = scores
        scores = scores * (scale * LOG2E)
    p = tl.exp2(scores - (sums * LOG2E)[None, :])
    if MASK:
        p = tl.where(tl.trans(is_seen(query, key, window, QUERIES, KEYS)), p, 0.0)
    do_tile = load_tile(do + (first + query) * do_token, do_token, length - query, QUERIES, D, COLUMNS, MASK)
    if DV:
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
    if DK:
        dp = tl.dot(v, tl.trans(do_tile), input_precision="ieee")
        ds = p * (dp - tl.load(delta + first + query + at, mask=at < length - query, other=0.0)[None, :])
        if CAP:
            ds *= 1.0 - bent * bent
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@jit_one_for_all("documents", "tokens", "window")
def _backward_keys(
    do: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    logsumexp: tl.tensor,
    delta: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    boundaries: tl.tensor,
    do_token: int,
    do_head: int,
    q_token: int,
    q_head: int,
    k_token: int,
    k_head: int,
    v_token: int,
    v_head: int,
    dk_token: int,
    documents: int,
    tokens: int,
    window: int,
    group: int,
    scale: float,
    softcap: float,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0).to(tl.int64)
    start, length, key = place(boundaries, documents, tl.program_id(1), KEYS)
    if key >= length:
        return
    q_token, k_token, v_token, do_token = q_token * ALIGN, k_token * ALIGN, v_token * ALIGN, do_token * ALIGN
    first, row = start.to(tl.int64), (start + key).to(tl.int64)
    k_tile = load_tile(k + kv_head * k_head * ALIGN + row * k_token, k_token, length - key, KEYS, D, COLUMNS, True)
    v_tile = k_tile
    if DK:
        v_tile = load_tile(v + kv_head * v_head * ALIGN + row * v_token, v_token, length - key, KEYS, D, COLUMNS, True)
    dk_sum = tl.zeros([KEYS, COLUMNS if DK else 1], tl.float32)
    dv_sum = tl.zeros([KEYS, COLUMNS if DV else 1], tl.float32)
    a, b, c, d = queries_of(key, length, window, QUERIES, KEYS)
    for member in range(group):
        head = kv_head * group + member
        q_at, do_at = q + head * q_head * ALIGN, do + head * do_head * ALIGN
        sums, deltas = logsumexp + head * tokens, delta + head * tokens
        for number in range(tl.cdiv(b - a + d - c, QUERIES)):
            dk_sum, dv_sum = _keys_step(
                dk_sum, dv_sum, k_tile, v_tile, q_at, do_at, sums, deltas, q_token, do_token, first,
                masked_at(number, a, b, c, QUERIES), key, length, window, scale, softcap,
                D, COLUMNS, QUERIES, KEYS, CAP, DK, DV, True,
            )  # fmt: skip
        for query in range(b, c, QUERIES):
            dk_sum, dv_sum = _keys_step(
                dk_sum, dv_sum, k_tile, v_tile, q_at, do_at, sums, deltas, q_token, do_token, first,
                query, key, length, window, scale, softcap,
                D, COLUMNS, QUERIES, KEYS, CAP, DK, DV, False,
            )  # fmt: skip
    if DK:
        store_tile(dk + kv_head * D + row * dk_token, dk_token, length - key, dk_sum * scale, KEYS, D, COLUMNS)
    if DV:
        store_tile(dv + kv_head * D + row * dk_token, dk_token, length - key, dv_sum, KEYS, D, COLUMNS)


@jit
def _queries_step(
    dq: tl.tensor,
    q: tl.tensor,
    do: tl.tensor,
    sums: tl.tensor,
    delta: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_token: int,
    v_token: int,
    first: int,
    query: int,
    key: int,
    length: int,
    window: int,
    scale: float,
    softcap: float,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAP: tl.constexpr,
    MASK: tl.constexpr,
) -> tl.tensor:
    k_tile = load_tile(k + (first + key) * k_token, k_token, length - key, KEYS, D, COLUMNS, MASK)
    v_tile = load_tile(v + (first + key) * v_token, v_token, length - key, KEYS, D, COLUMNS, MASK)
    scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
    if CAP:
        bent = bend(scores, scale, softcap)
        scores = bent * (softcap * LOG2E)
    else:
        bent = scores
        scores = scores * (scale * LOG2E)
    p = tl.exp2(scores - sums[:, None])
    if MASK:
        p = tl.where(is_seen(query, key, window, QUERIES, KEYS), p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v_tile), input_precision="ieee") - delta[:, None])
    if CAP:
        ds *= 1.0 - bent * bent
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")


@jit_one_for_all("documents", "tokens", "window")
def _backward_queries(
    do: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    logsumexp: tl.tensor,
    delta: tl.tensor,
    dq: tl.tensor,
    boundaries: tl.tensor,
    do_token: int,
    do_head: int,
    q_token: int,
    q_head: int,
    k_token: int,
    k_head: int,
    v_token: int,
    v_head: int,
    dq_token: int,
    documents: int,
    tokens: int,
    window: int,
    group: int,
    scale: float,
    softcap: float,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAP: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    start, length, query = place(boundaries, documents, tl.num_programs(1) - 1 - tl.program_id(1), QUERIES)
    if query >= length:
        return
    q_token, k_token, v_token, do_token = q_token * ALIGN, k_token * ALIGN, v_token * ALIGN, do_token * ALIGN
    first, row, left = start.to(tl.int64), (start + query).to(tl.int64), length - query
    q_tile = load_tile(q + head * q_head * ALIGN + row * q_token, q_token, left, QUERIES, D, COLUMNS, True)
    do_tile = load_tile(do + head * do_head * ALIGN + row * do_token, do_token, left, QUERIES, D, COLUMNS, True)
    at = tl.arange(0, QUERIES)
    sums = tl.load(logsumexp + head * tokens + row + at, mask=at < left, other=float("inf")) * LOG2E
    deltas = tl.load(delta + head * tokens + row + at, mask=at < left, other=0.0)
    k += head // group * k_head * ALIGN
    v += head // group * v_head * ALIGN
    made = tl.zeros([QUERIES, COLUMNS], tl.float32)
    a, b, c, d = keys_of(query, length, window, QUERIES, KEYS)
    for number in range(tl.cdiv(b - a + d - c, KEYS)):
        made = _queries_step(
            made, q_tile, do_tile, sums, deltas, k, v, k_token, v_token, first, query, masked_at(number, a, b, c, KEYS),
            length, window, scale, softcap, D, COLUMNS, QUERIES, KEYS, CAP, True,
        )  # fmt: skip
    for key in range(b, c, KEYS):
        made = _queries_step(
            made, q_tile, do_tile, sums, deltas, k, v, k_token, v_token, first, query, key,
            length, window, scale, softcap, D, COLUMNS, QUERIES, KEYS, CAP, False,
        )  # fmt: skip
    store_tile(dq + head * D + row * dq_token, dq_token, left, made * scale, QUERIES, D, COLUMNS)


# -- what is called ---------------------------------------------------------------------------------------------------


def _options(q: Tensor, k: Tensor, boundaries: Tensor, scale: float, window: int | None, softcap: float | None) -> Any:
    """What the three kernels are told alike."""
    return {
        "documents": len(boundaries) - 1,
        "tokens": q.shape[0],
        "window": q.shape[0] if window is None else window,
        "group": q.shape[1] // k.shape[1],
        "scale": scale,
        "softcap": 1.0 if softcap is None else softcap,
        "D": q.shape[2],
        "COLUMNS": columns_of(q.shape[2]),
        "CAP": softcap is not None,
        "enable_fp_fusion": True,
    }


def _cut(tile: Tile) -> dict[str, int]:
    return {"QUERIES": tile.queries, "KEYS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


def _strides(align: int, *tensors: Tensor) -> list[int]:
    """Of each over tokens and heads, in units of ``align`` elements."""
    return [stride // align for x in tensors for stride in x.stride()[:2]]


def _tiles(q: Tensor) -> Tiles:
    tiles = tiles_for(q.shape[2], q.dtype, shared_memory(q.device))
    if tiles is None:
        raise ValueError(f"no block of {q.shape[2]} columns in {q.dtype} fits this device")
    return tiles


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`slimtune.engine.kernels.reference_attention.attention_forward`; ``tiles`` cuts the work otherwise."""
    if not runs_on_triton(q):
        return reference.attention_forward(
            q, k, v, boundaries, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    tile = (tiles or _tiles(q)).forward
    tokens, heads, _ = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    align = row_alignment(q, k, v)
    _forward[(heads, tokens // tile.queries + len(boundaries) - 1)](
        q, k, v, o, logsumexp, logsumexp if sinks is None else sinks, boundaries,
        *_strides(align, q, k, v), o.stride(0), SINKS=sinks is not None, ALIGN=align,
        **_options(q, k, boundaries, scale, window, softcap), **_cut(tile),
    )  # fmt: skip
    return o, logsumexp


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    logsumexp: Tensor,
    boundaries: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`slimtune.engine.kernels.reference_attention.attention_backward`."""
    if not runs_on_triton(q):
        return reference.attention_backward(
            do, q, k, v, o, logsumexp, boundaries, scale=scale, window=window, softcap=softcap
        )
    cut = tiles or _tiles(q)
    (tokens, heads, dim), kv_heads, ends = q.shape, k.shape[1], len(boundaries) - 1
    delta = torch.empty_like(logsumexp)
    align = row_alignment(do, q, k, v, o)
    columns = columns_of(dim)
    rows = max(16, 8192 // columns)
    _delta[(heads, cdiv(tokens, rows))](
        do, o, delta, *_strides(align, do, o), tokens, D=dim, COLUMNS=columns, BLOCK=rows, ALIGN=align, num_warps=4,
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    options = _options(q, k, boundaries, scale, window, softcap) | {"ALIGN": align}
    strides = _strides(align, do, q, k, v)
    for dk_too, dv_too in ((True, True),) if columns <= _TOGETHER else ((False, True), (True, False)):
        _backward_keys[(kv_heads, tokens // cut.keys.keys + ends)](
            do, q, k, v, logsumexp, delta, dk, dv, boundaries, *strides, dk.stride(0),
            DK=dk_too, DV=dv_too, **options, **_cut(cut.keys),
        )  # fmt: skip
    _backward_queries[(heads, tokens // cut.queries.queries + ends)](
        do, q, k, v, logsumexp, delta, dq, boundaries, *strides, dq.stride(0), **options, **_cut(cut.queries),
    )  # fmt: skip
    return dq, dk, dv
