"""Which of several processes this one is, and the one GPU that it sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtune.errors import UserError
from slimtune.ranks.place import Place, cards_here, take_card, this_place, unheard_of

TOLD = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place()),
        (TOLD, Place(3, 4, 1, 2)),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, Place()),
        ({"LOCAL_RANK": "-1", "WORLD_SIZE": ""}, Place()),
    ],
)
def test_a_place_is_what_the_launcher_says(environment: dict[str, str], place: Place) -> None:
    assert this_place(environment) == place


@pytest.mark.parametrize(
    "environment",
    [
        {"LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {**TOLD, "WORLD_SIZE": "many"},
        {**TOLD, "RANK": "4"},
    ],
)
def test_one_of_several_that_isnt_told_which_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="one of"):
        this_place(environment)


def test_a_process_sees_its_own_card_alone(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).mkdir(parents=True)
    assert cards_here({}, tmp_path) == ["0", "1"]
    assert cards_here({}, tmp_path / "dev") == []
    environment = {"CUDA_VISIBLE_DEVICES": "5, 7"}
    assert take_card(this_place(TOLD), environment) == 0
    assert environment == {"CUDA_VISIBLE_DEVICES": "7"}
    assert take_card(this_place(TOLD), environment) == 0, "what a launcher gave it stays"
    assert environment == {"CUDA_VISIBLE_DEVICES": "7"}
    alone = {"CUDA_VISIBLE_DEVICES": "5,7,8"}
    assert take_card(Place(), alone) == 2
    assert alone == {"CUDA_VISIBLE_DEVICES": "5"}


def test_more_processes_than_cards_are_refused_by_rank() -> None:
    with pytest.raises(UserError, match=r"rank 2 has no GPU: 3 processes .* host with 2"):
        take_card(Place(2, 3, 2, 3), {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_libraries_are_told_of_no_other_rank_for_a_while() -> None:
    environment = {**TOLD, "HOME": "/"}
    with unheard_of(environment):
        assert environment == {"HOME": "/"}
    assert environment == {**TOLD, "HOME": "/"}
