"""The gated delta rule in chunks of tokens, and the short convolution before it.

What is computed: :mod:`slimtune.engine.kernels.reference_delta`.
"""

from __future__ import annotations

from torch import Tensor

from slimtune.engine.kernels import reference_delta as reference
from slimtune.engine.kernels.reference_delta import DeltaHeads, DeltaSaved

__all__ = [
    "DeltaHeads",
    "DeltaSaved",
    "conv_silu_backward",
    "conv_silu_forward",
    "delta_backward",
    "delta_forward",
]


def conv_silu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_delta.conv_silu_forward`."""
    return reference.conv_silu_forward(x, weight, bias, starts)


def conv_silu_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """See :func:`slimtune.engine.kernels.reference_delta.conv_silu_backward`."""
    return reference.conv_silu_backward(dy, x, weight, bias, starts)


def delta_forward(
    mixed: Tensor, g: Tensor, beta: Tensor, starts: Tensor, boundaries: Tensor, heads: DeltaHeads
) -> tuple[Tensor, DeltaSaved]:
    """See :func:`slimtune.engine.kernels.reference_delta.delta_forward`."""
    return reference.delta_forward(mixed, g, beta, starts, boundaries, heads)


def delta_backward(
    do: Tensor,
    mixed: Tensor,
    g: Tensor,
    beta: Tensor,
    starts: Tensor,
    boundaries: Tensor,
    heads: DeltaHeads,
    saved: DeltaSaved,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`slimtune.engine.kernels.reference_delta.delta_backward`."""
    return reference.delta_backward(do, mixed, g, beta, starts, boundaries, heads, saved)
