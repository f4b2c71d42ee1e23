"""Draws follow from the seed and the row's number, and from nothing else."""

from __future__ import annotations

import torch

from slimtune.use.sampling import Draws, Sampling


def drawn(seed: int, rows: list[int]) -> list[list[int]]:
    draws = Draws(Sampling(temperature=1.0, seed=seed), rows)
    return torch.stack([draws.choose(torch.zeros(len(rows), 1000)) for _ in range(4)], 1).tolist()


def test_each_seed_and_each_row_has_draws_of_its_own() -> None:
    both = drawn(1, [0, 1])
    assert drawn(1, [1]) == both[1:]
    assert both[0] != both[1]
    assert len({str(drawn(seed, [0])) for seed in range(20)}) == 20
