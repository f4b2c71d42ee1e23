"""What the engine computes with: a decoder as layers of residual branches, each of one or more blocks.

    branch:  x = carry x + scale x norm_after(block(norm(x)) + …)

Descriptions alone: :mod:`slimtune.engine.read` makes them of a model, :mod:`slimtune.engine.blocks` computes them. They
hold the model's own modules and change nothing. What differs between families stands in the fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimtune.engine.kernels.delta import DeltaHeads
from slimtune.engine.kernels.mlp import Activation, Clamped
from slimtune.engine.kernels.router import Choice
from slimtune.errors import UserError

__all__ = [
    "Activation",
    "Adapter",
    "Branch",
    "CannotFuse",
    "Clamped",
    "Decoder",
    "ExpertStack",
    "Experts",
    "GatedDelta",
    "GatedMlp",
    "Layer",
    "Linear",
    "Norm",
    "Part",
    "PerLayerGate",
    "PerLayerInputs",
    "Projection",
    "Rotary",
    "Router",
    "ScoresKind",
    "SelfAttention",
]


class CannotFuse(UserError):
    """The engine can't compute this model or module; the message says why. It trains unfused all the same."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One plain LoRA adapter: y += scaling x B A dropout(x) (Hu et al. 2021, arXiv:2106.09685)."""

    a: nn.Parameter
    """[r, in_features]."""
    b: nn.Parameter
    """[out_features, r]."""
    scaling: float
    dropout: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class Linear:
    """A frozen linear layer and its adapter, if it has one."""

    name: str
    base: Any
    """The linear layer itself; ``weight`` is [out_features, in_features], or 4-bit with a ``quant_state``."""
    wrapper: Any
    """PEFT's layer around it, or ``base`` where there is none."""
    adapter: Adapter | None
    in_features: int
    out_features: int

    @property
    def bias(self) -> Tensor | None:
        """[out_features]."""
        bias = self.base.bias
        return bias if isinstance(bias, Tensor) else None


@dataclass(frozen=True, eq=False)
class Projection:
    """Linear layers that share their input, computed as one: q, k, v; gate and up; or a single one."""

    linears: tuple[Linear, ...]

    @property
    def in_features(self) -> int:
        """Width of the shared input."""
        return self.linears[0].in_features

    @property
    def out_features(self) -> int:
        """Width of all outputs side by side."""
        return sum(linear.out_features for linear in self.linears)

    @property
    def adapted(self) -> tuple[Linear, ...]:
        """Those with an adapter."""
        return tuple(linear for linear in self.linears if linear.adapter is not None)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Their adapters, in the same order."""
        return tuple(linear.adapter for linear in self.linears if linear.adapter is not None)

    @property
    def has_bias(self) -> bool:
        """Whether any of them has a bias."""
        return any(linear.bias is not None for linear in self.linears)


@dataclass(frozen=True, eq=False)
class Norm:
    """A frozen norm over the last dimension."""

    own: Tensor
    """Its module's weight [columns]; ones where that has none."""
    eps: float
    offset: float = 0.0
    """What is added to the module's weight before it multiplies: Gemma's norms keep their weights around zero."""
    centred: bool = False
    """The mean is subtracted first, as LayerNorm does; else it is an RMS norm."""
    scale: float = 1.0
    """What the result is multiplied with."""

    @cached_property
    def weight(self) -> Tensor:
        """What multiplies, offset and scale in it; the module's own without them."""
        own = self.own.detach()
        if not self.offset and self.scale == 1.0:
            return own
        return (own.to(torch.promote_types(own.dtype, torch.float32)) + self.offset) * self.scale


@dataclass(frozen=True)
class Rotary:
    """How q and k are rotated: a table of the model's own rotary module, and which columns make pairs."""

    module: Any
    """Gives cos and sin for positions."""
    layer_type: str | None
    """The module's second argument, where tables differ by it."""
    dim: int
    """Columns of a head that are rotated, from the first; the others pass."""
    interleaved: bool
    """Neighbouring columns are pairs; else column i and i + dim / 2."""
    growth: tuple[float, int] | None = None
    """(β, P): the rotated query of position p is multiplied with 1 + β log(1 + ⌊p / P⌋) (Llama 4)."""


class ScoresKind(NamedTuple):
    """What decides how attention can be computed."""

    head_dim: int
    softcap: float | None = None
    sinks: bool = False


@dataclass(frozen=True, eq=False)
class SelfAttention:
    """o(attention(qkv(x))), causal, inside each document."""

    qkv: Projection
    o: Projection
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """What the scores are multiplied with."""
    window: int | None
    """Sliding attention window in tokens; None: all tokens before."""
    rotary: Rotary | None
    """None: positions don't enter."""
    softcap: float | None = None
    """Scores are softcap x tanh(score / softcap)."""
    sinks: Tensor | None = None
    """[heads], a logit of each that takes its share of the softmax and gives no value; frozen."""
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_norm: Norm | None = None
    norms_rows: bool = False
    """The norms go over all heads of a token at once; else over each head."""
    keys_are_values: bool = False
    """qkv has no v: the keys as projected are the values too."""
    gated: bool = False
    """Each query head's gate stands beside it in qkv's first part; its sigmoid multiplies what attention gives."""
    lends: str | None = None
    """Later layers take its keys and values by this name, and its gradients of them are theirs too."""
    borrows: str | None = None
    """qkv is q alone: keys and values are those lent by this name."""

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """In the order of computation."""
        return self.qkv, self.o

    @property
    def kind(self) -> ScoresKind:
        """What decides how its scores can be computed."""
        return ScoresKind(self.head_dim, self.softcap, self.sinks is not None)


@dataclass(frozen=True, eq=False)
class GatedDelta:
    """out(norm(rule(conv(mixed), a, b)) x silu(z)), where mixed, z, b, a are the inputs' product (Qwen3-Next)."""

    inputs: Projection
    """mixed (all q, all k, all v), z, b, a, one after the other."""
    out: Projection
    heads: DeltaHeads
    conv: Tensor
    """[columns of mixed, taps], followed by silu."""
    conv_bias: Tensor | None
    a_log: Tensor
    """[value heads]."""
    dt_bias: Tensor
    """[value heads]; a token's decay is exp(-exp(a_log) softplus(a + dt_bias))."""
    norm: Norm
    """Of each value head."""
    by_key_head: bool = False
    """The product has q, k, v, z of one key head after the other, then b, a likewise."""

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """In the order of computation."""
        return self.inputs, self.out


@dataclass(frozen=True, eq=False)
class GatedMlp:
    """down(act(gate) x up), or that times a weight of the token's own."""

    gate_up: Projection
    """All gates, then all ups."""
    down: Projection
    activation: Activation
    weigher: Linear | None = None
    """[1, H], without an adapter: the sigmoid of what it gives multiplies the token's result."""

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """In the order of computation."""
        return self.gate_up, self.down


@dataclass(frozen=True, eq=False)
class PerLayerGate:
    """projection(act(gate(x)) x p), p the layer's part of the per-layer inputs."""

    gate: Projection
    projection: Projection
    activation: Activation
    index: int
    """The layer's."""

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """In the order of computation."""
        return self.gate, self.projection


@dataclass(frozen=True, eq=False)
class PerLayerInputs:
    """norm(projection(x)) + scale x embedding(tokens), [T, layers, width]; x the embedded tokens."""

    embedding: Any
    """Its ``weight`` is [vocabulary, layers x width]."""
    projection: Projection
    norm: Norm
    scale: float
    layers: int
    width: int


@dataclass(frozen=True, eq=False)
class ExpertStack:
    """A matrix for each of E experts, [E, out_features, in_features], frozen; 16 or 32 bits, NF4 or MXFP4."""

    name: str
    owner: Any
    """The module whose parameter it is."""
    parameter: str
    experts: int
    in_features: int
    out_features: int
    wrapper: Any
    """PEFT's layer around the parameter, or ``owner`` where there is none."""
    adapter: Adapter | None = None
    """PEFT's ``target_parameters`` form: A is [E r, in_features], B [out_features, r E] with the expert fastest."""
    bias: Tensor | None = None
    """[E, out_features], added to each expert's result; frozen."""
    transposed: bool = False
    """The parameter is [E, in_features, out_features]."""

    @property
    def weight(self) -> Any:
        """The parameter."""
        return getattr(self.owner, self.parameter)


@dataclass(frozen=True, eq=False)
class Router:
    """What chooses each token's experts, and their weights; frozen."""

    weight: Tensor
    """[E, H]."""
    choice: Choice
    wide: bool
    """Logits are computed in float32 whatever the dtype."""
    bias: Tensor | None = None
    """[E], added to the scores where experts are chosen."""
    logits_bias: Tensor | None = None
    """[E], added to the logits."""
    expert_scale: Tensor | None = None
    """[E], what each expert's weight is multiplied with at last."""
    norm: Norm | None = None
    """Its own, of the block's input."""


@dataclass(frozen=True, eq=False)
class Experts:
    """Sum over each token's experts e of w_e x down_e(act(gate_e) x up_e)."""

    router: Router
    gate_up: ExpertStack
    """All gates, then all ups, of each expert, unless they alternate."""
    down: ExpertStack
    activation: Activation
    interleaved: bool = False
    """Each gate is followed by its up."""
    norm: Norm | None = None
    """Of what the experts read, where the router reads the block's input by a norm of its own."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """None: an expert stack is no linear layer."""
        return ()

    @property
    def stacks(self) -> tuple[ExpertStack, ...]:
        """In the order of computation."""
        return self.gate_up, self.down


Part = SelfAttention | GatedDelta | GatedMlp | Experts | PerLayerGate
"""What a block computes."""


@dataclass(frozen=True, eq=False)
class Branch:
    """x = carry x + scale x norm_after(sum of its blocks of norm(x))."""

    norm: Norm | None
    """None: the blocks take x itself."""
    blocks: tuple[Part | Branch, ...]
    """A branch among them has norms of its own."""
    norm_after: Norm | None = None
    scale: float = 1.0
    carry: float | None = 1.0
    """None: nothing of the stream passes, as in a branch that is a block of another."""

    @property
    def parts(self) -> Iterator[Part]:
        """Its blocks, and those of branches among them."""
        for block in self.blocks:
            yield from block.parts if isinstance(block, Branch) else (block,)


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer."""

    index: int
    module: nn.Module
    branches: tuple[Branch, ...]

    @property
    def projections(self) -> tuple[Projection, ...]:
        """In the order of computation."""
        return tuple(projection for part in self.parts for projection in part.projections)

    @property
    def attention(self) -> SelfAttention | None:
        """The layer's attention; None where it mixes tokens by a state."""
        return next((part for part in self.parts if isinstance(part, SelfAttention)), None)

    @property
    def hidden(self) -> int:
        """Width of the stream."""
        return self.projections[0].in_features

    @property
    def parts(self) -> Iterator[Part]:
        """All blocks."""
        for branch in self.branches:
            yield from branch.parts


@dataclass(frozen=True, eq=False)
class Decoder:
    """A causal language model as the engine sees it."""

    model: Any
    """The Transformers model inside PEFT's wrapping (LlamaForCausalLM, …)."""
    backbone: Any
    """Its decoder (LlamaModel, …)."""
    layers: tuple[Layer | None, ...]
    """None where a layer can't be fused; the reason is in ``unfused``."""
    norm: Norm
    """Before the head; what the head's result is multiplied with stands in its scale."""
    embedding_scale: float = 1.0
    """What the embedded tokens are multiplied with."""
    softcap: float | None = None
    """Logits are softcap x tanh(logits / softcap)."""
    per_layer: PerLayerInputs | None = None
    """What layers get of the tokens beside the stream."""
    unfused: dict[str, str] = field(default_factory=dict)
    """Reasons, by module name."""

    @property
    def head(self) -> Tensor:
        """The head's weight [vocabulary, hidden]; the embedding itself in a tied model."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def fused(self) -> tuple[Layer, ...]:
        """The layers that can be fused."""
        return tuple(layer for layer in self.layers if layer is not None)

    @property
    def attentions(self) -> tuple[SelfAttention, ...]:
        """Of all layers that have one."""
        return tuple(layer.attention for layer in self.fused if layer.attention is not None)

    @property
    def scores(self) -> tuple[ScoresKind, ...]:
        """Every kind of attention that a layer has."""
        return tuple(dict.fromkeys(part.kind for part in self.attentions))

    def stacks(self) -> Iterator[ExpertStack]:
        """Every expert stack of the fused layers."""
        for layer in self.fused:
            for part in layer.parts:
                if isinstance(part, Experts):
                    yield from part.stacks

    @property
    def adapters(self) -> Iterator[Adapter]:
        """Every adapter that is computed."""
        for linear in self.linears():
            if linear.adapter is not None:
                yield linear.adapter
        for stack in self.stacks():
            if stack.adapter is not None:
                yield stack.adapter

    def linears(self) -> Iterator[Linear]:
        """Every linear layer that is computed."""
        for layer in self.fused:
            for projection in layer.projections:
                yield from projection.linears
        if self.per_layer is not None:
            yield from self.per_layer.projection.linears
