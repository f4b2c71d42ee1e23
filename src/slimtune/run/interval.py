"""A measured number with the interval that says how much the rows decide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "bootstrap"]

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def exp(self) -> Interval:
        """Of the exponential: from a loss in nats to a perplexity."""
        return Interval(math.exp(self.value), math.exp(self.low), math.exp(self.high))


def bootstrap(sums: npt.NDArray[Any], counts: npt.NDArray[Any] | None = None, seed: int = 0) -> Interval:
    """Sum over count, with the percentile interval over resampled rows (Efron 1979); the same rows, the same interval.

    Args:
        sums: [rows].
        counts: [rows]; ones unless given, so that it is the mean.
        seed: Of the resampling.
    """
    counts = np.ones(len(sums)) if counts is None else counts
    draw = np.random.default_rng(seed)
    means = np.empty(_RESAMPLES)
    for at in range(_RESAMPLES):
        rows = draw.integers(len(sums), size=len(sums))
        means[at] = sums[rows].sum() / max(1, counts[rows].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(sums.sum() / max(1, counts.sum())), float(low), float(high))
