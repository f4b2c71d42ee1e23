"""The interval says how much the rows decide."""

from __future__ import annotations

import numpy as np

from slimtune.run.interval import bootstrap


def test_the_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        counts = draw.integers(5, 50, size=120)
        sums = np.array([draw.exponential(2.0, size=count).sum() for count in counts])
        interval = bootstrap(sums, counts, seed=trial)
        assert interval.low <= interval.value <= interval.high
        held += interval.low <= 2.0 <= interval.high
    assert 88 <= held <= 100  # 95 expected; three standard deviations are 6.5
    assert bootstrap(np.ones(10)).low == bootstrap(np.ones(10)).high == 1.0
