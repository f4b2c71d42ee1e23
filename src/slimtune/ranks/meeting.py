"""Where the ranks of a run meet before there is a group: each waits for all, or hears why one doesn't come.

They meet in torch's store at ``MASTER_ADDR:MASTER_PORT``, which rank 0 keeps, or a launcher's agent. A rank that ends
before it has come (it has no GPU, its host lacks the data) leaves word there, so that nobody waits for it.
"""

from __future__ import annotations

import atexit
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from slimtune.errors import GuardStop, SlimtuneError, StopRequested, UserError
from slimtune.ranks.place import Place

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["JOIN_SECONDS", "as_told", "excused", "meeting", "word_of"]

JOIN_SECONDS = 600.0
"""That the ranks have to find each other, a slow disk's imports among them."""
_LEAVING_SECONDS = 120.0
"""That a rank which doesn't come, and rank 0, spend on telling the others."""
_MEETINGS = itertools.count()
_KINDS = {kind.exit_code: kind for kind in (UserError, GuardStop, StopRequested)}


def word_of(rank: int, error: BaseException) -> dict[str, Any]:
    """What a rank that ends tells the others, as plain data."""
    if isinstance(error, SlimtuneError):
        parts = {"what": error.what, "table": error.table, "rule": error.rule, "way_out": error.way_out}
        return {"rank": rank, **parts, "code": error.exit_code}
    return {"rank": rank, "what": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def as_told(word: dict[str, Any], resume: str = "") -> SlimtuneError:
    """An error of the same kind, of a rank that was told; ``resume`` is the way out if the word has none."""
    kind, rank, what = _KINDS.get(word.get("code", 0), StopRequested), word["rank"], word["what"]
    what = what if what.startswith(f"rank {rank}") else f"rank {rank}: {what}"
    way_out = word.get("way_out", "") or resume
    return kind(what, rule=word.get("rule", ""), way_out=way_out, table=word.get("table", ()))


@contextmanager
def meeting(place: Place) -> Iterator[Store]:
    """Wait for all ranks; the body makes the group by the store that they met in.

    Raises:
        SlimtuneError: One doesn't come, as it says, or not all came in time, or their launcher told them wrong.
    """
    from torch import distributed as dist

    until = time.monotonic() + JOIN_SECONDS
    try:
        # A process may train twice, and the store remembers what the first group wrote into it.
        store = dist.PrefixStore(f"slimtune-{next(_MEETINGS)}", _opened(place, JOIN_SECONDS))  # type: ignore[attr-defined]
        _check_told(store, place)
        arrived = store.add("here", 1)
        while arrived < place.count and time.monotonic() < until and not store.check(["absent"]):
            time.sleep(0.1)
            arrived = store.add("here", 0)
        if store.check(["absent"]):
            word = json.loads(store.get("absent"))
            error = as_told(word)
            error.told = place.rank > 0
            _do_last(error, partial(_until_heard, store, place))
            raise error
        missing = [rank for rank in range(place.count) if not store.check([f"here-{rank}"])]
        if missing:
            names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            raise _lost(place, f"of {place.count} these did not come: {names}")
        yield store
    except (RuntimeError, ValueError, OSError) as error:
        raise _lost(place, (str(error).splitlines() or [""])[0]) from error


@contextmanager
def excused(place: Place) -> Iterator[None]:
    """What ends in the body is told to the ranks that wait for this one, once it has been said here."""
    try:
        yield
    except SlimtuneError as error:
        if not place.alone:
            _do_last(error, partial(_leave_word, place, error))
        raise


def _do_last(error: SlimtuneError, do: Callable[[], None]) -> None:
    """Do it once ``error`` has been said: the command sees to that, and for a program of one's own its end does."""
    error.last = cache(do)
    atexit.register(error.last)


def _leave_word(place: Place, error: SlimtuneError) -> None:
    """Tell the others that this rank doesn't come."""
    from torch import distributed as dist

    try:
        store = dist.PrefixStore(f"slimtune-{next(_MEETINGS)}", _opened(place, _LEAVING_SECONDS))  # type: ignore[attr-defined]
        store.compare_set("absent", "", json.dumps(word_of(place.rank, error)))
    except (RuntimeError, ValueError, OSError, KeyboardInterrupt):
        return  # nobody is there, or nobody shall wait any longer
    _until_heard(store, place)


def _until_heard(store: Store, place: Place) -> None:
    """This rank has heard that one doesn't come; rank 0, who may keep the store, stays until all have."""
    until = time.monotonic() + _LEAVING_SECONDS
    try:
        heard = store.add("heard", 1)
        while place.rank == 0 and heard < place.count and time.monotonic() < until:
            time.sleep(0.1)
            heard = store.add("heard", 0)
    except (RuntimeError, KeyboardInterrupt):
        return  # it isn't there any more, or nobody shall wait any longer


def _opened(place: Place, seconds: float) -> Store:
    """The store, without waiting for more than whoever keeps it."""
    from torch.distributed.rendezvous import rendezvous

    # So many ranks it would wait for before it could be asked.
    met = rendezvous("env://", rank=place.rank, world_size=1, timeout=timedelta(seconds=seconds))
    store: Store = next(iter(met))[0]
    return store


def _check_told(store: Store, place: Place) -> None:
    """
    Raises:
        UserError: Two processes are the same rank, or ranks were told of different numbers of them.
    """
    count = store.compare_set("count", "", str(place.count)).decode()
    if count != str(place.count):
        raise _astray(store, place, f"rank {place.rank} was told of {place.count} ranks, and another of {count}")
    if store.add(f"here-{place.rank}", 1) > 1:
        raise _astray(store, place, f"two processes were told that they are rank {place.rank}")


def _astray(store: Store, place: Place, what: str) -> UserError:
    error = UserError(
        what,
        rule="Each process has a RANK of its own, and all have the same WORLD_SIZE.",
        way_out="See what the launcher sets; another run may be meeting at the same MASTER_ADDR and MASTER_PORT.",
    )
    store.compare_set("absent", "", json.dumps(word_of(place.rank, error)))
    _do_last(error, partial(_until_heard, store, place))
    return error


def _lost(place: Place, why: str) -> UserError:
    return UserError(
        f"rank {place.rank} does not find the others: {why}",
        rule=f"All {place.count} ranks meet at MASTER_ADDR:MASTER_PORT within {JOIN_SECONDS:.0f} s.",
        way_out="See that rank 0's host is reached under that name from all others.",
    )
