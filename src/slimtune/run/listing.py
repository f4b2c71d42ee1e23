"""The runs that lie in a folder, a line each: from their own files, without opening a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slimtune.errors import UserError
from slimtune.run.facts import damage_told
from slimtune.run.folder import RunFolder

__all__ = ["SORTS", "RunLine", "list_runs"]

DEPTH = 3
"""Folders of folders that are looked through."""


@dataclass(frozen=True)
class RunLine:
    """One run. What it doesn't tell is None."""

    path: str
    state: str
    """done, worse (done, and the model worse than it was), unfinished or damaged."""
    model: str | None = None
    data: tuple[str, ...] = ()
    steps: int | None = None
    """Optimizer steps that it has made."""
    held_out_before: float | None = None
    """Loss of a supervised token of the held-out rows before the first step, in nats."""
    held_out_after: float | None = None
    adapter_bytes: int | None = None
    created: str | None = None
    """When it began, in ISO 8601."""
    problem: str | None = None
    """What is damaged."""

    @property
    def change(self) -> float | None:
        """Of the held-out loss, in nats."""
        if self.held_out_before is None or self.held_out_after is None:
            return None
        return self.held_out_after - self.held_out_before


def _number(value: float | None) -> float:
    return float("inf") if value is None else value


SORTS: dict[str, Callable[[RunLine], Any]] = {
    "when": lambda line: -datetime.fromisoformat(line.created).timestamp() if line.created else 0.0,
    "name": lambda line: line.path,
    "loss": lambda line: _number(line.held_out_after),
    "change": lambda line: _number(line.change),
    "steps": lambda line: -(line.steps or 0),
    "size": lambda line: -(line.adapter_bytes or 0),
}
"""What lines are sorted by: the newest, the lowest loss, the largest fall, the most steps and bytes first."""


def list_runs(folder: Path, sort: str = "when") -> list[RunLine]:
    """The runs in ``folder`` and in folders below it.

    Args:
        folder: Where to look; a run's own folder gives that run.
        sort: A key of :data:`SORTS`.

    Raises:
        UserError: There is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist", way_out="Give a folder that holds runs.")
    by_name = sorted((_line(run) for run in _runs(folder, DEPTH)), key=SORTS["name"])
    return sorted(by_name, key=SORTS[sort])


def _runs(folder: Path, depth: int) -> Iterator[RunFolder]:
    run = RunFolder(folder)
    # Many programs write a config.yaml; the second file is a run's own.
    if run.config_file.is_file() and (run.environment_file.is_file() or run.facts_file.is_file()):
        yield run
        return
    if not depth:
        return
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return  # not ours to read
    for path in below:
        yield from _runs(path, depth - 1)


def _line(run: RunFolder) -> RunLine:
    try:
        with damage_told(run.facts_file):
            return _told(run, run.facts())
    except UserError as error:
        return RunLine(str(run.path), "damaged", problem=error.what)


def _told(run: RunFolder, facts: dict[str, Any]) -> RunLine:
    base, adapter, training, verdict = (facts.get(key) or {} for key in ("base", "adapter", "training", "verdict"))
    before, after = ((verdict.get(key) or {}).get("value") for key in ("start", "end"))
    steps = training.get("steps") or max((int(record.get("step", 0)) for record in run.metrics()), default=0)
    state = "done" if training else "unfinished"
    line = RunLine(
        path=str(run.path),
        state="worse" if verdict.get("outcome") == "worse" else state,
        model=base.get("model"),
        data=run.config().data,
        steps=steps,
        held_out_before=before,
        held_out_after=after if after is not None else training.get("eval_loss"),
        adapter_bytes=adapter.get("file_bytes"),
        created=facts.get("created"),
    )
    _hold(line)
    return line


def _hold(line: RunLine) -> None:
    """Hold what files said to what can be sorted and shown.

    Raises:
        TypeError: A value is of another kind.
        ValueError: It is no date.
        OverflowError: It is a number beyond all that are counted here.
    """
    for value in (line.model, line.created):
        if not isinstance(value, str | None):
            raise TypeError(f"{value!r} where a text is expected")
    for number in (line.steps, line.adapter_bytes, line.held_out_before, line.held_out_after):
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise TypeError(f"{number!r} where a number is expected")
        float(number or 0)
    if line.created:
        datetime.fromisoformat(line.created).timestamp()
