"""A mixture of experts in plain torch: the specification, the tests' oracle and the CPU path.

As in :mod:`slimtune.engine.kernels.reference`, whose rules hold here too, with T tokens of k experts each: R = T x k
rows sorted by expert, E experts. A row is a pair (token, slot); pair t x k + s is the token t's slot s.

What the host may not know is how many rows an expert has. So shapes are fixed, offsets lie on the device, and only
this CPU path looks at them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimtune.engine.kernels.reference import _store as store
from slimtune.engine.kernels.reference import _wide as wide

__all__ = ["Routes", "combine", "gather_rows", "row_dot", "sort_by_expert"]


@dataclass(frozen=True)
class Routes:
    """Where the pairs (token, slot) lie once they are sorted by expert.

    Attributes:
        order: int32 [R], a row's pair.
        place: int32 [T, k], a pair's row.
        ends: int32 [E], the row after each expert's last: what ``torch.nn.functional.grouped_mm`` takes as ``offs``.
    """

    order: Tensor
    place: Tensor
    ends: Tensor


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
    return Routes(order.int(), place.view(experts.shape), ends.int())


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
        out: float32 [T, k] that takes the products (float64 for float64).
    """
    products = (wide(a) * wide(b)).sum(-1)[routes.place]
    return products if out is None else out.copy_(products)
