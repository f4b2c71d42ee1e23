"""Which micro-batches of a step are whose."""

from __future__ import annotations

import pytest

from slimtune.errors import UserError
from slimtune.ranks.share import Share, accumulation_for, check_even


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_step_takes_the_same_positions_whatever_the_number_of_ranks(count: int) -> None:
    step, total = 6, 16
    shares = [Share(rank, count, step, total) for rank in range(count)]
    mine = [share.positions().tolist() for share in shares]
    for begins in range(0, total, step):
        at = begins // count
        taken = [
            (position, share.position(begins, place))
            for share, positions in zip(shares, mine, strict=True)
            for place, position in enumerate(positions[at : at + share.own])
        ]
        assert [position for _, position in taken if position is not None] == list(range(begins, min(begins + 6, 16)))
        assert all(position in (None, listed) for listed, position in taken)


def test_held_out_units_are_each_one_ranks() -> None:
    assert [Share(rank, 3, 3, 9).of(7).tolist() for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [Share(rank, 3, 3, 9).of(2).tolist() for rank in range(3)] == [[0], [1], [0]]


def test_what_cant_be_shared_evenly_is_refused_with_the_nearest() -> None:
    assert [accumulation_for(2, count) for count in (1, 2, 3, 8)] == [2, 2, 3, 8]
    check_even(6, 3)
    with pytest.raises(UserError, match="Give --gradient-accumulation 3 or 6, or take fewer ranks: 2"):
        check_even(4, 3)
    with pytest.raises(UserError, match="Give --gradient-accumulation 4, or take fewer ranks: 1"):
        check_even(1, 4)
