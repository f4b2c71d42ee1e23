"""``--gpus``: how many processes, and what they are called with."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import click
import pytest

from slimtune.cli import gpus as cli_gpus
from slimtune.config import Config
from slimtune.errors import StopRequested, UserError
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


def test_what_ranks_cant_share_is_said_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cards_here", list)
    monkeypatch.setattr(cli_gpus, "launch", lambda *_: 0)
    uneven = Config.make(gradient_accumulation=2)
    with pytest.raises(UserError, match="2 can't be shared evenly by 3 ranks"):
        cli_gpus.spread("3", Place(), uneven)
    with pytest.raises(click.exceptions.Exit):
        cli_gpus.spread("3", Place(), Config.make())


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the launcher sets in its own process is taken back."""
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    disabled = logging.root.manager.disable
    yield
    logging.disable(disabled)


@pytest.mark.usefixtures("launching")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_there_are_ranks_is_said(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.launcher import api

    before, handled = signal.getsignal(number), []

    def begin(config: api.LaunchConfig, *_: str) -> None:
        handled.extend(config.signals_to_handle.split(","))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(api, "elastic_launch", begin)
    with pytest.raises(StopRequested, match=f"stopped by {number.name}"):
        launch.launch(2, ["train"])
    assert signal.getsignal(number) is before
    assert number.name in handled, "from then on torch passes it on to the ranks"


@pytest.mark.usefixtures("launching")
@pytest.mark.parametrize(
    ("codes", "code"), [({0: -6, 1: 2}, 2), ({0: 2, 1: -6}, 2), ({0: -9, 1: 75}, 75), ({0: -9}, 75)]
)
def test_a_process_that_aborts_while_it_ends_hides_no_other_ones_code(
    codes: dict[int, int], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher import api

    failures = {rank: ProcessFailure(rank, 100 + rank, ended, "") for rank, ended in codes.items()}

    def end(*_: str) -> None:
        raise ChildFailedError("slimtune", failures)

    monkeypatch.setattr(api, "elastic_launch", lambda *_: end)
    assert launch.launch(2, ["train"]) == code
