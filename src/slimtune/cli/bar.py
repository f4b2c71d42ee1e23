"""What is seen while something takes long, on standard error; nothing where that is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slimtune.words import told

__all__ = ["busy", "counting"]

_turning: list[str] = []


@contextmanager
def busy(text: str) -> Iterator[None]:
    """A spinner beside ``text`` while the body takes seconds; one of them at a time, the first."""
    console = Console(stderr=True)
    if _turning or not console.is_terminal:
        yield
        return
    _turning.append(text)
    try:
        with console.status(f"  {told(text)}"):
            yield
    finally:
        _turning.pop()


@contextmanager
def counting(works: Mapping[str, str]) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each kind of work, shown once it begins, until all is done.

    Args:
        works: What is said of each kind.

    Yields:
        What takes the kind, how much of it is done, and of how much.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = {name: progress.add_task(told(said), total=None, visible=False) for name, said in works.items()}
        yield lambda name, done, total: progress.update(tasks[name], completed=done, total=total, visible=True)
