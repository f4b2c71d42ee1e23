"""Attention over lengths that change at every call, as in generation and scoring."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["any_length"]


def any_length() -> AbstractContextManager[None]:
    """Without cuDNN's attention, which torch prefers on Hopper: it builds a plan for each new length.

    A plan takes some 50 ms, and each token of a reply makes a new length.
    """
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    made: AbstractContextManager[None] = sdpa_kernel(backends)
    return made
