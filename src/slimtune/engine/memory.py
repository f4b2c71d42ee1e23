"""Turns a memory budget into what each layer keeps, which weights stay dequantised, and how much is done at once.

All sizes are worked out from shapes before anything is allocated. A plan is chosen by a cost model of the work that
it adds: products computed again, weights dequantised again, and products too small to fill the device. The model's
rates are an H100's; only their ratios count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slimtune.engine.attention import Way
from slimtune.engine.decoder import Keep, LayerComputation

__all__ = ["MemoryPlan", "layer_bytes", "plan_memory", "working_bytes"]

_CHUNKS = (1 << 30, 8192, 4096, 2048, 1024, 512)
"""Tokens that the MLP may take at once."""
_HEAD_CHUNKS = (4096, 2048, 1024, 512, 256)
"""Supervised tokens that the head may take at once."""
_FLOPS = 700e12  # of a large 16-bit product
_DEQUANTIZED = 1.5e12  # bytes of 16-bit weights written in a second, their 4 bits read
_FILL = 160  # tokens at which a product runs at half its rate
_LAUNCHES = 0.8e-3  # seconds in which a host gives the device a layer's forward and backward without a graph
_SUMS = 512 << 20
"""Bytes that the memory-efficient kernel's sums may take, so that it takes documents of any lengths at once."""


@dataclass(frozen=True)
class MemoryPlan:
    """How the engine uses its memory."""

    keep: tuple[Keep, ...]
    """For each layer."""
    kept_weights: int
    """How many layers, from the first, hold their weights in the compute dtype."""
    part_tokens: int
    """A larger micro-batch is split into parts of whole documents, and their gradients are added up."""
    mlp_tokens: int
    """Tokens that the MLP takes at once."""
    head_tokens: int
    """Supervised tokens that the head takes at once."""
    padded_room: int
    """What :func:`slimtune.engine.attention.padded_tokens` may be in one call; a CUDA graph needs it."""
    nbytes: int
    """What all of this is predicted to take, besides the model itself."""


def layer_bytes(layer: LayerComputation, tokens: int, keep: Keep, way: Way = "varlen", padded_room: int = 0) -> int:
    """Bytes that a layer keeps from its forward to its backward, attention computed by ``way``."""
    size = layer.dtype.itemsize
    columns = layer.down.outputs
    floats = 0
    if keep >= Keep.ATTENTION:
        columns += layer.qkv.outputs + layer.o.inputs + layer.o.extra + layer.down.outputs
        # The memory-efficient kernel's logsumexp has as many for each document of a run as for the longest.
        sums = max(4 * tokens, padded_room) if way == "efficient" else tokens
        floats = layer.heads * sums + 2 * tokens
        if layer.layer.q_norm is not None:
            columns += (layer.heads + layer.kv_heads) * layer.head_dim
            floats += (layer.heads + layer.kv_heads) * tokens
    if keep >= Keep.GATES:
        columns += layer.gate_up.outputs
    if keep >= Keep.ALL:
        columns += sum(site.inputs + site.extra for site in (layer.qkv, layer.gate_up) if site.groups)
    return tokens * columns * size + 4 * floats


def working_bytes(
    layer: LayerComputation, tokens: int, mlp_tokens: int, way: Way = "varlen", padded_room: int = 0
) -> int:
    """Bytes that one layer's backward takes at its peak beside what was kept, all of it computed again."""
    size = layer.dtype.itemsize
    hidden, qkv = layer.down.outputs, layer.qkv.outputs
    q = layer.heads * layer.head_dim
    again = layer_bytes(layer, tokens, Keep.ATTENTION, way, padded_room)
    again += tokens * (layer.qkv.inputs + layer.qkv.extra) * size
    n2 = tokens * (layer.gate_up.inputs + layer.gate_up.extra) * size
    mlp = n2 + tokens * hidden * size + min(tokens, mlp_tokens) * 3 * layer.gate_up.outputs * size
    # FlashAttention-2's backward sums dq in float32; cuDNN's likewise. dq, dk, dv lie beside the merged gradient.
    attention = tokens * (2 * qkv * size + 2 * q * size + 4 * q + 2 * hidden * size)
    if way == "efficient":
        # dq's sums for a run's documents, each as long as its longest; k, v, dk and dv with as many heads as q, and o.
        attention += 4 * q * (max(2 * tokens, padded_room) - tokens) + tokens * 5 * q * size
    gradient_stream = 2 * tokens * hidden * size
    return again + gradient_stream + max(mlp, attention)


def _head_bytes(layer: LayerComputation, tokens: int, head_tokens: int, vocabulary: int) -> int:
    size = layer.dtype.itemsize
    return min(head_tokens, tokens) * vocabulary * size + 4 * tokens * layer.down.outputs * size


@dataclass(frozen=True)
class _Shape:
    """What the cost model knows of a model and a micro-batch."""

    layer: LayerComputation
    layers: int
    tokens: int
    vocabulary: int
    way: Way

    @property
    def weights(self) -> int:
        """Bytes of one layer's weights in the compute dtype."""
        return sum(site.kept_bytes for site in self.layer.sites)

    def added_seconds(self, plan: MemoryPlan) -> float:
        """Time that the plan adds to the products of a forward and a backward that keep everything."""
        qkv, o, gate_up, down = (site.inputs * site.outputs for site in self.layer.sites)
        again = {Keep.INPUT: qkv + o + gate_up, Keep.ATTENTION: gate_up, Keep.GATES: 0, Keep.ALL: 0}
        # Attention's own products and the elementwise passes are about an eighth of the projections' time.
        extra = {Keep.INPUT: 1.25, Keep.ATTENTION: 1.1, Keep.GATES: 1.0, Keep.ALL: 1.0}
        elementwise = {Keep.GATES: 0.01, Keep.ALL: 0.0}
        products = 2.0 * self.tokens / _FLOPS
        parts = -(-self.tokens // plan.part_tokens)
        added = 0.0
        for index, keep in enumerate(plan.keep):
            added += products * again[keep] * extra[keep]
            added += products * (qkv + o + gate_up + down) * elementwise.get(keep, 0.01)
            if index >= plan.kept_weights:
                uses = 2 + (keep < Keep.ATTENTION) + (keep < Keep.GATES)
                added += parts * uses * self.weights / _DEQUANTIZED / 1.5
        attention = 2 * products * self.layers * (qkv + o) * _FILL / min(plan.part_tokens, self.tokens)
        mlp = 2 * products * self.layers * (gate_up + down) * _FILL / min(plan.mlp_tokens, plan.part_tokens)
        hidden = self.layer.down.outputs
        head = 2 * products * self.vocabulary * hidden * _FILL / min(plan.head_tokens, plan.part_tokens)
        added += attention + mlp + head
        if self.way == "efficient" and not plan.padded_room:  # no graph: the device may wait for the host
            device = 2 * products * self.layers * (qkv + o + gate_up + down) + added
            added += max(0.0, parts * self.layers * _LAUNCHES - device)
        return added

    def filled(
        self, part_tokens: int, mlp_tokens: int, head_tokens: int, padded_room: int, budget: float
    ) -> MemoryPlan:
        """The plan with these sizes that keeps as much as the budget has room for."""
        first, count = self.layer, self.layers

        def kept_by(level: Keep) -> int:
            return layer_bytes(first, part_tokens, level, self.way, padded_room)

        scratch = sum(site.kept_bytes for site in first.sites)
        work = working_bytes(first, part_tokens, mlp_tokens, self.way, padded_room)
        fixed = max(work, _head_bytes(first, part_tokens, head_tokens, self.vocabulary)) + scratch
        room = budget - fixed - count * kept_by(Keep.INPUT)
        keep = [Keep.INPUT] * count

        def raise_layers(level: Keep) -> None:
            nonlocal room
            cost = kept_by(level) - kept_by(Keep(level - 1))
            # The last layers' backward comes first, so what they keep is given back soonest.
            for index in reversed(range(count)):
                if keep[index] == level - 1 and cost <= room:
                    keep[index] = level
                    room -= cost

        raise_layers(Keep.ATTENTION)
        kept_weights = count if self.weights == 0 else int(min(count, max(0.0, room) // self.weights))
        room -= kept_weights * self.weights
        raise_layers(Keep.GATES)
        raise_layers(Keep.ALL)
        kept = sum(map(kept_by, keep))
        nbytes = fixed + kept + kept_weights * self.weights
        return MemoryPlan(tuple(keep), kept_weights, part_tokens, mlp_tokens, head_tokens, padded_room, nbytes)


def _sizes(tokens: int, longest: int, padded: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Parts of 1, 1/2, 1/4, … of the documents, and chunks within them: (part, MLP, head, attention's) tokens."""
    documents = max(1, tokens // longest)
    parts = {tokens} | {max(1, documents >> shift) * longest for shift in range(1, 12)}
    for part in parts:
        for chunk in _CHUNKS:
            for head in _HEAD_CHUNKS:
                for padded_room in padded:
                    yield min(part, tokens), min(chunk, part), head, padded_room


def plan_memory(
    layers: Sequence[LayerComputation],
    tokens: int,
    vocabulary: int,
    budget: float = math.inf,
    *,
    longest: int | None = None,
    way: Way = "varlen",
) -> MemoryPlan:
    """The fastest plan within ``budget`` bytes, the model itself not counted; the smallest one if none fits.

    Args:
        layers: The fused layers, all of one shape.
        tokens: Tokens in a micro-batch.
        vocabulary: Rows of the head.
        budget: Bytes for everything but the model's own tensors.
        longest: Tokens in the longest document; a part can't be smaller.
        way: How attention is computed.
    """
    shape = _Shape(layers[0], len(layers), tokens, vocabulary, way)
    padded = (_SUMS // (4 * layers[0].heads * layers[0].head_dim), 0) if way == "efficient" else (0,)
    sizes = dict.fromkeys(_sizes(tokens, min(tokens, longest or tokens), padded))
    plans = [shape.filled(*size, budget) for size in sizes]
    fitting = [plan for plan in plans if plan.nbytes <= budget]
    if not fitting:
        return min(plans, key=lambda plan: plan.nbytes)
    return min(fitting, key=shape.added_seconds)
