"""What the attention kernels share: where a block lies, which blocks see each other, and how tiles come and go."""

from __future__ import annotations

import math

from slimtune.engine.kernels._triton import constant, jit, tl

__all__ = ["LOG2E", "bend", "is_seen", "keys_of", "load_tile", "masked_at", "place", "queries_of", "store_tile"]

LOG2E = constant(1 / math.log(2))
"""Of scores, as 2^x is what the device computes."""


@jit
def place(boundaries: tl.tensor, documents: int, number: int, BLOCK: tl.constexpr) -> tuple[int, int, int]:
    """A block's document: its first token and its length, and where in it the block begins (past its end: nothing)."""
    low = number * 0
    high = low + documents
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(boundaries + middle) // BLOCK + middle <= number
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(boundaries + low)
    end = tl.load(boundaries + low + 1)
    return start, end - start, (number - start // BLOCK - low) * BLOCK


@jit
def load_tile(
    at: tl.tensor,
    stride: int,
    rows: int,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK: tl.constexpr,
) -> tl.tensor:
    """[BLOCK, COLUMNS] from ``at`` on; zeros past ``rows``, if they are masked, and past D."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    if MASK:
        x = tl.load(at + row * stride + column, mask=(row < rows) & (column < D), other=0.0)
    elif D < COLUMNS:
        x = tl.load(at + row * stride + column, mask=column < D, other=0.0)
    else:
        x = tl.load(at + row * stride + column)
    return x


@jit
def store_tile(
    at: tl.tensor,
    stride: int,
    rows: int,
    x: tl.tensor,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """x [BLOCK, COLUMNS] to ``at`` and on, without what lies past ``rows`` or D."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    tl.store(at + row * stride + column, x.to(at.dtype.element_ty), mask=(row < rows) & (column < D))


@jit
def bend(x: tl.tensor, scale: float, softcap: float) -> tl.tensor:
    """tanh(x · scale / softcap); 2^x may end in infinity or zero, and is right with either."""
    return 1.0 - 2.0 / (tl.exp2(x * (scale / softcap * 2.0 * LOG2E)) + 1.0)


@jit
def is_seen(query: int, key: int, window: int, QUERIES: tl.constexpr, KEYS: tl.constexpr) -> tl.tensor:
    """[QUERIES, KEYS]: which of these keys these queries see."""
    distance = (query + tl.arange(0, QUERIES))[:, None] - (key + tl.arange(0, KEYS))[None, :]
    return (distance >= 0) & (distance < window)


@jit
def keys_of(
    query: int, length: int, window: int, QUERIES: tl.constexpr, KEYS: tl.constexpr
) -> tuple[int, int, int, int]:
    """(a, b, c, d): of a block of queries, key blocks from a to b and from c to d are masked, those between whole."""
    a = tl.maximum(query - window + 1, 0) // KEYS * KEYS
    d = tl.minimum(query + QUERIES, length)
    c = tl.maximum((query + 1) // KEYS * KEYS, a)
    edge = tl.maximum(query + QUERIES - window, 0)
    b = tl.minimum(tl.maximum((edge + KEYS - 1) // KEYS * KEYS, a), c)
    return a, b, c, d


@jit
def queries_of(
    key: int, length: int, window: int, QUERIES: tl.constexpr, KEYS: tl.constexpr
) -> tuple[int, int, int, int]:
    """(a, b, c, d): of a block of keys, query blocks from a to b and from c to d are masked, those between whole."""
    a = key // QUERIES * QUERIES
    d = tl.minimum(key + KEYS - 1 + window, length)
    b = (key + KEYS - 1 + QUERIES - 1) // QUERIES * QUERIES
    c = tl.maximum(tl.minimum(key + window, length) // QUERIES * QUERIES, a)
    b = tl.minimum(b, c)
    return a, b, c, d


@jit
def masked_at(number: int, a: int, b: int, c: int, BLOCK: tl.constexpr) -> tl.tensor:
    """Where the masked block of this number begins: those from a to b come first, then those from c on."""
    first = a + number * BLOCK
    return tl.where(first < b, first, c + first - b)


# -- forward ----------------------------------------------------------------------------------------------------------
