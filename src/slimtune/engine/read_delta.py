"""Reads a layer's gated delta rule (Transformers' ``Qwen3NextGatedDeltaNet`` and its like); changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slimtune.engine.kernels.delta import DeltaHeads
from slimtune.engine.read_linear import is_bare
from slimtune.engine.structure import CannotFuse, GatedDelta, Norm, Projection

__all__ = ["input_names", "read_delta"]

_BY_KEY_HEAD = ("in_proj_qkvz", "in_proj_ba")
_SIDE_BY_SIDE = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")


def input_names(module: Any) -> Sequence[str]:
    """Names of the projections that read the stream: Qwen3-Next's, or Qwen3.5's."""
    return _BY_KEY_HEAD if hasattr(module, _BY_KEY_HEAD[0]) else _SIDE_BY_SIDE


def read_delta(name: str, module: Any, inputs: Projection, out: Projection, norm: Norm, *, frozen: bool) -> GatedDelta:
    """The rule of a layer of this name, from its module, its projections and its norm as they were read.

    Raises:
        CannotFuse: Its sizes don't come out, or it has or trains what the engine doesn't compute.
    """
    sizes = module.num_k_heads, module.num_v_heads, module.head_k_dim, module.head_v_dim
    heads, conv = DeltaHeads(*map(int, sizes)), module.conv1d
    mixed, values = sum(heads.columns), heads.columns[2]
    if not is_bare(conv):
        raise CannotFuse(f"{name} has an adapter on its convolution")
    expected = mixed + values + 2 * heads.values, values, (mixed, 1)
    found = inputs.out_features, out.in_features, tuple(conv.weight.shape[:2])
    if found != expected or heads.values % heads.keys:
        raise CannotFuse(f"{name} has projections that don't make {heads.values} value heads of {heads.value_dim}")
    if module.activation != "silu":
        raise CannotFuse(f"{name} has a state whose inputs go through {module.activation}")
    if frozen and any(each.requires_grad for each in (*conv.parameters(), module.A_log, module.dt_bias)):
        raise CannotFuse(f"{name} trains its decays or its convolution, which the fused engine keeps frozen")
    return GatedDelta(
        inputs=inputs,
        out=out,
        heads=heads,
        conv=conv.weight.detach()[:, 0],
        conv_bias=None if conv.bias is None else conv.bias.detach(),
        a_log=module.A_log.detach(),
        dt_bias=module.dt_bias.detach(),
        norm=replace(norm, offset=0.0),  # other than the layers' own, it keeps its weight around one
        by_key_head=hasattr(module, _BY_KEY_HEAD[0]),
    )
