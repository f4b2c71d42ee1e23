"""A mixture of experts in plain torch: the specification, the tests' oracle and the CPU path.

As in :mod:`slimtune.engine.kernels.reference`, whose rules hold here too, with T tokens of k experts each: R = T x k
rows sorted by expert, E experts. A row is a pair (token, slot); pair t x k + s is the token t's slot s.

What the host may not know is how many rows an expert has. So shapes are fixed, offsets lie on the device, and only
this CPU path looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slimtune.engine.kernels.reference import _store as store
from slimtune.engine.kernels.reference import _wide as wide

__all__ = [
    "Routes",
    "combine",
    "expert_down",
    "expert_down_backward_",
    "expert_up_backward_",
    "experts_of",
    "gather_rows",
    "grouped_backward",
    "grouped_forward",
    "row_dot",
    "sort_by_expert",
]


@dataclass(frozen=True)
class Routes:
    """Where the pairs (token, slot) lie once they are sorted by expert.

    Attributes:
        order: int32 [R], a row's pair.
        place: int32 [T, k], a pair's row.
        ends: int32 [E], the row after each expert's last: what ``torch.nn.functional.grouped_mm`` takes as ``offs``.
        experts: int32 or int64 [T, k], a pair's expert.
    """

    order: Tensor
    place: Tensor
    ends: Tensor
    experts: Tensor


# -- routing -----------------------------------------------------------------------------------------------------------


def sort_by_expert(experts: Tensor, count: int) -> Routes:
    """Sort the pairs by expert; pairs of one expert keep their order.

    Args:
        experts: int32 or int64 [T, k], from 0 to count - 1.
        count: E.
    """
    chosen = experts.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    place = torch.empty_like(order, dtype=torch.int32)
    place[order] = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    ends = torch.bincount(chosen, minlength=count).cumsum(0)
    return Routes(order.int(), place.view(experts.shape), ends.int(), experts)


def gather_rows(x: Tensor, routes: Routes, *, weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Each row's token, [R, H]: row r of the pair (t, s) is x[t], times weights[t, s] if there are any.

    Args:
        x: [T, H].
        routes: As :func:`sort_by_expert` gave it.
        weights: [T, k], any float dtype.
        out: [R, H] that takes the rows.
    """
    tokens = routes.order // routes.place.shape[1]
    rows = wide(x)[tokens]
    if weights is not None:
        rows = rows * wide(weights).reshape(-1)[routes.order, None]
    return store(rows, x, out)


def combine(
    rows: Tensor,
    routes: Routes,
    *,
    weights: Tensor | None = None,
    addend: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Each token's sum over its slots, [T, H]: y[t] = sum of weights[t, s] x rows[place[t, s]], plus addend[t].

    It is the transpose of :func:`gather_rows` with the same weights, so each is the other's backward.

    Args:
        rows: [R, H].
        routes: As :func:`sort_by_expert` gave it.
        weights: [T, k], any float dtype; None: ones.
        addend: [T, H].
        out: [T, H] that takes y; may be ``addend``.
    """
    parts = wide(rows)[routes.place]
    if weights is not None:
        parts = parts * wide(weights)[..., None]
    total = parts.sum(1)
    if addend is not None:
        total = total + wide(addend)
    return store(total, rows, out)


def row_dot(a: Tensor, b: Tensor, routes: Routes, *, out: Tensor | None = None) -> Tensor:
    """Each pair's product of its rows, [T, k]: at (t, s) the sum over F of a[r] x b[r] with r = place[t, s].

    With a an expert's output and b the gradient of :func:`combine`'s result it is the gradient of the weights.

    Args:
        a: [R, F].
        b: [R, F].
        routes: As :func:`sort_by_expert` gave it.
        out: float32 [T, k], contiguous, that takes the products (float64 for float64).
    """
    products = (wide(a) * wide(b)).sum(-1)[routes.place]
    return products if out is None else out.copy_(products)


def experts_of(routes: Routes) -> Tensor:
    """[R], the expert of each row."""
    return routes.experts.reshape(-1)[routes.order]


# -- products ----------------------------------------------------------------------------------------------------------


def _slices(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def grouped_forward(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """y [R, N]: each row times its expert's matrix, W[e] x[r].

    Args:
        rows: [R, K], sorted by expert.
        weights: [E, N, K] with any row and matrix stride, in the rows' dtype.
        ends: int32 [E], the row after each expert's last; the last of them is R.
    """
    y = rows.new_empty(rows.shape[0], weights.shape[1])
    for expert, own in _slices(ends):
        torch.mm(rows[own], weights[expert].t(), out=y[own])
    return y


def grouped_backward(dy: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """dx [R, K] of :func:`grouped_forward`, W[e] transposed times dy[r]; the matrices are frozen.

    Args:
        dy: [R, N].
        weights: [E, N, K], the forward's.
        ends: int32 [E], the forward's.
    """
    dx = dy.new_empty(dy.shape[0], weights.shape[2])
    for expert, own in _slices(ends):
        torch.mm(dy[own], weights[expert], out=dx[own])
    return dx


def expert_down(x: Tensor, a: Tensor, routes: Routes, *, out: Tensor | None = None, ones: bool = False) -> Tensor:
    """u[r] = A[e] x[r], for experts with adapters of their own.

    Args:
        x: [R, K], sorted by expert.
        a: [E, r, K]; any float dtype, rounded to x's before the product.
        routes: As :func:`sort_by_expert` gave it.
        out: [R, r] that takes u, or wider: the columns after u become zero.
        ones: The column after u becomes one instead (it multiplies a bias).

    Returns:
        u [R, r] in x's dtype, or ``out``.
    """
    rank = a.shape[1]
    u = x.new_empty(x.shape[0], rank) if out is None else out
    u[:, rank:] = 0.0
    if ones:
        u[:, rank] = 1.0
    for expert, own in _slices(routes.ends):
        u[own, :rank] = (wide(x[own]) @ wide(a[expert].to(x.dtype)).T).to(u.dtype)
    return u


def _weighted(d: Tensor, routes: Routes, weights: Tensor | None) -> Tensor:
    """The rows of d times their pairs' weights, rounded as a kernel's operand is; wide."""
    if weights is not None:
        d = (wide(d) * wide(weights).reshape(-1)[routes.order, None]).to(d.dtype)
    return wide(d)


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
    """Backward of :func:`expert_down` with the same arguments: adds to da and to dx.

    Args:
        du: [R, r].
        x: [R, K], as the forward took it.
        a: [E, r, K], as the forward took it.
        routes: As the forward took it.
        da: float32 [E, r, K]; the sum of w[r] du[r] x[r] over an expert's rows is added to it.
        dx: [R, K] in x's dtype; A[e] transposed times du[r] is added to it, without w.
        weights: [T, k], the router's: w. Where a layer's gradient goes back without them (see
            :func:`slimtune.engine.kernels.reference_mlp.gated_backward_`), the adapters' still has them. None: ones.
    """
    weighted, d = _weighted(du, routes, weights), wide(du)
    for expert, own in _slices(routes.ends):
        if da is not None:
            da[expert].add_(weighted[own].T @ wide(x[own]))
        if dx is not None:
            dx[own] = (wide(dx[own]) + d[own] @ wide(a[expert].to(x.dtype))).to(dx.dtype)


def expert_up_backward_(
    dy: Tensor, u: Tensor, routes: Routes, scaling: float, *, db: Tensor, weights: Tensor | None = None
) -> None:
    """Add scaling x the sum of w[r] dy[r] u[r] over each expert's rows to db.

    Args:
        dy: [R, N], the gradient of the experts' output.
        u: [R, r], as :func:`expert_down` gave it.
        routes: As the forward took it.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        db: float32 [E, N, r].
        weights: [T, k], the router's: w, where dy is without them. None: ones.
    """
    weighted = _weighted(u, routes, weights)
    for expert, own in _slices(routes.ends):
        db[expert].add_(wide(dy[own]).T @ weighted[own], alpha=scaling)
