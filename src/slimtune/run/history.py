"""A run's metrics as curves: each step once, in order, whatever stops and resumes the file has seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from operator import add, sub
from typing import Any

__all__ = ["Curve", "History", "coarse", "read_history", "smooth"]

Curve = list[tuple[int, float | None]]
"""(optimizer step, value); None where the value was no finite number."""


@dataclass
class History:
    """What ``metrics.jsonl`` tells, in order."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """One record a logged step (see :class:`slimtune.training.progress.MetricsCallback`)."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Records with ``eval_loss``."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Records with ``event``: a guard's finding, a skipped batch, a failed save."""
    resumed: list[int] = field(default_factory=list)
    """Steps that a resumed session went on from."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What wasn't what it was, when a session went on all the same (:class:`slimtune.run.identity.Change`), with the
    ``step`` that it went on from: it holds from the next one on."""
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """``before`` and ``after`` where a session went on with another number of processes, with such a ``step``."""
    last: dict[str, Any] | None = None
    """The last record of any kind."""

    @property
    def on_the_way(self) -> dict[str, Any]:
        """What no facts hold, as a session's are its own: what another one before it did otherwise."""
        return {"changes": self.changes, "ranks": self.ranks}

    def take(self, line: Any) -> None:
        """One more record, the next of the file. What isn't as the trainer writes it is passed over."""
        if not isinstance(line, Mapping) or not isinstance(line.get("step"), int):
            return
        self.last = record = dict(line)
        if "event" in record:
            if record["event"] != "gradients" or record.get("without"):  # that all is well is no event
                self.events.append(record)
            if record["event"] == "resumed":
                self._go_back(record["step"])
                self.changes += [{"step": record["step"], **change} for change in record.get("changes", ())]
            elif record["event"] == "ranks":
                self.ranks.append(record)
        elif "eval_loss" in record:
            self.evaluations.append(record)
        elif "loss" in record:
            if self.steps and record["step"] <= self.steps[-1]["step"]:
                # Trained again without a checkpoint to go on from.
                self._go_back(record["step"] - int(record.get("logged_steps", 1)))
            self.steps.append(record)

    def _go_back(self, step: int) -> None:
        """A session goes on from ``step``: what the one before it did after that step doesn't count."""
        self.resumed.append(step)
        for records in (self.steps, self.evaluations):  # in order: a file of nothing but resumes is read once
            while records and records[-1]["step"] > step:
                records.pop()
        for changes in (self.changes, self.ranks):  # they are told anew, if they hold
            while changes and changes[-1]["step"] >= step:
                changes.pop()

    def curve(self, key: str) -> Curve:
        """One value over the steps; a record that lacks it leaves no point."""
        return [(record["step"], _finite(record[key])) for record in self.steps if key in record]

    def evaluation_curve(self) -> Curve:
        """The evaluations' loss over the steps."""
        return [(record["step"], _finite(record["eval_loss"])) for record in self.evaluations]


def read_history(records: Iterable[Mapping[str, Any]]) -> History:
    """Sort a run's records. What a session trained after the checkpoint that the next one went on from is left out.

    Args:
        records: The lines of ``metrics.jsonl``, in the file's order.
    """
    history = History()
    for line in records:
        history.take(line)
    return history


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def coarse(curve: Curve, most: int = 2_000) -> Curve:
    """The curve in at most ``most`` points, each the mean of its neighbours': as much as a drawing shows."""
    each = -(-len(curve) // most)
    if each <= 1:
        return curve
    made: Curve = []
    for at in range(0, len(curve), each):
        near = curve[at : at + each]
        values = [value for _, value in near if value is not None]
        made.append((near[len(near) // 2][0], sum(values) / len(values) if values else None))
    return made


def smooth(curve: Curve) -> Curve:
    """The curve's course: two passes of a local linear fit over a twentieth of the points (LOESS without weights).

    A fit, unlike an average, isn't pulled inwards at the ends. Gaps stay gaps; under ten points nothing is smoothed.
    """
    if len(curve) < 10:
        return curve
    reach = max(1, len(curve) // 40)
    return _fitted(_fitted(curve, reach), reach)


def _fitted(curve: Curve, reach: int) -> Curve:
    """Each value replaced by that of the line fitted to its neighbours, up to ``reach`` points away."""
    # Running sums over the points that have a value: how many, of x, y, x squared and x times y.
    terms = [(1, x, y, x * x, x * y) if y is not None else (0, 0, 0.0, 0, 0.0) for x, (_, y) in enumerate(curve)]
    sums = list(accumulate(terms, lambda total, term: tuple(map(add, total, term)), initial=(0, 0, 0.0, 0, 0.0)))
    made: Curve = []
    for at, (step, value) in enumerate(curve):
        first, last = max(0, at - reach), min(len(curve), at + reach + 1)
        n, x, y, xx, xy = map(sub, sums[last], sums[first])
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread else 0.0
        made.append((step, None if value is None else (y + slope * (n * at - x)) / n))
    return made
