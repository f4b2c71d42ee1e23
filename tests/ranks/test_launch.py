"""``--gpus``: how many processes, and what they are called with."""

from __future__ import annotations

import pytest

from slimtune.errors import UserError
from slimtune.ranks import launch
from slimtune.ranks.launch import count_of, without_gpus
from slimtune.ranks.place import Place


def test_a_number_of_gpus_is_so_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cards_here", lambda: ["0", "1", "2"])
    assert [count_of(gpus, Place()) for gpus in (None, "1", "2", "all")] == [1, 1, 2, 3]
    assert count_of("2", Place(1, 2, 1, 2)) == 1, "one of them starts no others"
    for gpus, what in (("4", "this host has 3"), ("0", "a number, or all"), ("two", "a number, or all")):
        with pytest.raises(UserError, match=what):
            count_of(gpus, Place())


def test_the_ranks_are_called_without_it() -> None:
    words = ["train", "m", "--gpus", "2", "d", "--gpus=all", "-o", "r"]
    assert without_gpus(words) == ["train", "m", "d", "-o", "r"]
