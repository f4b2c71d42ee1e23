"""How long a step takes on a card before one was made there: its work over rates, and what the memory plan adds.

Each way through the layers is so many operations of frozen weights' products, so many of attention's, and so many bytes
through memory for everything else; what is computed or unpacked again is more of the same. Five rates are fitted at
once to 56 steps that were measured on one H200 (``benchmarks/pace.py`` has them, how near each comes, and how near by
rates of the others). Another card's are these by the ratio of what its maker publishes: arithmetic, and called so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slimtune.engine.attention import LONG, ROUND
from slimtune.engine.blocks import Keep, Memory
from slimtune.engine.decoder import LayerComputation
from slimtune.engine.memory import MemoryPlan
from slimtune.engine.structure import SelfAttention
from slimtune.hardware import CARDS, Card

__all__ = ["MEASURED", "Step", "sum_seconds"]

MEASURED = "H200"
"""The card of the rates. What is told of others is arithmetic."""
_PRODUCTS = 661e12  # operations a second of frozen weights' products
_IN_FP8 = 1000e12  # and of those in FP8
_ATTENTION = 535e12  # and of attention's
_MOVED = 2.78e12  # bytes a second of all that passes through memory
_PARAMETER = 3.14e-10  # seconds for each parameter that trains: its gradient, its update
_FILLING = 112
"""Rows of which a product takes as long as for none: as if each had so many more."""
_PASSES = 5.0
"""Times that what a layer can keep goes through memory: a third of them forward."""
_APART = 0.4
"""FlashAttention-2's speed on Hopper and the engine's own kernel's, of cuDNN's: 180 to 290 of 530 to 650 TFLOP/s."""
_UNPACKED_IN_FP8 = 1.5
"""Times as long as a byte in 16 bits takes one of a weight in FP8 to be made anew: a kernel bound by instructions."""
_LAUNCHES = 1.05e-3
"""Seconds in which a host launches a product both ways, and again its adapters' own: 0.9 to 1.7 on others."""
HOST_CARDS, HOST_LINK = 8, 12.5
"""Cards of one host, and GB a second between hosts: 100 Gb/s."""


@dataclass
class _Way:
    """What one way through the model takes."""

    products: float = 0.0
    """Operations of frozen weights' products in the layers, the rows among them that fill the device."""
    head: float = 0.0
    """And in the head."""
    head_in_fp8: float = 0.0
    """And there in FP8."""
    attended: float = 0.0
    """Of attention, as many as cuDNN does in the time."""
    moved: float = 0.0
    """Bytes through memory."""
    unpacked: float = 0.0
    """Bytes of weights made anew."""


@dataclass(frozen=True)
class Step:
    """What one micro-batch's time follows from."""

    layers: Sequence[LayerComputation]
    head: int
    """Weights of the head."""
    plan: MemoryPlan
    memory: Memory
    """What the plan asks blocks about."""
    trained: int
    """Parameters that train."""
    lowest: int = 0
    """The first layer that has a backward."""
    in_fp8: float = 0.0
    """Of the frozen weights' products the share in FP8."""

    def seconds(self, lengths: Sequence[int], card: Card) -> float:
        """Of a micro-batch of documents of these lengths, every token supervised; 0 where nobody knows the card."""
        if not card.tflops or not card.bandwidth:
            return 0.0
        forward, backward = (self._seconds(way, card) for way in self._ways(lengths, card))
        backward += CARDS[MEASURED].bandwidth / card.bandwidth * self.trained * _PARAMETER
        tokens = sum(lengths)
        return max(forward + backward + self._copied(forward, backward, tokens, card), self.launching(tokens))

    def launching(self, tokens: int) -> float:
        """Seconds in which a host launches the work for so many tokens; 0 where graphs are recorded."""
        if not (self.plan.in_ram or self.plan.streamed):
            return 0.0
        blocks = [block for layer in self.layers for block in layer.blocks]
        products = sum(block.chunks(self.memory) * (len(block.parts) + len(block.trained)) for block in blocks)
        return math.ceil(tokens / self.plan.part_tokens) * products * _LAUNCHES

    def _seconds(self, way: _Way, card: Card) -> float:
        """Each term over its rate."""
        like, eighths = CARDS[MEASURED], self.in_fp8 * way.products
        computed = (way.products - eighths + way.head) / _PRODUCTS + way.attended / _ATTENTION
        computed += (eighths + way.head_in_fp8) / _IN_FP8
        unpacked = way.unpacked * (1 + (_UNPACKED_IN_FP8 - 1) * self.in_fp8)
        return like.tflops / card.tflops * computed + like.bandwidth / card.bandwidth * (way.moved + unpacked) / _MOVED

    def _ways(self, lengths: Sequence[int], card: Card) -> tuple[_Way, _Way]:
        """Forward and backward."""
        tokens, plan = sum(lengths), self.plan
        filled = 1 + _FILLING / min(plan.head_tokens, plan.part_tokens)
        head, eighths = 2.0 * tokens * self.head * filled, bool(plan.turned_head and self.in_fp8)
        forward, backward = _Way(head=head), _Way(head=head * (not eighths), head_in_fp8=head * eighths)
        for index, layer in enumerate(self.layers):
            self._add_layer(index, tokens, forward, backward)
            if layer.layer.attention is not None:
                product = self._attended(layer.layer.attention, lengths, card)
                forward.attended += 2 * product
                if index >= self.lowest:
                    backward.attended += (5 + 2 * (plan.keep[index] == Keep.INPUT)) * product
        return forward, backward

    def _add_layer(self, index: int, tokens: int, forward: _Way, backward: _Way) -> None:
        """All of a layer's but attention. Below the lowest adapter there is no way back."""
        plan, memory, layer = self.plan, self.memory, self.layers[index]
        keep, back = plan.keep[index], index >= self.lowest
        parts = math.ceil(tokens / plan.part_tokens)
        whole, kept = (layer.kept_bytes(memory, level) * tokens / plan.part_tokens for level in (Keep.ALL, keep))
        # An adapter's own products read and write each end of the layer's; four times in all.
        ends = 4.0 * tokens * sum(block.adapted_columns for block in layer.blocks)
        forward.moved += (_PASSES * whole + ends) / 3
        backward.moved += back * (2 * (_PASSES * whole + ends) + _PASSES * (whole - kept)) / 3
        held, held_turned = index < plan.kept_weights, index < plan.kept_turned
        for block in layer.blocks:
            filled = 2.0 * tokens * (1 + _FILLING / block.rows(memory))
            again = block.products_again(keep)
            forward.products += filled * block.products
            backward.products += back * filled * (block.products + again)
            uses, upright = parts * block.chunks(memory), block.weight_bytes
            forward.unpacked += uses * upright * (not held)
            turned = block.turned_bytes
            anew = (upright - turned + upright * again / block.products) * (not held) + turned * (not held_turned)
            backward.unpacked += back * uses * anew

    def _attended(self, part: SelfAttention, lengths: Sequence[int], card: Card) -> float:
        """Operations of one of attention's products, as long as cuDNN would take for them."""
        width, found = part.heads * part.head_dim, 0.0
        rows = len(set(lengths)) == 1 and lengths[0] % ROUND == 0
        before = card.capability < (9, 0)  # what is fast there is FlashAttention-2
        for length in lengths:
            window = min(part.window or length, length)
            fast = self.memory.ways[part.kind] == "varlen" and part.head_dim <= 128 and window == length
            speed = 1.0 if before or (fast and (rows or length >= LONG)) else _APART
            found += width * (2.0 * length * window - window * window) / speed
        return found

    def _copied(self, forward: float, backward: float, tokens: int, card: Card) -> float:
        """What copies take beyond the work of their own way, beside which both kinds take turns on the bus."""
        plan = self.plan
        copy = math.ceil(tokens / plan.part_tokens) * (plan.ram_bytes + plan.streamed_bytes) / (1e9 * card.bus)
        # Streamed layers are spread over all others; layers in RAM have their own work to run beside.
        share = 1.0 if plan.streamed else len(plan.in_ram) / len(plan.keep)
        return _beyond(copy, share * forward) + _beyond(copy, share * backward)


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
