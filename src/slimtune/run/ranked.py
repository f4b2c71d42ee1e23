"""The folder that a rank works in: rank 0 in the run's, the others in one that goes with them.

What a rank writes while it trains, it writes as a run alone does; only rank 0's is kept. The checkpoint that a run goes
on from is read by rank 0 and given to the others, which may be on hosts that don't see its disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from slimtune.config import Config
from slimtune.ranks.group import Ranks
from slimtune.run.folder import RunFolder
from slimtune.run.lock import lock_run
from slimtune.run.replaced import check_adapter

__all__ = ["new_folder", "old_folder"]


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
    with TemporaryDirectory(prefix=f"slimtune-rank{ranks.rank}-") as folder:
        run = RunFolder(Path(folder))
        yield run
