"""How long a step takes on a card before one was made there: its work over rates, and what the memory plan adds.

Six rates, fitted at once to twenty steps that were measured on one H200, of seven families, with and without a budget
of memory (``benchmarks/pace.py`` has them, how near each comes, and how near by rates of the others). Another card's
are these by the ratio of what its maker publishes: arithmetic, and called so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimtune.engine.blocks import Keep
from slimtune.engine.memory import MemoryPlan
from slimtune.hardware import CARDS, Card
from slimtune.training.floor import Work

__all__ = ["MEASURED", "Step", "sum_seconds"]

MEASURED = "H200"
"""The card of the rates. What is told of others is arithmetic."""
_PRODUCTS = 589e12  # operations a second of frozen weights' products
_IN_FP8 = 900e12  # and of those in FP8; set by hand after one call, not fitted
_ATTENTION = 554e12  # and of attention's
_PASSES = 0.968e12  # bytes a second of what a layer can keep, for all that is done to it beside products
_AGAIN = 1.524  # of what the plan's own cost model says for what is computed again
_UNPACKED = 0.299  # and for weights that are made anew
_PARAMETER = 2.49e-10  # seconds for each parameter that trains: its products, its gradient, its update
HOST_CARDS, HOST_LINK = 8, 12.5
"""Cards of one host, and GB a second between hosts: 100 Gb/s."""


@dataclass(frozen=True)
class Step:
    """What one micro-batch's time follows from."""

    work: Work
    plan: MemoryPlan
    passed: int
    """Bytes that layers keep where they keep everything."""
    trained: int
    """Parameters that train."""
    in_fp8: float = 0.0
    """Of the frozen weights' products the share in FP8."""

    def seconds(self, lengths: Sequence[int], card: Card) -> float:
        """Of a micro-batch of documents of these lengths, every token supervised; 0 where nobody knows the card."""
        if not card.tflops or not card.bandwidth:
            return 0.0
        like = CARDS[MEASURED]
        again = sum(keep == Keep.INPUT for keep in self.plan.keep) / max(1, len(self.plan.keep))
        tokens = sum(lengths)
        eighths = self.in_fp8 * self.work.linear
        multiplied = 4.0 * tokens * ((self.work.linear - eighths + self.work.head) / _PRODUCTS + eighths / _IN_FP8)
        # Seven products, and the forward's two again in layers that keep nothing of it.
        attended = (7.0 + 2.0 * again) * self.work.squares(lengths) / _ATTENTION
        moved = self.passed / _PASSES + self.trained * _PARAMETER
        added = _AGAIN * self.plan.added.computed + _UNPACKED * self.plan.added.unpacked + self.plan.added.copied
        computed = multiplied + attended + added
        return computed * like.tflops / card.tflops + moved * like.bandwidth / card.bandwidth


def sum_seconds(trained: int, count: int, card: Card) -> float:
    """To add up the gradient of ``trained`` parameters, in fp32, over ``count`` cards: in a ring within hosts of eight,
    then in a ring of hosts. Arithmetic: nothing waits for anything else, and no byte goes twice."""
    nbytes = 4.0 * trained

    def ring(members: int, rate: float) -> float:
        return 2.0 * (members - 1) / members * nbytes / (1e9 * rate)

    return ring(min(count, HOST_CARDS), card.link) + ring(-(-count // HOST_CARDS), HOST_LINK)
