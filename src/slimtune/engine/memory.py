"""Turns a memory budget into what each layer keeps, which weights stay dequantised, and how much is done at once.

All sizes are worked out from shapes before anything is allocated. Keeping costs bytes in proportion to the tokens and
saves products in proportion to the tokens, so the order in which a budget is spent hardly depends on the batch:
attention's intermediates (about 4 ms a gigabyte on an H100), then dequantised weights, then gate and up, then the
adapters' inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slimtune.engine.decoder import Keep, LayerComputation

__all__ = ["MemoryPlan", "layer_bytes", "plan_memory", "working_bytes"]

# Tried in this order until the smallest plan fits.
_MLP_TOKENS = (1 << 30, 8192, 4096, 2048, 1024, 512)
_HEAD_TOKENS = (4096, 4096, 2048, 1024, 512, 256)


@dataclass(frozen=True)
class MemoryPlan:
    """How the engine uses its memory."""

    keep: tuple[Keep, ...]
    """For each layer."""
    kept_weights: int
    """How many layers, from the first, hold their weights in the compute dtype."""
    mlp_tokens: int
    """Tokens that the MLP takes at once."""
    head_tokens: int
    """Supervised tokens that the head takes at once."""
    nbytes: int
    """What all of this is predicted to take, besides the model itself."""


def layer_bytes(layer: LayerComputation, tokens: int, keep: Keep) -> int:
    """Bytes that a layer keeps from its forward to its backward."""
    size = layer.dtype.itemsize
    columns = layer.down.outputs
    logsumexp = 0
    if keep >= Keep.ATTENTION:
        columns += layer.qkv.outputs + layer.o.inputs + layer.o.extra + layer.down.outputs
        logsumexp = 4 * (layer.heads + 2)
        if layer.layer.q_norm is not None:
            columns += (layer.heads + layer.kv_heads) * layer.head_dim
            logsumexp += 4 * (layer.heads + layer.kv_heads)
    if keep >= Keep.GATES:
        columns += layer.gate_up.outputs
    if keep >= Keep.ALL:
        columns += sum(site.inputs + site.extra for site in (layer.qkv, layer.gate_up) if site.groups)
    return tokens * (columns * size + logsumexp)


def working_bytes(layer: LayerComputation, tokens: int, mlp_tokens: int) -> int:
    """Bytes that one layer's backward takes at its peak beside what was kept, all of it computed again."""
    size = layer.dtype.itemsize
    hidden, qkv = layer.down.outputs, layer.qkv.outputs
    q = layer.heads * layer.head_dim
    again = layer_bytes(layer, tokens, Keep.ATTENTION) + tokens * (layer.qkv.inputs + layer.qkv.extra) * size
    n2 = tokens * (layer.gate_up.inputs + layer.gate_up.extra) * size
    mlp = n2 + tokens * hidden * size + mlp_tokens * (2 * layer.gate_up.outputs + 2 * layer.gate_up.outputs // 2) * size
    # FlashAttention-2's backward sums dq in float32; cuDNN's likewise. dq, dk, dv lie beside the merged gradient.
    attention = tokens * (2 * qkv * size + 2 * q * size + 4 * q + 2 * hidden * size)
    gradient_stream = 2 * tokens * hidden * size
    return again + gradient_stream + max(mlp, attention)


def _head_bytes(layer: LayerComputation, tokens: int, head_tokens: int, vocabulary: int) -> int:
    size = layer.dtype.itemsize
    return min(head_tokens, tokens) * vocabulary * size + 4 * tokens * layer.down.outputs * size


def plan_memory(
    layers: Sequence[LayerComputation], tokens: int, vocabulary: int, budget: float = math.inf
) -> MemoryPlan:
    """The fastest plan within ``budget`` bytes, the model itself not counted; the smallest one if none fits.

    Args:
        layers: The fused layers, all of one shape.
        tokens: Tokens in a micro-batch.
        vocabulary: Rows of the head.
        budget: Bytes for everything but the model's own tensors.
    """
    first, count = layers[0], len(layers)
    scratch = max(site.kept_bytes for site in first.sites)
    head_tokens = mlp_tokens = 0

    def fixed_bytes() -> int:
        work = working_bytes(first, tokens, mlp_tokens)
        return max(work, _head_bytes(first, tokens, head_tokens, vocabulary)) + 4 * scratch

    smallest = count * layer_bytes(first, tokens, Keep.INPUT)
    for mlp_choice, head_choice in zip(_MLP_TOKENS, _HEAD_TOKENS, strict=True):
        mlp_tokens, head_tokens = min(tokens, mlp_choice), head_choice
        fixed = fixed_bytes()
        if fixed + smallest <= budget:
            break
    room = budget - fixed - smallest
    keep = [Keep.INPUT] * count

    def raise_layers(level: Keep) -> None:
        nonlocal room
        # The last layers' backward comes first, so what they keep is given back soonest.
        for index in reversed(range(count)):
            cost = layer_bytes(first, tokens, level) - layer_bytes(first, tokens, keep[index])
            if keep[index] == level - 1 and cost <= room:
                keep[index] = level
                room -= cost

    raise_layers(Keep.ATTENTION)
    weights = sum(site.kept_bytes for site in first.sites)
    kept_weights = count if weights == 0 else int(min(count, max(0.0, room) // weights))
    room -= kept_weights * weights
    raise_layers(Keep.GATES)
    raise_layers(Keep.ALL)
    nbytes = fixed + sum(layer_bytes(first, tokens, level) for level in keep) + kept_weights * weights
    return MemoryPlan(tuple(keep), kept_weights, mlp_tokens, head_tokens, nbytes)
