"""What the ranks of one host have in common: its RAM, in which frozen weights are there once for all of them."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimtune.errors import UserError

if TYPE_CHECKING:
    from slimtune.ranks.group import Ranks

__all__ = ["Host", "here", "on_host"]

_BOOT = Path("/proc/sys/kernel/random/boot_id")
"""One for each host, whatever containers it runs."""


class Host:
    """This process's host, as it is to a run.

    Args:
        ranks: All ranks; none: this process is alone.
        members: Those of this host, in their order.
        sharing: The fewest ranks of any host; 0 if not every rank sees RAM that the first of its host makes.
    """

    def __init__(self, ranks: Ranks | None = None, members: tuple[int, ...] = (0,), *, sharing: int = 0) -> None:
        self._ranks, self._members, self._sharing = ranks, members, sharing

    @classmethod
    def of(cls, ranks: Ranks) -> Host:
        """Find out, together with all other ranks, which are on one host, and whether they see each other's RAM: those
        of other containers don't."""
        token = secrets.token_bytes(16)
        with _anonymous() as probe:
            os.write(probe, token)
            told = ranks.told((_boot(), _path(probe), token))
            members = tuple(rank for rank, (boot, *_) in enumerate(told) if boot == told[ranks.rank][0])
            _, path, written = told[members[0]]
            seen = ranks.told((len(members), _read(path) == written))
        return cls(ranks, members, sharing=min(count for count, _ in seen) if all(sees for _, sees in seen) else 0)

    @property
    def _together(self) -> bool:
        return self._ranks is not None and not self._ranks.left

    @property
    def first(self) -> bool:
        """Whether this rank does what is done once a host."""
        return not self._together or (self._ranks is not None and self._ranks.rank == self._members[0])

    @property
    def count(self) -> int:
        """Ranks of this run on this host: what the host has, they share."""
        return len(self._members) if self._together else 1

    @property
    def sharing(self) -> int:
        """Ranks of any host, or more, for whom :meth:`common` RAM is there once; 1 if each has its own. All ranks have
        the same, so that they plan alike."""
        return max(1, self._sharing) if self._together else 1

    def least(self, what: str, value: int) -> int:
        """The smallest that any rank has, on whichever host, so that all plan alike."""
        return min(self._told(what, value)) if self._together else value

    @contextmanager
    def common(self, nbytes: int, what: str) -> Iterator[tuple[Tensor | None, bool]]:
        """RAM that is there once for the ranks of a host, and goes with the last tensor over it.

        Every rank must ask for the same, in the same order.

        Args:
            nbytes: Of it.
            what: It is for.

        Yields:
            uint8 [nbytes], and whether this rank is to write it. One is, in the body, and the bodies of the others
            begin when that one's is over. None where nobody shares: a rank has RAM of its own then, and writes it.

        Raises:
            UserError: The system gives no such memory, or another rank asked for something else.
        """
        if not (self._sharing and self._ranks is not None and self._together):
            yield None, True
            return
        asked, first = f"{nbytes} bytes for the {what}", self._members[0]
        if self._ranks.rank != first:
            path = self._told(asked, None)[first]
            yield _mapped(path, nbytes, what), False
            self._told(asked, None)
            return
        with _anonymous() as file:
            try:
                os.posix_fallocate(file, 0, nbytes)  # refused here, and not by a signal at the first write
            except OSError as error:
                raise _refusal(nbytes, what, error.strerror or str(error)) from None
            yield _mapped(_path(file), nbytes, what), True
            self._told(asked, _path(file))
            self._told(asked, None)  # the others have opened it

    def _told(self, what: str, value: Any) -> list[Any]:
        """All ranks' ``value`` of ``what``.

        Raises:
            UserError: A rank tells something else.
        """
        assert self._ranks is not None
        self._ranks.check_same({"RAM": what}, "All ranks plan their memory alike.")
        return self._ranks.told(value)


_HERE: ContextVar[Host | None] = ContextVar("slimtune_host", default=None)


def here() -> Host:
    """The host of the run that this process is a rank of; one of its own outside of any."""
    return _HERE.get() or Host()


@contextmanager
def on_host(host: Host) -> Iterator[None]:
    """While the body runs, this is :func:`here`."""
    before = _HERE.set(host)
    try:
        yield
    finally:
        _HERE.reset(before)


@contextmanager
def _anonymous() -> Iterator[int]:
    """A file in RAM without a name, which no file system's size limits (that of ``/dev/shm`` is often 64 MB)."""
    if not hasattr(os, "memfd_create"):  # not Linux: a file that nobody else sees
        with TemporaryFile() as other:
            yield other.fileno()
        return
    file = os.memfd_create("slimtune", os.MFD_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def _path(file: int) -> str:
    """By which other processes of this user open it, if they are in no container of their own."""
    return f"/proc/{os.getpid()}/fd/{file}"


def _mapped(path: str, nbytes: int, what: str) -> Tensor:
    try:
        return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise _refusal(nbytes, what, (str(error).splitlines() or [""])[0]) from None


def _refusal(nbytes: int, what: str, why: str) -> UserError:
    return UserError(
        f"{nbytes / 2**30:.2f}GiB of RAM can't be had for the {what}: {why}",
        rule="What doesn't fit the GPU beside the rest goes to RAM: layers' inputs and weights, the embedding.",
        way_out="Free RAM; with more GPU memory (--memory) less of it is needed.",
    )


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # another container's
        return b""
