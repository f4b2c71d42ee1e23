"""How long a step takes on a card before one was made there: its work over rates, and what the memory plan adds.

Six rates, fitted at once to twenty steps that were measured on one H200, of seven families, with and without a budget
of memory (``benchmarks/pace.py`` has them, how near each comes, and how near by rates of the others). Another card's
are these by the ratio of what its maker publishes: arithmetic, and called so.
"""

from __future__ import annotations

import math
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
_LAUNCHES = 6e-3  # seconds in which a host launches a layer both ways: 5.2 to 10 on four hosts; not fitted
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
        like, plan = CARDS[MEASURED], self.plan
        slower, moves = like.tflops / card.tflops, like.bandwidth / card.bandwidth
        again = sum(keep == Keep.INPUT for keep in plan.keep) / max(1, len(plan.keep))
        tokens = sum(lengths)
        eighths = self.in_fp8 * self.work.linear
        multiplied = 4.0 * tokens * ((self.work.linear - eighths + self.work.head) / _PRODUCTS + eighths / _IN_FP8)
        attended = self.work.squares(lengths) / _ATTENTION  # a product; the forward has two, the backward five
        unpacked, moved = _UNPACKED * plan.added.unpacked, moves * (self.passed / _PASSES + self.trained * _PARAMETER)
        shared = slower * (multiplied + unpacked) + moved
        forward = shared / 2 + slower * 2.0 * attended
        # In layers that keep nothing the forward's two products are made again.
        backward = shared / 2 + slower * ((5.0 + 2.0 * again) * attended + _AGAIN * plan.added.computed)
        return forward + backward + self._waited(forward, backward, tokens, card)

    def _waited(self, forward: float, backward: float, tokens: int, card: Card) -> float:
        """For copies, beyond what they run beside: a forward brings weights and sends away what layers keep, on a bus
        that does both at once; a backward brings both. And for a host that gives the device work without a graph."""
        plan, layers = self.plan, len(self.plan.keep)
        if not (plan.in_ram or plan.streamed):
            return 0.0
        parts = math.ceil(tokens / plan.part_tokens)
        kept, weights = (parts * nbytes / (1e9 * card.bus) for nbytes in (plan.ram_bytes, plan.streamed_bytes))
        # Streamed layers are spread over all others; layers in RAM have their own work to run beside.
        share = 1.0 if plan.streamed else len(plan.in_ram) / layers
        copied = _beyond(max(kept, weights), share * forward) + _beyond(kept + weights, share * backward)
        return max(copied, parts * layers * _LAUNCHES - forward - backward)


def _beyond(copy: float, work: float) -> float:
    """What a copy takes beyond the work beside it; to begin and to end it is never free."""
    return max(0.02 * copy, copy - work)


def sum_seconds(trained: int, count: int, card: Card) -> float:
    """To add up the gradient of ``trained`` parameters, in fp32, over ``count`` cards: in a ring within hosts of eight,
    then in a ring of hosts. Arithmetic: nothing waits for anything else, and no byte goes twice."""
    nbytes = 4.0 * trained

    def ring(members: int, rate: float) -> float:
        return 2.0 * (members - 1) / members * nbytes / (1e9 * rate)

    return ring(min(count, HOST_CARDS), card.link) + ring(-(-count // HOST_CARDS), HOST_LINK)
