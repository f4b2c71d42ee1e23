"""Which micro-batches of a step are whose. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slimtune.errors import UserError

__all__ = ["Share", "accumulation_for", "check_even"]


@dataclass(frozen=True)
class Share:
    """One rank's micro-batches of a run.

    A step takes the next ``step`` positions of the run, whatever the number of ranks; each rank takes as many of them,
    side by side. So a run can go on with another number of ranks.
    """

    rank: int
    count: int
    step: int
    """Micro-batches of an optimizer step, over all ranks."""
    total: int
    """Micro-batches of the run, over all its epochs."""

    @property
    def own(self) -> int:
        """Micro-batches of a step that this rank computes."""
        return self.step // self.count

    def positions(self) -> npt.NDArray[np.int64]:
        """This rank's positions, in order: int64 [own x steps]. Those of the last step may be none of the run's."""
        if self.count == 1:
            return np.arange(self.total)
        whole = -(-self.total // self.step) * self.step
        mine: npt.NDArray[np.int64] = np.arange(whole).reshape(-1, self.count, self.own)[:, self.rank].reshape(-1)
        return mine

    def of(self, units: int) -> npt.NDArray[np.int64]:
        """Which of ``units`` held-out micro-batches this rank evaluates, in order; the first again where none is left,
        as an evaluation of nothing has no loss."""
        mine = np.arange(self.rank, units, self.count)
        return mine if len(mine) else np.zeros(1, np.int64)

    def position(self, begins: int, place: int) -> int | None:
        """The position of this rank's micro-batch ``place`` in the step that begins at ``begins``; None beyond the
        run's end, where there is nothing to compute."""
        at = begins + self.rank * self.own + place
        return at if at < self.total else None


def accumulation_for(usual: int, count: int) -> int:
    """The fewest micro-batches to a step, ``usual`` or more, that ``count`` ranks can share evenly."""
    return -(-usual // count) * count


def check_even(accumulation: int, count: int) -> None:
    """See that a step can be shared.

    Raises:
        UserError: It can't.
    """
    if accumulation % count == 0:
        return
    below, above = accumulation // count * count, accumulation_for(accumulation, count)
    nearest = " or ".join(str(value) for value in (below, above) if value)
    fewer = max(ranks for ranks in range(1, count) if accumulation % ranks == 0)
    raise UserError(
        f"gradient_accumulation {accumulation} can't be shared evenly by {count} ranks",
        rule="It counts the micro-batches of a step over all ranks, and each rank takes as many.",
        way_out=f"Give --gradient-accumulation {nearest}, or take fewer ranks: {fewer}.",
    )
