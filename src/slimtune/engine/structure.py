"""Reads a PEFT-wrapped model instance into what the engine computes with; changes nothing.

PEFT's layers are known by their attributes (``base_layer``, ``lora_A``, …), so this module imports no PEFT, and
bitsandbytes' 4-bit weights by their ``quant_state``. One description covers the Llama family as Transformers has it:
what differs between Llama, Mistral, Qwen2, Qwen3 and SmolLM2 stands in the modules (biases, q/k norms, windows).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.config import Config
from slimtune.errors import UserError

__all__ = [
    "EIGHT_BIT_ADAMW",
    "Adapter",
    "CannotFuse",
    "Decoder",
    "Layer",
    "Linear",
    "Projection",
    "fits",
    "fits_options",
    "read_decoder",
]

EIGHT_BIT_ADAMW = frozenset({"paged_adamw_8bit", "adamw_8bit", "adamw_bnb_8bit"})
"""The optimizers that the engine runs in one launch."""

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Transformers' model types whose decoder layer is the one that :mod:`slimtune.engine.decoder` computes."""
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose angles depend on the position alone, not on the longest sequence seen."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
class Layer:
    """One decoder layer: x += o(attention(qkv(norm(x)))), then x += down(silu(gate) x up of norm(x))."""

    index: int
    module: nn.Module
    attention_norm: Any
    qkv: Projection
    q_norm: Any | None
    k_norm: Any | None
    o: Projection
    mlp_norm: Any
    gate_up: Projection
    down: Projection
    window: int | None
    """Sliding attention window in tokens; None: all tokens before."""

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """In the order of computation."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, eq=False)
class Decoder:
    """A causal language model as the engine sees it."""

    model: Any
    """The Transformers model inside PEFT's wrapping (LlamaForCausalLM, …)."""
    backbone: Any
    """Its decoder (LlamaModel, …)."""
    layers: tuple[Layer | None, ...]
    """None where a layer can't be fused; the reason is in ``unfused``."""
    unfused: dict[str, str] = field(default_factory=dict)
    """Reasons, by module name."""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    hidden: int = 0
    intermediate: int = 0

    @property
    def head(self) -> Tensor:
        """The head's weight [vocabulary, hidden]; the embedding itself in a tied model."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def fused(self) -> tuple[Layer, ...]:
        """The layers that can be fused."""
        return tuple(layer for layer in self.layers if layer is not None)

    def linears(self) -> Iterator[Linear]:
        """Every linear layer of the fused layers."""
        for layer in self.fused:
            for projection in layer.projections:
                yield from projection.linears


def fits_options(config: Config) -> str | None:
    """Why the engine has nothing for what a run's config asks, whatever its model is; None if it has."""
    unknown = {
        "DoRA": config.dora,
        "biases that train": config.lora_bias != "none",
        "modules_to_save": bool(config.modules_to_save),
        "rows of added tokens that train": config.add_tokens is not None,
        "other ranks for some modules": bool(config.rank_pattern or config.alpha_pattern),
        "a router's auxiliary loss": config.router_aux_loss is not None,
        f"optimizer {config.optim}": config.optim not in EIGHT_BIT_ADAMW and config.optim != "auto",
    }
    return next((f"the engine has no {what}" for what, is_so in unknown.items() if is_so), None)


def fits(config: Config, model: nn.Module, adapted: Collection[str] | None = None) -> str | None:
    """Why the engine doesn't take this run; None if it does. The one answer, before the model is wrapped.

    What :func:`read_decoder` would refuse of the wrapped model follows from the three arguments, and is found here by
    the same code: an engine that was promised can be made.

    Args:
        config: The run's options.
        model: The base; its weights may lie on the meta device.
        adapted: Names of its modules that get an adapter; None where that isn't known yet.
    """
    reason = fits_options(config)
    if reason is not None:
        return reason
    try:
        decoder = _describe(model, frozen=False)
    except CannotFuse as refusal:
        return refusal.what
    if decoder.unfused:
        name, reason = next(iter(decoder.unfused.items()))
        return f"the engine can't compute {name}: {reason}"
    computed = {id(linear.base) for linear in decoder.linears()}
    beside = next((name for name in adapted or () if id(model.get_submodule(name)) not in computed), None)
    if beside is not None:
        return f"the engine has no adapter on {beside}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the engine computes on one device, and the model lies on several"
    return "there is no adapter to train" if adapted is not None and not adapted else None


def read_decoder(model: nn.Module) -> Decoder:
    """Describe ``model``, which may be wrapped by PEFT.

    Raises:
        CannotFuse: It isn't of the Llama family, has nothing to train, or trains something besides LoRA.
    """
    wrapped: Any = model
    if getattr(getattr(wrapped, "active_peft_config", None), "is_prompt_learning", False):
        raise CannotFuse("the model learns a prompt", rule="The fused engine computes LoRA adapters.")
    decoder = _describe(wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped, frozen=True)
    if not any(linear.adapter for linear in decoder.linears()):
        raise CannotFuse(
            "the model has no LoRA adapter that trains", way_out="Wrap it first: peft.get_peft_model(model, config)."
        )
    return decoder


def _describe(inner: Any, *, frozen: bool) -> Decoder:
    """The model as the engine sees it; ``frozen``: PEFT has wrapped it, and nothing but adapters may train.

    Raises:
        CannotFuse: No layer of it is one that the engine computes.
    """
    config, name = inner.config, type(inner).__name__
    if config.model_type not in MODEL_TYPES:
        raise CannotFuse(
            f"the engine doesn't know models of type {config.model_type}",
            rule=f"It knows {', '.join(sorted(MODEL_TYPES))}.",
            way_out="It trains unfused: engine: plain.",
        )
    if not type(inner).__module__.startswith("transformers.models."):
        raise CannotFuse(f"{name} is code of its own", rule="The fused engine computes what Transformers' classes do.")
    if getattr(config, "is_heterogeneous", False):
        raise CannotFuse(f"{name} has layers of different sizes", rule="The fused engine computes no such model.")
    backbone = inner.base_model
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    refuse = {
        f"rotary embedding {rope!r}": rope not in STATIC_ROPE,
        f"activation {config.hidden_act!r}": config.hidden_act != "silu",
        "dropout on attention weights": bool(getattr(config, "attention_dropout", 0.0)),
        "an adapter or a bias on the head": not _plain_head(inner),
    }
    for reason, is_so in refuse.items():
        if is_so:
            raise CannotFuse(f"{name} has {reason}", rule="The fused engine computes no such model.")
    layers: list[Layer | None] = []
    unfused: dict[str, str] = {}
    for index, module in enumerate(backbone.layers):
        try:
            layers.append(_read_layer(index, module, config, frozen=frozen))
        except CannotFuse as refusal:
            layers.append(None)
            unfused[f"layers.{index}"] = refusal.what
    if not any(layers):
        raise CannotFuse(
            f"no layer of {name} can be fused: {next(iter(unfused.values()), 'it has none')}",
            way_out="It trains unfused: engine: plain.",
        )
    first = backbone.layers[0].self_attn
    return Decoder(
        model=inner,
        backbone=backbone,
        layers=tuple(layers),
        unfused=unfused,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=first.head_dim,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
    )


def _plain_head(inner: Any) -> bool:
    head: Any = inner.get_output_embeddings()
    return (
        _is_bare(head)
        and type(head) is nn.Linear
        and getattr(head, "bias", None) is None
        and head.weight.dtype in _FLOATS
    )


def _is_bare(module: Any) -> bool:
    return not any(hasattr(module, part) for part in ("base_layer", "modules_to_save", "token_adapter"))


def _read_layer(index: int, module: Any, config: Any, *, frozen: bool) -> Layer:
    attention, mlp, name = module.self_attn, module.mlp, f"layers.{index}"
    linears = {
        part: _read_linear(f"{name}.{owner}.{part}", getattr(parent, part), frozen=frozen)
        for owner, parent, parts in (
            ("self_attn", attention, ("q_proj", "k_proj", "v_proj", "o_proj")),
            ("mlp", mlp, ("gate_proj", "up_proj", "down_proj")),
        )
        for part in parts
    }
    norms = [module.input_layernorm, module.post_attention_layernorm]
    norms += [getattr(attention, part) for part in ("q_norm", "k_norm") if hasattr(attention, part)]
    for norm in norms:
        if not _is_bare(norm) or (frozen and norm.weight.requires_grad):
            raise CannotFuse(f"{name} trains a norm, which the fused engine keeps frozen")
    layer = Layer(
        index=index,
        module=module,
        attention_norm=module.input_layernorm,
        qkv=Projection((linears["q_proj"], linears["k_proj"], linears["v_proj"])),
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        o=Projection((linears["o_proj"],)),
        mlp_norm=module.post_attention_layernorm,
        gate_up=Projection((linears["gate_proj"], linears["up_proj"])),
        down=Projection((linears["down_proj"],)),
        window=_window(attention, config),
    )
    for projection in layer.projections:
        if len({adapter.dropout for adapter in projection.adapters}) > 1:
            raise CannotFuse(f"{name} has adapters of different dropout on one input")
    return layer


def _window(attention: Any, config: Any) -> int | None:
    window = getattr(attention, "sliding_window", None)
    if window is None and config.model_type == "mistral":
        window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def _read_linear(name: str, module: Any, *, frozen: bool) -> Linear:
    base: Any = getattr(module, "base_layer", module)
    weight: Any = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        raise CannotFuse(f"{name} is a {type(base).__name__} without a weight")
    state = getattr(weight, "quant_state", None)
    if state is not None:
        if state.quant_type != "nf4":
            raise CannotFuse(f"{name} is quantised as {state.quant_type}, not nf4")
        if weight.dtype != torch.uint8 and not getattr(state, "packing_format_for_cpu", False):
            raise CannotFuse(f"{name} has its 4-bit codes stored as {weight.dtype}")
        out_features, in_features = state.shape
    elif type(base) is nn.Linear and type(weight) in (nn.Parameter, Tensor) and weight.dtype in _FLOATS:
        out_features, in_features = weight.shape
    else:
        raise CannotFuse(f"{name} is a {type(base).__name__} of {weight.dtype}, neither NF4 nor a 16- or 32-bit linear")
    if frozen and any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        raise CannotFuse(f"{name} trains its base weight or bias, which the fused engine keeps frozen")
    adapter = _read_adapter(name, module) if module is not base else None
    return Linear(name, base, module, adapter, int(in_features), int(out_features))


def _read_adapter(name: str, module: Any) -> Adapter | None:
    if not hasattr(module, "lora_A"):
        raise CannotFuse(f"{name} has a {type(module).__name__}, not a LoRA adapter")
    active = [key for key in module.active_adapters if key in module.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise CannotFuse(f"{name} has {len(active)} active adapters; the fused engine computes one")
    key = active[0]
    if key in module.lora_variant or module.use_dora.get(key, False):
        raise CannotFuse(f"{name} has a LoRA variant ({type(module.lora_variant.get(key)).__name__}), not plain LoRA")
    if module.merged_adapters:
        raise CannotFuse(f"{name} has its adapter merged into the base")
    a, b, dropout = module.lora_A[key], module.lora_B[key], module.lora_dropout[key]
    if b.bias is not None:
        raise CannotFuse(f"{name} has a LoRA bias")
    if not isinstance(dropout, nn.Identity | nn.Dropout):
        raise CannotFuse(f"{name} has a {type(dropout).__name__} on the adapter's input")
    return Adapter(a.weight, b.weight, float(module.scaling[key]), float(getattr(dropout, "p", 0.0)))
