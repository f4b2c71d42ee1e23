"""The folder that a rank works in: rank 0 in the run's, the others in one that goes with them.

What a rank writes while it trains, it writes as a run alone does; only rank 0's is kept. The checkpoint that a run goes
on from is read by rank 0 and given to the others, which may be on hosts that don't see its disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from slimtune.config import Config
from slimtune.ranks.group import Ranks
from slimtune.run.folder import RunFolder
from slimtune.run.lock import LOCK, is_locked, is_run_lock, lock_run
from slimtune.run.replaced import check_adapter

__all__ = ["new_folder", "old_folder"]

_PREFIX = "slimtune-rank"


@contextmanager
def new_folder(ranks: Ranks, config: Config) -> Iterator[RunFolder]:
    """As :meth:`slimtune.run.folder.RunFolder.create`, for a new run of ``config``, whose output is known.

    Raises:
        UserError: The run's folder can't be had.
    """
    if not ranks.first:
        with _beside(ranks) as run:
            yield run
        return
    assert config.output is not None
    with RunFolder.create(config.output, overwrite=config.overwrite) as run:
        yield run


@contextmanager
def old_folder(ranks: Ranks, path: Path) -> Iterator[RunFolder]:
    """The run in ``path``, for rank 0 alone to work on.

    Raises:
        UserError: There is none, or another process works on it.
    """
    if not ranks.first:
        with _beside(ranks) as run:
            yield run
        return
    run = RunFolder.open(path)
    with lock_run(path):
        check_adapter(run.adapter)
        yield run


@contextmanager
def _beside(ranks: Ranks) -> Iterator[RunFolder]:
    _clear_up()
    with TemporaryDirectory(prefix=f"{_PREFIX}{ranks.rank}-") as folder, lock_run(Path(folder)):
        yield RunFolder(Path(folder))


def _clear_up() -> None:
    """Remove what ranks that were killed have left: this user's folders whose lock nobody holds any more."""
    for folder in Path(gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # another rank clears up too
            left = not folder.is_symlink() and folder.lstat().st_uid == os.geteuid()
            if left and is_run_lock(folder / LOCK) and not is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
