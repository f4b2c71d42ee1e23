"""The gated MLP's elementwise part in plain torch, by the rules of :mod:`slimtune.engine.kernels.reference`."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slimtune.engine.kernels.reference import _store as store
from slimtune.engine.kernels.reference import _wide as wide
from slimtune.engine.kernels.reference_experts import Routes

__all__ = ["Activation", "Clamped", "gated_backward_", "gated_forward"]


class Clamped(NamedTuple):
    """gpt-oss's: h = g sigma(alpha g) x (u + 1), g being min(gate, limit) and u up between -limit and limit."""

    alpha: float
    limit: float


Activation = Literal["silu", "gelu_tanh", "sigmoid"] | Clamped
"""g x sigma(v(g)): silu with v = g, the tanh form of GELU with v = sqrt(8 / pi) (g + 0.044715 g^3). Or
sigma(g), or clamped."""


def _activate(g: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The activation of g and its slope: with s = sigma(v), a = g s and a' = s + a (1 - s) v'."""
    if isinstance(activation, Clamped):
        inside = g < activation.limit
        g = g.clamp(max=activation.limit)
        sigma = torch.sigmoid(activation.alpha * g)
        return g * sigma, (sigma + activation.alpha * g * sigma * (1 - sigma)) * inside
    if activation == "sigmoid":
        sigma = torch.sigmoid(g)
        return sigma, sigma * (1 - sigma)
    if activation == "silu":
        v, slope = g, torch.ones_like(g)
    else:
        factor = math.sqrt(8 / math.pi)
        v, slope = factor * (g + 0.044715 * g**3), factor * (1 + 3 * 0.044715 * g**2)
    sigma = torch.sigmoid(v)
    return g * sigma, sigma + g * sigma * (1 - sigma) * slope


def _factor(u: Tensor, activation: Activation) -> tuple[Tensor, Tensor | float]:
    """What of up multiplies the activation, and its slope."""
    if isinstance(activation, Clamped):
        return u.clamp(-activation.limit, activation.limit) + 1, (u.abs() < activation.limit).to(u.dtype)
    return u, 1.0


def gated_forward(gate: Tensor, up: Tensor, *, activation: Activation = "silu", out: Tensor | None = None) -> Tensor:
    """h = act(gate) x up, all [T, F] (Shazeer 2020, arXiv:2002.05202); clamped: act(gate) x (up + 1)."""
    return store(_activate(wide(gate), activation)[0] * _factor(wide(up), activation)[0], gate, out)


def gated_backward_(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    activation: Activation = "silu",
    h: Tensor | None = None,
    routes: Routes | None = None,
    weights: Tensor | None = None,
    dw: Tensor | None = None,
) -> None:
    """Overwrite gate with dgate and up with dup; give h back as well if there is a place for it.

    In a mixture of experts the rows are pairs of a token and a slot, and the router's weight of a pair multiplies what
    its row becomes. ``dh`` is then the gradient without that weight, which is folded in here.

    Args:
        dh: [T, F].
        gate: [T, F]; becomes dgate = w x dh x up x act'(gate), w being 1 without weights.
        up: [T, F]; becomes dup = w x dh x act(gate).
        activation: The forward's.
        h: [T, F] that takes act(gate) x up; may be ``dh``.
        routes: Which pair a row is; needed for weights and dw.
        weights: [tokens, k], the router's.
        dw: float32 [tokens, k] (float64 for float64), contiguous; takes the weights' gradient, dh x h summed over F.

    Raises:
        ValueError: Weights or dw without routes.
    """
    d, (u, u_slope) = wide(dh), _factor(wide(up), activation)
    act, slope = _activate(wide(gate), activation)
    value = act * u
    if routes is not None:
        if dw is not None:
            dw.copy_((d * value).sum(-1)[routes.place])
        if weights is not None:
            d = d * wide(weights).reshape(-1)[routes.order, None]
    elif weights is not None or dw is not None:
        raise ValueError("a row's weight needs the routes")
    if h is not None:
        h.copy_(value)
    gate.copy_(d * u * slope)
    up.copy_(d * act * u_slope)
