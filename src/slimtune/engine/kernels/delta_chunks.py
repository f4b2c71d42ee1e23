"""The gated delta rule's kernels: what is computed is :mod:`slimtune.engine.kernels.reference_delta`'s, by its names.

A chunk's own matrices and what follows from a known state take a program for each chunk and value head, all at once.
Only the states are carried from chunk to chunk: a program for each document and value head, and for some of its
columns, walks over the chunks that the document touches. It takes the document's own rows alone, so that two documents
in a chunk are two programs' business, and nothing is added by more than one: a run repeats to the bit.

q and k are given their lengths where they are read. Everything is float32 on the chip; where the model has 16 bits,
products are of numbers rounded to 19 for tensor cores (``PRECISION``), but for the inverse, whose errors would add up;
there and in float32 they are made of three such products.
"""

from __future__ import annotations

from slimtune.engine.kernels._triton import jit, jit_one_for_all, tl

__all__ = ["gradients", "inverses", "lengths_back", "outputs", "states", "states_back", "through"]


@jit
def _cut(x: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """x rounded to the 19 bits of tensor cores, which on Hopper leave the others out instead."""
    if PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@jit
def _product(a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    return tl.dot(_cut(a, PRECISION), _cut(b, PRECISION), input_precision=PRECISION)


@jit
def _added(a: tl.tensor, b: tl.tensor, to: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    return tl.dot(_cut(a, PRECISION), _cut(b, PRECISION), to, input_precision=PRECISION)


@jit
def _unit(
    x: tl.tensor, token: tl.tensor, inside: tl.tensor, stride: int, column: int, length: float,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Some tokens' q or k of one head [tokens, BLOCK], of this length."""
    each = tl.arange(0, BLOCK)
    place = x + (token.to(tl.int64) * stride + column)[:, None] + each[None, :]
    y = tl.load(place, mask=inside[:, None] & (each < DIM)[None, :], other=0.0).to(tl.float32)
    return y * (length / tl.sqrt_rn(tl.sum(y * y, axis=1) + 1e-6))[:, None]


@jit
def _tile(
    x: tl.tensor, token: tl.tensor, inside: tl.tensor, stride: int, column: int, each: tl.tensor, DIM: tl.constexpr
) -> tl.tensor:
    """Some tokens' columns of one head [tokens, columns]; ``each``: which of its DIM."""
    place = x + (token.to(tl.int64) * stride + column)[:, None] + each[None, :]
    return tl.load(place, mask=inside[:, None] & (each < DIM)[None, :], other=0.0).to(tl.float32)


@jit
def _square(x: tl.tensor, number: int, CHUNK: tl.constexpr) -> tl.tensor:
    """A chunk's T."""
    row = tl.arange(0, CHUNK)
    return tl.load(x + tl.cast(number, tl.int64) * CHUNK * CHUNK + row[:, None] * CHUNK + row[None, :])


@jit
def _rows(x: tl.tensor, number: int, each: tl.tensor, CHUNK: tl.constexpr, DIM: tl.constexpr) -> tl.tensor:
    """Pointers into [N V, CHUNK, DIM]."""
    row = tl.arange(0, CHUNK)
    return x + tl.cast(number, tl.int64) * CHUNK * DIM + row[:, None] * DIM + each[None, :]


@jit
def _state(
    x: tl.tensor, number: int, each: tl.tensor, KEY_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr
) -> tl.tensor:
    """Pointers into [N V, KEY_DIM, DIM], and where they are inside."""
    key = tl.arange(0, KEYS)
    place = x + tl.cast(number, tl.int64) * KEY_DIM * DIM + key[:, None] * DIM + each[None, :]
    return place, (key < KEY_DIM)[:, None] & (each < DIM)[None, :]


@jit
def _together(first: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """Whether a token [CHUNK] is of another's document [, CHUNK], and not before it."""
    row = tl.arange(0, CHUNK)
    return (first[:, None] == first[None, :]) & (row[:, None] >= row[None, :])


@jit
def _decays(
    g: tl.tensor, starts: tl.tensor, token: tl.tensor, inside: tl.tensor, heads: int, head: int, CHUNK: tl.constexpr
) -> tl.tensor:
    """G [CHUNK], E [CHUNK], Γ [CHUNK, CHUNK], and the first token of each one's document."""
    row = tl.arange(0, CHUNK)
    each = tl.load(g + token * heads + head, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(starts + token, mask=inside, other=-1)
    together = _together(first, CHUNK)
    total = tl.sum(tl.where(together, each[None, :], 0.0), axis=1)
    gamma = tl.where(together, tl.exp(tl.where(together, total[:, None] - total[None, :], 0.0)), 0.0)
    e = tl.where(inside & (first < token - row), tl.exp(total), 0.0)
    return total, e, gamma, first


@jit
def _to_last(total: tl.tensor, first: tl.tensor, inside: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """What is left of each token behind the chunk's last one [CHUNK]: nothing of another document's."""
    is_last = tl.arange(0, CHUNK) == CHUNK - 1
    last_first = tl.sum(tl.where(is_last, first, 0), axis=0)
    last_total = tl.sum(tl.where(is_last, total, 0.0), axis=0)
    ends = inside & (first == last_first)
    return tl.where(ends, tl.exp(tl.where(ends, last_total - total, 0.0)), 0.0)


@jit_one_for_all("tokens")
def inverses(
    mixed: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    starts: tl.tensor,
    inverse: tl.tensor,
    tokens: int,
    stride: int,
    k_column: int,
    heads: int,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """T: blocks of 1, 2, 4, … rows on its diagonal are inverted two by two."""
    head = tl.program_id(1)
    row = tl.arange(0, CHUNK)
    token = tl.program_id(0) * CHUNK + row
    inside = token < tokens
    _, _, gamma, _ = _decays(g, starts, token, inside, heads, head, CHUNK)
    k = _unit(mixed, token, inside, stride, k_column + head // GROUP * KEY_DIM, 1.0, KEY_DIM, KEYS)
    b = tl.load(beta + token * heads + head, mask=inside, other=0.0).to(tl.float32)
    lower = b[:, None] * gamma * _product(k, tl.trans(k), PRECISION)
    i, j = row[:, None], row[None, :]
    t = tl.where(i == j, 1.0, 0.0) - tl.where((i == j + 1) & (i % 2 == 1), lower, 0.0)
    for level in range(1, LEVELS):
        size = 1 << level
        below = (i // (2 * size) == j // (2 * size)) & (i % (2 * size) >= size) & (j % (2 * size) < size)
        part = _product(t, tl.where(below, lower, 0.0), PRECISION)
        t -= _product(part, t, PRECISION)
    number = tl.cast(tl.program_id(0) * heads + head, tl.int64)
    tl.store(inverse + number * CHUNK * CHUNK + i * CHUNK + j, t)


@jit
def states(
    mixed: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    boundaries: tl.tensor,
    inverse: tl.tensor,
    state: tl.tensor,
    delta: tl.tensor,
    stride: int,
    k_column: int,
    v_column: int,
    heads: int,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """S and D of one document's chunks."""
    start = tl.load(boundaries + tl.program_id(0))
    end = tl.load(boundaries + tl.program_id(0) + 1)
    head = tl.program_id(1)
    each = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    s = tl.zeros((KEYS, BLOCK), tl.float32)
    past = tl.where(start < end, (end + CHUNK - 1) // CHUNK, start // CHUNK)
    for n in range(start // CHUNK, past):
        token = n * CHUNK + tl.arange(0, CHUNK)
        mine = (token >= start) & (token < end)
        gates = tl.load(g + token * heads + head, mask=mine, other=0.0).to(tl.float32)
        total, whole = tl.cumsum(gates, axis=0), tl.sum(gates, axis=0)
        b = tl.load(beta + token * heads + head, mask=mine, other=0.0).to(tl.float32)
        k = _unit(mixed, token, mine, stride, k_column + head // GROUP * KEY_DIM, 1.0, KEY_DIM, KEYS)
        v = _tile(mixed, token, mine, stride, v_column + head * DIM, each, DIM)
        number = n * heads + head
        if start <= n * CHUNK:
            place, inside = _state(state, number, each, KEY_DIM, DIM, KEYS)
            tl.store(place, s, mask=inside)
        known = _product(k, s, PRECISION)
        values = b[:, None] * (v - tl.exp(total)[:, None] * known)
        d = _product(_square(inverse, number, CHUNK), values, PRECISION)
        tl.store(_rows(delta, number, each, CHUNK, DIM), d, mask=mine[:, None] & (each < DIM)[None, :])
        onward = k * tl.exp(whole - total)[:, None]
        s = tl.exp(whole) * s + _product(tl.trans(onward), d, PRECISION)


@jit_one_for_all("tokens")
def outputs(
    mixed: tl.tensor,
    g: tl.tensor,
    starts: tl.tensor,
    state: tl.tensor,
    delta: tl.tensor,
    o: tl.tensor,
    tokens: int,
    stride: int,
    k_column: int,
    heads: int,
    length: float,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """o = q' S + P D."""
    head = tl.program_id(1)
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = token < tokens
    each = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    _, e, gamma, _ = _decays(g, starts, token, inside, heads, head, CHUNK)
    q = _unit(mixed, token, inside, stride, head // GROUP * KEY_DIM, length, KEY_DIM, KEYS)
    k = _unit(mixed, token, inside, stride, k_column + head // GROUP * KEY_DIM, 1.0, KEY_DIM, KEYS)
    number = tl.program_id(0) * heads + head
    seen = inside[:, None] & (each < DIM)[None, :]
    place, known = _state(state, number, each, KEY_DIM, DIM, KEYS)
    s = tl.load(place, mask=known, other=0.0)
    d = tl.load(_rows(delta, number, each, CHUNK, DIM), mask=seen, other=0.0)
    p = gamma * _product(q, tl.trans(k), PRECISION)
    result = e[:, None] * _product(q, s, PRECISION)
    result = _added(p, d, result, PRECISION)
    out = o + (token.to(tl.int64) * (heads * DIM) + head * DIM)[:, None] + each[None, :]
    tl.store(out, result, mask=seen)


@jit_one_for_all("tokens")
def through(
    do: tl.tensor,
    mixed: tl.tensor,
    g: tl.tensor,
    starts: tl.tensor,
    result: tl.tensor,
    tokens: int,
    stride: int,
    k_column: int,
    heads: int,
    length: float,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The gradient of D by way of o: Pᵀ do."""
    head = tl.program_id(1)
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = token < tokens
    each = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    _, _, gamma, _ = _decays(g, starts, token, inside, heads, head, CHUNK)
    q = _unit(mixed, token, inside, stride, head // GROUP * KEY_DIM, length, KEY_DIM, KEYS)
    k = _unit(mixed, token, inside, stride, k_column + head // GROUP * KEY_DIM, 1.0, KEY_DIM, KEYS)
    p = gamma * _product(q, tl.trans(k), PRECISION)
    back = _product(tl.trans(p), _tile(do, token, inside, heads * DIM, head * DIM, each, DIM), PRECISION)
    place = _rows(result, tl.program_id(0) * heads + head, each, CHUNK, DIM)
    tl.store(place, back, mask=inside[:, None] & (each < DIM)[None, :])


@jit_one_for_all("tokens")
def states_back(
    do: tl.tensor,
    mixed: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    boundaries: tl.tensor,
    inverse: tl.tensor,
    dvalues: tl.tensor,
    dlast: tl.tensor,
    tokens: int,
    stride: int,
    k_column: int,
    heads: int,
    length: float,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Of one document's chunks: the gradients of the states that they end with, and of beta v, over Pᵀ do."""
    start = tl.load(boundaries + tl.program_id(0))
    end = tl.load(boundaries + tl.program_id(0) + 1)
    head = tl.program_id(1)
    each = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    ds = tl.zeros((KEYS, BLOCK), tl.float32)
    first = start // CHUNK
    count = tl.where(start < end, (end + CHUNK - 1) // CHUNK - first, 0)
    for step in range(count):
        n = first + count - 1 - step
        token = n * CHUNK + tl.arange(0, CHUNK)
        mine = (token >= start) & (token < end)
        seen = mine[:, None] & (each < DIM)[None, :]
        gates = tl.load(g + token * heads + head, mask=mine, other=0.0).to(tl.float32)
        total, whole = tl.cumsum(gates, axis=0), tl.sum(gates, axis=0)
        b = tl.load(beta + token * heads + head, mask=mine, other=0.0).to(tl.float32)
        q = _unit(mixed, token, mine, stride, head // GROUP * KEY_DIM, length, KEY_DIM, KEYS)
        k = _unit(mixed, token, mine, stride, k_column + head // GROUP * KEY_DIM, 1.0, KEY_DIM, KEYS)
        number = n * heads + head
        if end >= tl.minimum((n + 1) * CHUNK, tokens):
            place, inside = _state(dlast, number, each, KEY_DIM, DIM, KEYS)
            tl.store(place, ds, mask=inside)
        rows = _rows(dvalues, number, each, CHUNK, DIM)
        dd = tl.load(rows, mask=seen, other=0.0)
        dd += tl.exp(whole - total)[:, None] * _product(k, ds, PRECISION)
        dd = tl.where(mine[:, None], dd, 0.0)
        x = _product(tl.trans(_square(inverse, number, CHUNK)), dd, PRECISION)
        tl.store(rows, x, mask=seen)
        e = tl.exp(total)
        from_o = _tile(do, token, mine, heads * DIM, head * DIM, each, DIM)
        ds = tl.exp(whole) * ds + _product(tl.trans(q * e[:, None]), from_o, PRECISION)
        ds -= _product(tl.trans(k * (e * b)[:, None]), tl.where(mine[:, None], x, 0.0), PRECISION)


@jit_one_for_all("tokens")
def gradients(
    do: tl.tensor,
    mixed: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    starts: tl.tensor,
    state: tl.tensor,
    delta: tl.tensor,
    dvalues: tl.tensor,
    dlast: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dmixed: tl.tensor,
    dg: tl.tensor,
    dbeta: tl.tensor,
    tokens: int,
    stride: int,
    k_column: int,
    v_column: int,
    d_stride: int,
    heads: int,
    length: float,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A chunk's dv, dg and dbeta, and its share of the gradients of q and k as they are with their lengths."""
    head = tl.program_id(1)
    row = tl.arange(0, CHUNK)
    token = tl.program_id(0) * CHUNK + row
    inside = token < tokens
    number = tl.program_id(0) * heads + head
    total, e, gamma, first = _decays(g, starts, token, inside, heads, head, CHUNK)
    b = tl.load(beta + token * heads + head, mask=inside, other=0.0).to(tl.float32)
    dp = tl.zeros((CHUNK, CHUNK), tl.float32)
    da = tl.zeros((CHUNK, CHUNK), tl.float32)
    dqueries = tl.zeros((CHUNK, KEYS), tl.float32)
    dkeys = tl.zeros((CHUNK, KEYS), tl.float32)
    donward = tl.zeros((CHUNK, KEYS), tl.float32)
    db = tl.zeros((CHUNK,), tl.float32)
    both = tl.zeros((KEYS,), tl.float32)
    for begin in range(0, DIM, BLOCK):
        each = begin + tl.arange(0, BLOCK)
        seen = inside[:, None] & (each < DIM)[None, :]
        place, known = _state(state, number, each, KEY_DIM, DIM, KEYS)
        s = tl.load(place, mask=known, other=0.0)
        place, known = _state(dlast, number, each, KEY_DIM, DIM, KEYS)
        ds = tl.load(place, mask=known, other=0.0)
        d = tl.load(_rows(delta, number, each, CHUNK, DIM), mask=seen, other=0.0)
        x = tl.load(_rows(dvalues, number, each, CHUNK, DIM), mask=seen, other=0.0)
        from_o = _tile(do, token, inside, heads * DIM, head * DIM, each, DIM)
        v = _tile(mixed, token, inside, stride, v_column + head * DIM, each, DIM)
        dp = _added(from_o, tl.trans(d), dp, PRECISION)
        da = _added(x, tl.trans(d), da, PRECISION)
        dqueries = _added(from_o, tl.trans(s), dqueries, PRECISION)
        dkeys = _added(x, tl.trans(s), dkeys, PRECISION)
        donward = _added(d, tl.trans(ds), donward, PRECISION)
        db += tl.sum(x * v, axis=1)
        both += tl.sum(s * ds, axis=1)
        out = dmixed + (token.to(tl.int64) * d_stride + v_column + head * DIM)[:, None] + each[None, :]
        tl.store(out, b[:, None] * x, mask=seen)
    q = _unit(mixed, token, inside, stride, head // GROUP * KEY_DIM, length, KEY_DIM, KEYS)
    k = _unit(mixed, token, inside, stride, k_column + head // GROUP * KEY_DIM, 1.0, KEY_DIM, KEYS)
    strict = tl.where(row[:, None] > row[None, :], gamma, 0.0)
    lower = -da * strict * _product(k, tl.trans(k), PRECISION)
    decays = gamma * _product(q, tl.trans(k), PRECISION) * dp + b[:, None] * lower
    to_last = _to_last(total, first, inside, CHUNK)
    of_keys = -e * tl.sum(dkeys * k, axis=1)
    left = to_last * tl.sum(donward * k, axis=1)
    dtotal = tl.sum(decays, axis=1) - tl.sum(decays, axis=0) - left + e * tl.sum(dqueries * q, axis=1) + b * of_keys
    dtotal += tl.where(row == CHUNK - 1, tl.sum(left, axis=0) + e * tl.sum(both, axis=0), 0.0)
    # Of a token's g: what all tokens of its document from it on got.
    from_later = tl.sum(tl.where(_together(first, CHUNK), dtotal[:, None], 0.0), axis=0)
    tl.store(dg + token * heads + head, from_later, mask=inside)
    tl.store(dbeta + token * heads + head, db + tl.sum(lower, axis=1) + of_keys, mask=inside)
    key = tl.arange(0, KEYS)
    out = (token.to(tl.int64) * (heads * KEY_DIM) + head * KEY_DIM)[:, None] + key[None, :]
    seen = inside[:, None] & (key < KEY_DIM)[None, :]
    by_p = gamma * dp
    result = _added(by_p, k, e[:, None] * dqueries, PRECISION)
    tl.store(dq + out, result, mask=seen)
    of_products = -b[:, None] * strict * da
    result = to_last[:, None] * donward - (e * b)[:, None] * dkeys
    result = _added(tl.trans(by_p), q, result, PRECISION)
    result = _added(of_products + tl.trans(of_products), k, result, PRECISION)
    tl.store(dk + out, result, mask=seen)


@jit_one_for_all("tokens")
def lengths_back(
    d: tl.tensor,
    mixed: tl.tensor,
    dmixed: tl.tensor,
    tokens: int,
    stride: int,
    d_stride: int,
    column: int,
    heads: int,
    length: float,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The gradient of all q or all k as they come, summed over the value heads that share them."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, key = token < tokens, tl.arange(0, KEYS)
    seen = inside[:, None] & (key < KEY_DIM)[None, :]
    head = tl.program_id(1)
    total = tl.zeros((BLOCK, KEYS), tl.float32)
    for other in tl.static_range(GROUP):
        place = (token.to(tl.int64) * (heads * KEY_DIM) + (head * GROUP + other) * KEY_DIM)[:, None] + key[None, :]
        total += tl.load(d + place, mask=seen, other=0.0)
    x = _tile(mixed, token, inside, stride, column + head * KEY_DIM, key, KEY_DIM)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) + 1e-6)
    unit = x * scale[:, None]
    result = (total - unit * tl.sum(total * unit, axis=1)[:, None]) * (length * scale)[:, None]
    out = dmixed + (token.to(tl.int64) * d_stride + column + head * KEY_DIM)[:, None] + key[None, :]
    tl.store(out, result, mask=seen)
