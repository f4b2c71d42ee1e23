"""The ranks of one run: what they sum, what they agree on, and how they end.

Transformers, accelerate and TRL aren't told of the other ranks: in each process the Trainer trains as on one card, and
what crosses between processes is what stands here (decision 118).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from slimtune.errors import SlimtuneError, StopRequested, UserError
from slimtune.hardware import Hardware
from slimtune.ranks.host import Host, on_host
from slimtune.ranks.meeting import JOIN_SECONDS, excused, meeting
from slimtune.ranks.place import Place, this_place, unheard_of
from slimtune.ranks.presence import Presence

__all__ = ["ALONE", "Ranks", "together"]

T = TypeVar("T")


class Ranks:
    """This process among the others. Every rank must call the same things in the same order.

    Args:
        place: Which this is.
        presence: Its connections; none if it is alone.
    """

    def __init__(self, place: Place, presence: Presence | None = None) -> None:
        self.rank, self.count, self._presence = place.rank, place.count, presence
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def first(self) -> bool:
        """Whether this rank writes the run's folder."""
        return self.rank == 0

    @property
    def number(self) -> int | None:
        """Which this is; None if there is no other."""
        return None if self.alone else self.rank

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def left(self) -> bool:
        """Whether it has no more to do with the others."""
        return self._presence is None

    @property
    def abandoned(self) -> bool:
        """Whether the launcher that started this process is gone: nobody would end it any more."""
        return self._launcher is not None and os.getppid() != self._launcher

    def sum_(self, tensor: Tensor) -> None:
        """Add up all ranks' ``tensor`` in place. On a GPU nothing is waited for."""
        if not self.alone:
            self._across(lambda: dist.all_reduce(tensor))

    def gathered(self, tensor: Tensor) -> Tensor:
        """All ranks' ``tensor`` [N], in their order: [ranks, N]."""
        if self.alone:
            return tensor[None]
        made = tensor.new_empty(self.count * tensor.numel())
        self._across(lambda: dist.all_gather_into_tensor(made, tensor.contiguous()))
        return made.view(self.count, -1)

    def told(self, value: T) -> list[T]:
        """All ranks' ``value``, any plain data, in their order."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.count
        self._across(lambda: dist.all_gather_object(values, value))
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives at rank 0. An error there is every rank's."""
        if self.alone:
            return make()
        box: list[Any] = [make() if self.first else None]
        self._across(lambda: dist.broadcast_object_list(box, src=0))
        made: T = box[0]
        return made

    def share_(self, tensors: list[Tensor]) -> None:
        """Give all ranks rank 0's values, in place."""
        if not self.alone:
            for tensor in tensors:
                self._across(partial(dist.broadcast, tensor, src=0))

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.told(value))

    def check_same(self, what: Mapping[str, Any], rule: str) -> None:
        """See that all ranks have the same.

        Args:
            what: Plain data by what it is called; the first that differs is named.
            rule: Why it must be.

        Raises:
            UserError: One hasn't; on every rank, and it names the first.
        """
        told = self.told(dict(what))
        for rank, other in enumerate(told):
            for name in told[0] | other:
                mine, its = told[0].get(name, "—"), other.get(name, "—")
                if mine != its:
                    table = [("", "rank 0", f"rank {rank}"), (name, str(mine), str(its))]
                    raise UserError(f"rank {rank} isn't like rank 0", table=table, rule=rule)

    def check_apart(self, card: str) -> None:
        """See that no two ranks have one GPU: NCCL would end at the first sum.

        Args:
            card: What tells this rank's from all others; empty if it has none.

        Raises:
            UserError: Two have; on every rank.
        """
        told = self.told(card)
        for rank, other in enumerate(told):
            if other and (same := told.index(other)) < rank:
                raise UserError(
                    f"ranks {same} and {rank} have the same GPU",
                    rule="One process takes one GPU.",
                    way_out="Let each process of a host see a GPU of its own, or all of them all GPUs "
                    "(CUDA_VISIBLE_DEVICES), and set LOCAL_RANK.",
                )

    def goes_on_by(self, command: str) -> None:
        """How to go on if a rank is lost, from here on."""
        if self._presence is not None:
            self._presence.resume = f"Go on: {command}"

    def leave(self) -> None:
        """This rank has nothing left to do with the others, nor they with it: none waits for what it still does."""
        if self._presence is not None:
            self.told(None)
            self._presence.leave()
            dist.destroy_process_group()
            self._presence = None

    def _across(self, do: Callable[[], Any]) -> None:
        """
        Raises:
            SlimtuneError: Another rank is gone.
        """
        assert self._presence is not None
        self._presence.check()
        try:
            do()
        except RuntimeError:  # gloo's, when a connection ends; whose and why, comes by another way
            if not self._presence.learn():
                raise
            raise self._presence.error() from None


ALONE = Ranks(Place())


@contextmanager
def together(hardware: Callable[[], Hardware], seconds: float) -> Iterator[Ranks]:
    """All ranks that the environment tells of, for as long as the body runs; alone without it.

    Args:
        hardware: Looks at this process's device.
        seconds: Most that a rank waits for another in the middle of the body; 0: for good.

    Raises:
        UserError: Not all came, or they have other cards.
    """
    place = this_place()
    if place.alone:
        with unheard_of():
            yield ALONE
        return
    with excused(place):
        device = hardware()
        if device.device == "cuda" and torch.cuda.device_count() > 1:
            raise UserError(
                f"rank {place.rank} sees {torch.cuda.device_count()} GPUs",
                rule="A rank takes one GPU and sees no other; the slimtune command sees to it.",
                way_out="Before Python starts: export CUDA_VISIBLE_DEVICES=$LOCAL_RANK",
            )
    ranks = _joined(place, device.device, seconds)
    with unheard_of():
        try:
            memory = f"{device.memory_bytes / 2**30:.0f} GiB"
            ranks.check_same({"device": f"{device.name} ({memory})"}, "A step takes as long as its slowest rank.")
            ranks.check_apart(str(torch.cuda.get_device_properties(0).uuid) if device.device == "cuda" else "")
            with on_host(Host.of(ranks)):
                yield ranks
        except BaseException as error:
            # The group stays: a GPU in a sum with a rank that is gone would be waited for.
            if ranks._presence is not None:
                ranks._presence.fail(error)
            speaks = ranks.first if ranks._presence is None else ranks._presence.speaks
            if not speaks and isinstance(error, StopRequested if ranks.left else SlimtuneError):
                error.told = True
            raise
        else:
            ranks.leave()


def _joined(place: Place, device: str, seconds: float) -> Ranks:
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    limit = timedelta(seconds=max(JOIN_SECONDS, 2 * seconds) if seconds else 7 * 24 * 3600)
    with meeting(place) as store:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.count, timeout=limit)
        return Ranks(place, _presence(place))


def _presence(place: Place) -> Presence:
    def share(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    return Presence(place.rank, place.count, os.environ["MASTER_ADDR"], share, JOIN_SECONDS)
