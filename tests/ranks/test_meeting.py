"""Ranks that meet, and those that don't come and say why. Each is a thread with a store's connection of its own."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from slimtune.errors import GuardStop, SlimtuneError, UserError
from slimtune.ranks import meeting as module
from slimtune.ranks.meeting import as_told, excused, meeting, word_of
from slimtune.ranks.place import Place

NO_GPU = UserError("rank 2 has no GPU", rule="One process takes one GPU.", way_out="Start fewer.")


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(module, "_MEETINGS", itertools.repeat(0))
    monkeypatch.setattr(module, "JOIN_SECONDS", 20.0)
    monkeypatch.setattr(module.atexit, "register", lambda do: None)  # this process goes on


def come(place: Place) -> SlimtuneError | None:
    try:
        with meeting(place) as store:
            store.add("leaving", 1)
            while place.rank == 0 and store.add("leaving", 0) < place.count:
                pass
    except SlimtuneError as error:
        if error.last is not None:
            error.last()
        return error
    return None


def stay_away(place: Place) -> None:
    with pytest.raises(UserError) as ended, excused(place):
        raise NO_GPU
    assert ended.value.last is not None
    ended.value.last()


def each(*what: tuple[Callable[[Place], SlimtuneError | None], Place]) -> list[SlimtuneError | None]:
    with ThreadPoolExecutor(len(what)) as pool:
        futures: list[Future[SlimtuneError | None]] = [pool.submit(do, place) for do, place in what]
    return [future.result() for future in futures]


def test_all_wait_for_all() -> None:
    assert each(*((come, Place(rank, 3)) for rank in range(3))) == [None] * 3


@pytest.mark.parametrize("away", [0, 2])
def test_nobody_waits_for_a_rank_that_ends_before_it_comes(away: int) -> None:
    """Rank 0, who keeps the store, stays until the others have heard it."""
    for rank, heard in enumerate(each(*((stay_away if rank == away else come, Place(rank, 3)) for rank in range(3)))):
        if rank != away:
            assert isinstance(heard, UserError)
            assert (heard.what, heard.way_out) == (
                f"{'' if away == 2 else 'rank 0: '}rank 2 has no GPU",
                "Start fewer.",
            )
            assert heard.told == (rank > 0), "rank 0 says it"


def test_ranks_that_all_end_for_one_reason_wait_for_nobody() -> None:
    each(*((stay_away, Place(rank, 3)) for rank in range(3)))
    assert NO_GPU.last is not None
    NO_GPU.last = None
    with pytest.raises(UserError), excused(Place()):
        raise NO_GPU
    assert NO_GPU.last is None, "who is alone is waited for by nobody"


SCRIPT = """
import torch.distributed, itertools
from slimtune.errors import UserError
from slimtune.ranks import meeting
from slimtune.ranks.place import Place
meeting._MEETINGS = itertools.repeat(0)
with meeting.excused(Place(1, 2)):
    raise UserError("rank 1 has no GPU")
"""


def test_nobody_waits_for_a_program_of_ones_own_that_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=subprocess.PIPE, text=True) as process:
        (heard,) = each((come, Place(0, 2)))
        said = process.communicate(timeout=30)[1]
    assert isinstance(heard, UserError)
    assert heard.what == "rank 1 has no GPU"
    assert said.endswith("UserError: rank 1 has no GPU\n"), said


@pytest.mark.parametrize(
    ("other", "what"),
    [(Place(0, 2), "two processes were told that they are rank 0"), (Place(1, 3), "ranks, and another of")],
)
def test_ranks_that_were_told_wrong_are_refused(other: Place, what: str) -> None:
    found = each((come, Place(0, 2)), (come, other))
    assert all(isinstance(error, UserError) and what in error.what for error in found), found


def test_a_word_becomes_an_error_of_its_kind() -> None:
    told = as_told(word_of(3, GuardStop("loss is nan", rule="Nothing was applied.")), "Go on: slimtune resume RUN")
    assert isinstance(told, GuardStop)
    assert (told.what, told.way_out) == ("rank 3: loss is nan", "Go on: slimtune resume RUN")
    assert as_told(word_of(1, ValueError("what\nelse"))).what == "rank 1: ValueError: what"
