"""Inputs and output buffers of the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor


class Maker:
    """Random inputs, and places for outputs that are poisoned so that what isn't written shows."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.device, dtype or self.dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, float("nan"), device=self.device, dtype=dtype or self.dtype)

    def strided(self, *shape: int, extra: int = 24) -> Tensor:
        """A poisoned [T, N] view of the first N columns of a [T, N + extra] buffer."""
        *rows, columns = shape
        return self.poisoned(*rows, columns + extra)[..., :columns]

    def strided_copy(self, x: Tensor, *, extra: int = 24) -> Tensor:
        """``x`` in the first columns of a wider buffer whose other columns are poison."""
        return self.strided(*x.shape, extra=extra).copy_(x)
