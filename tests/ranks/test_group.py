"""Ranks that find each other, or don't."""

from __future__ import annotations

import os
import queue
import socket
import threading

import pytest
import torch

from slimtune.errors import GuardStop, StopRequested, UserError
from slimtune.hardware import detect
from slimtune.language import spoken
from slimtune.ranks import meeting, presence
from slimtune.ranks.group import ALONE, Ranks, together
from slimtune.ranks.place import Place
from slimtune.ranks.presence import Presence


def test_alone_everything_is_its_own() -> None:
    tensor = torch.arange(3.0)
    ALONE.sum_(tensor)
    assert tensor.tolist() == [0.0, 1.0, 2.0]
    assert ALONE.gathered(tensor).tolist() == [[0.0, 1.0, 2.0]]
    assert (ALONE.told("a"), ALONE.from_first(lambda: 7), ALONE.any(True)) == (["a"], 7, True)
    ALONE.check_same({"data": "x"}, "")
    ALONE.leave()


def test_two_ranks_with_one_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(Place(1, 3))
    for told, what in ((["a", "b", "a"], "ranks 0 and 2"), (["a", "b", "b"], "ranks 1 and 2")):
        monkeypatch.setattr(ranks, "told", lambda _, told=told: told)
        with pytest.raises(UserError, match=f"{what} have the same GPU"):
            ranks.check_apart("b")
    for told in (["a", "b", "c"], ["", "", ""]):
        monkeypatch.setattr(ranks, "told", lambda _, told=told: told)
        ranks.check_apart(told[1])


def test_a_rank_that_never_comes_is_named_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "JOIN_SECONDS", 1.0)
    with (
        pytest.raises(UserError, match="rank 0 does not find the others: of 2 these did not come: 1"),
        together(detect, 60.0),
    ):
        pass


def pair() -> tuple[Presence, Presence]:
    """Ranks 0 and 1, in one process."""
    shared: list[object] = []
    ready = threading.Event()

    def at_first(value: object) -> object:
        shared.append(value)
        ready.set()
        return value

    def elsewhere(_: object) -> object:
        ready.wait()
        return shared[0]

    made: list[Presence] = []
    first = threading.Thread(target=lambda: made.append(Presence(0, 2, "127.0.0.1", at_first, 10.0)))
    first.start()
    other = Presence(1, 2, "127.0.0.1", elsewhere, 10.0)
    first.join()
    return made[0], other


def test_a_rank_that_stops_says_why_and_one_that_is_gone_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_GRACE", 3600.0)  # this process is not to end
    first, other = pair()
    other.fail(GuardStop("loss is nan", rule="Nothing was applied.", way_out="Look at the rows."))
    assert first.learn()
    with pytest.raises(GuardStop, match="rank 1: loss is nan"):
        first.check()
    first.leave()

    first, other = pair()
    first.resume = "Go on: slimtune resume RUN"
    (peer,) = other._peers
    with socket.socket(fileno=os.dup(peer.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)  # what the kernel does when a process ends
    assert first.learn()
    assert other.learn()
    with pytest.raises(StopRequested, match="rank 1: its process is gone") as stopped:
        first.check()
    assert stopped.value.way_out == "Go on: slimtune resume RUN"
    with spoken("zh"):
        assert stopped.value.said() == ["进程 1：这个进程已经不在了", "继续：slimtune resume RUN"]
    first.leave()
    other.leave()


def test_the_second_rank_speaks_where_the_first_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_GRACE", 3600.0)
    first, other = pair()
    assert (first.speaks, other.speaks) == (True, False)
    (peer,) = first._peers
    with socket.socket(fileno=os.dup(peer.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)
    assert other.learn()
    assert other.speaks
    first.leave()
    other.leave()


def test_who_waits_for_a_rank_that_is_gone_says_so_and_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(presence, "_GRACE", 0.0)
    monkeypatch.setattr(presence.os, "_exit", ended.put)
    first, other = pair()
    first.resume = "Go on: slimtune resume RUN"
    table = [("", "rank 0", "rank 1"), ("data a.jsonl", "1", "2")]
    with spoken("zh"):
        other.fail(UserError("rank 1 isn't like rank 0", table=table, rule="All ranks are given the same config."))
        assert ended.get(timeout=30) == 2
    lines = ["进程 1 与进程 0 不同", "                进程 0  进程 1", "  数据 a.jsonl  1       2",
             "所有进程得到的配置必须相同。", first.resume.replace("Go on: ", "继续：")]  # fmt: skip
    assert capfd.readouterr().err == "slimtune: " + "\n".join(lines) + "\n"


def test_a_rank_that_is_done_is_not_missed() -> None:
    first, other = pair()
    other.leave()
    assert not first.learn(0.3)
    first.check()
