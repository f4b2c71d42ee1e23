"""Reads a model instance, wrapped by PEFT or not, into what the engine computes with; changes nothing.

PEFT's layers are known by their attributes (``base_layer``, ``lora_A``, …), so this module imports no PEFT, and
bitsandbytes' 4-bit weights by their ``quant_state``. What the modules tell (biases, norms of q and k, windows, merged
projections) is read off them; the rest is the family's :class:`~slimtune.families.decoders.DecoderForm`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimtune.config import Config
from slimtune.engine.genuine import altered, is_own, registered
from slimtune.engine.read_delta import input_names, read_delta
from slimtune.engine.read_experts import read_experts
from slimtune.engine.read_linear import FLOATS, is_bare, nothing_else, read_activation, read_linear
from slimtune.engine.structure import (
    Branch,
    CannotFuse,
    Decoder,
    Experts,
    GatedDelta,
    GatedMlp,
    Layer,
    Linear,
    Norm,
    Part,
    PerLayerGate,
    PerLayerInputs,
    Projection,
    Rotary,
    SelfAttention,
)
from slimtune.families import decoder_of
from slimtune.families.decoders import DECODERS, BranchForm, DecoderForm
from slimtune.families.rotation import STATIC_ROPE, rope_types

__all__ = ["EIGHT_BIT_ADAMW", "check_values", "fits", "fits_options", "read_decoder"]

EIGHT_BIT_ADAMW = frozenset({"paged_adamw_8bit", "adamw_8bit", "adamw_bnb_8bit"})
"""The optimizers that the engine runs in one launch."""

_MLPS = (
    (("gate_proj", "up_proj"), "down_proj", "act_fn"),
    (("gate_up_proj",), "down_proj", "activation_fn"),
    (("input_linear",), "output_linear", "activation"),
)
"""What the modules of a gated MLP are called: gate and up, one after the other or in one; down; the activation."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "v_norm", "sinks")
"""What is read of an attention."""
_SHARED = ("shared_experts", "shared_expert")
"""What experts that every token has are called."""
_PLAIN = "It trains unfused: engine: plain."


def fits_options(config: Config) -> str | None:
    """Why the engine has nothing for what a run's config asks, whatever its model is; None if it has."""
    unknown = {
        "DoRA": config.dora,
        "modules_to_save": bool(config.modules_to_save),
        "rows of added tokens that train": config.add_tokens is not None,
        "other ranks for some modules": bool(config.rank_pattern or config.alpha_pattern),
        "a router's auxiliary loss": config.router_aux_loss is not None,
        f"optimizer {config.optim}": config.optim not in EIGHT_BIT_ADAMW and config.optim != "auto",
    }
    return next((f"the engine has nothing for {what}" for what, is_so in unknown.items() if is_so), None)


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
    computed = {id(linear.base) for linear in decoder.linears()} | {id(stack.owner) for stack in decoder.stacks()}
    beside = next((name for name in adapted or () if id(model.get_submodule(name)) not in computed), None)
    if beside is not None:
        return f"the engine has no adapter on {beside}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the engine computes on one device, and the model lies on several"
    return "there is no adapter to train" if adapted is not None and not adapted else None


def check_values(model: nn.Module) -> None:
    """See that a model can be computed. What is only planned lies on the meta device, and is read all the same.

    Raises:
        CannotFuse: A weight has no values.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CannotFuse("some of the model's weights have no values", way_out="Load it first, whole, on one device.")


def read_decoder(model: nn.Module) -> Decoder:
    """Describe ``model``, which may be wrapped by PEFT.

    Raises:
        CannotFuse: It is of no family that the engine knows, has nothing to train, or trains something besides LoRA.
    """
    wrapped: Any = model
    if getattr(getattr(wrapped, "active_peft_config", None), "is_prompt_learning", False):
        raise CannotFuse("the model learns a prompt", rule="The fused engine computes LoRA adapters.")
    decoder = _describe(wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped, frozen=True)
    if not any(decoder.adapters):
        raise CannotFuse(
            "the model has no LoRA adapter that trains", way_out="Wrap it first: peft.get_peft_model(model, config)."
        )
    return decoder


def _describe(inner: Any, *, frozen: bool) -> Decoder:
    """The model as the engine sees it; ``frozen``: PEFT has wrapped it, and nothing but adapters may train.

    Raises:
        CannotFuse: No layer of it is one that the engine computes.
    """
    name = type(inner).__name__
    if not isinstance(inner, PreTrainedModel):
        raise CannotFuse(f"{name} is no model of Transformers'", way_out="Hand over the model that it holds.")
    backbone = decoder_of(inner)
    config = backbone.config
    form = DECODERS.get(config.model_type)
    if form is None:
        raise CannotFuse(
            f"the engine doesn't know models of type {config.model_type}",
            rule=f"It knows {', '.join(sorted(DECODERS))}.",
            way_out=_PLAIN,
        )
    if not type(inner).__module__.startswith("transformers.models."):
        raise CannotFuse(f"{name} is code of its own", rule="The fused engine computes what Transformers' classes do.")
    around = ((path, part) for path, part in backbone.named_modules() if not path.startswith("layers."))
    own = altered(around, backbone)
    if own is not None:
        raise CannotFuse(
            f"{own}, which is part of {name}", rule="The fused engine computes what Transformers' classes do."
        )
    for what, is_so in _foreign(inner, backbone, form).items():
        if is_so:
            raise CannotFuse(f"the engine computes no {name} with {what}")
    if not is_own(backbone.norm, backbone):
        raise CannotFuse(f"{name} has a {type(backbone.norm).__name__} for its norm")
    layers: list[Layer | None] = []
    unfused: dict[str, str] = {}
    lent: set[str | None] = {None}
    for index, module in enumerate(backbone.layers):
        try:
            layer = _Reader(index, module, backbone, form, frozen=frozen).layer()
            if layer.attention is not None:
                if layer.attention.borrows not in lent:
                    raise CannotFuse(f"layers.{index} takes the keys of a layer that isn't computed")
                lent.add(layer.attention.lends)
            layers.append(layer)
        except CannotFuse as refusal:
            layers.append(None)
            unfused[f"layers.{index}"] = refusal.what
    if not any(layers):
        raise CannotFuse(
            f"no layer of {name} can be fused: {next(iter(unfused.values()), 'it has none')}", way_out=_PLAIN
        )
    return Decoder(
        model=inner,
        backbone=backbone,
        layers=tuple(layers),
        norm=_norm(
            backbone.norm,
            backbone.norm.weight,
            form,
            scale=_times(inner, form.logits_times, config) / _times(config, form.logits_over, config),
        ),
        embedding_scale=_embedding_scale(backbone, form),
        softcap=_cap(config, "final_logit_softcapping"),
        per_layer=_per_layer_inputs(backbone, form, frozen=frozen),
        unfused=unfused,
    )


def _per_layer_inputs(backbone: Any, form: DecoderForm, *, frozen: bool) -> PerLayerInputs | None:
    """What layers get of the tokens beside the stream (``Gemma4TextModel.project_per_layer_inputs``).

    Raises:
        CannotFuse: Its table or norm trains, or its projection is none that the engine reads.
    """
    table = getattr(backbone, "embed_tokens_per_layer", None)
    if table is None:
        return None
    over = backbone.per_layer_projection_norm
    # The embedded tokens' gradient by way of the layers' inputs is never made.
    for part in (table, over, backbone.embed_tokens):
        if not is_bare(part) or (frozen and any(p.requires_grad for p in part.parameters())):
            raise CannotFuse(
                "an embedding or a norm that per-layer inputs are made of trains; the engine keeps it frozen"
            )
    width, layers = int(over.weight.shape[0]), len(backbone.layers)
    linear = read_linear("per_layer_model_projection", backbone.per_layer_model_projection, frozen=frozen)
    if (linear.out_features, int(table.weight.shape[1])) != (layers * width, layers * width):
        raise CannotFuse(f"per-layer inputs that aren't {width} wide for each of {layers} layers")
    both, before = float(backbone.per_layer_input_scale), float(backbone.per_layer_model_projection_scale)
    plain = _norm(over, over.weight, form, scale=both)
    return PerLayerInputs(
        embedding=table,
        projection=Projection((linear,)),
        # A norm of what was scaled is the norm of what wasn't, with another eps.
        norm=replace(plain, eps=plain.eps / before**2),
        scale=both * _root(width, table.weight.dtype),
        layers=layers,
        width=width,
    )


def _foreign(inner: Any, backbone: Any, form: DecoderForm) -> dict[str, bool]:
    """What a family's configs can ask for, or somebody did to a model, and the engine doesn't compute."""
    config, function = backbone.config, registered(backbone.config)
    scale = _times(inner, form.logits_times, config) / _times(config, form.logits_over, config)
    changed = scale != 1.0 or _cap(config, "final_logit_softcapping") is not None
    ropes = rope_types(config)
    return {
        f"{function} for its attention or its experts, which isn't Transformers' own": function is not None,
        f"{len(backbone.layers)} layers, of which its config counts fewer": (
            len(backbone.layers) > getattr(config, "num_hidden_layers", len(backbone.layers))
        ),
        "layers of different sizes": getattr(config, "is_heterogeneous", False) and not form.sizes_by_layer,
        f"rotary embedding {', '.join(map(repr, sorted(ropes - STATIC_ROPE)))}": bool(ropes - STATIC_ROPE),
        "attention to tokens to come": getattr(config, "use_bidirectional_attention", None) in (True, "all"),
        "dropout on attention weights": bool(getattr(config, "attention_dropout", 0.0)),
        "dropout on what a layer adds": any(
            getattr(config, part, 0.0) for part in ("residual_dropout", "resid_pdrop", "embd_pdrop")
        ),
        "clipped queries and keys": getattr(config, "clip_qkv", None) is not None,
        "no head over a vocabulary": inner.get_output_embeddings() is None,
        "an adapter or a bias on the head": not _plain_head(inner),
        # Some classes around a text model leave out what the text model's own class does to logits, some don't.
        f"a text model inside whose config scales or caps logits ({config.model_type})": (
            changed and inner.config.model_type not in (config.model_type, *form.same_inside)
        ),
    }


def _cap(owner: Any, name: str) -> float | None:
    cap = getattr(owner, name, None)
    if cap is not None and not cap > 0:
        raise CannotFuse(f"{name} of {cap}: the engine's caps are above 0")
    return None if cap is None else float(cap)


def _times(owner: Any, name: str | None, config: Any) -> float:
    """A factor, which a module may have taken over from the config when it was made."""
    return 1.0 if name is None else float(getattr(owner if hasattr(owner, name) else config, name))


def _embedding_scale(backbone: Any, form: DecoderForm) -> float:
    if not form.scaled_embedding:
        return _times(backbone, form.embedding_times, backbone.config)
    return _root(backbone.config.hidden_size, backbone.get_input_embeddings().weight.dtype)


def _root(size: int, dtype: torch.dtype) -> float:
    """A size's root, rounded to a dtype."""
    return torch.tensor(size**0.5, device="cpu").to(dtype).item()


def _plain_head(inner: Any) -> bool:
    head: Any = inner.get_output_embeddings()
    return (
        is_bare(head)
        and type(head) is nn.Linear
        and getattr(head, "bias", None) is None
        and head.weight.dtype in FLOATS
    )


def _norm(module: Any, weight: Tensor, form: DecoderForm, *, scale: float = 1.0) -> Norm:
    eps = getattr(module, "variance_epsilon", None)
    return Norm(weight, float(module.eps if eps is None else eps), form.norm_offset, form.centred, scale)


class _Reader:
    """Reads one decoder layer."""

    def __init__(self, index: int, module: Any, backbone: Any, form: DecoderForm, *, frozen: bool) -> None:
        self.index, self.module, self.backbone, self.form, self.frozen = index, module, backbone, form, frozen
        self.config, self.name = backbone.config, f"layers.{index}"

    def layer(self) -> Layer:
        """The layer.

        Raises:
            CannotFuse: It has something that the engine doesn't compute.
        """
        own = altered(self.module.named_modules(prefix=self.name), self.backbone)
        if own is not None:
            raise CannotFuse(own)
        nothing_else(self.name, self.module, {name for branch in self.form.branches for name in branch.names})
        *before, last = (
            form
            for form in self.form.branches
            if (form.where is None or hasattr(self.module, form.where))
            and (form.unless is None or not hasattr(self.module, form.unless))
        )
        branches = *(self._branch(branch) for branch in before), self._branch(last, self._layer_times())
        layer = Layer(self.index, self.module, branches)
        for projection in layer.projections:
            if len({adapter.dropout for adapter in projection.adapters}) > 1:
                raise CannotFuse(f"{self.name} has adapters of different dropout on one input")
        return layer

    def _layer_times(self) -> float:
        """What the layer's result is multiplied with; where weights have no values, nothing is computed with it."""
        times: Any = 1.0 if self.form.layer_times is None else getattr(self.module, self.form.layer_times)
        return 1.0 if getattr(times, "is_meta", False) else float(times)

    def _branch(self, branch: BranchForm, times: float = 1.0) -> Branch:
        """A branch; ``times``: what its result is multiplied with, the stream in it."""
        blocks = [block for each in branch.blocks for block in self._blocks(each)]
        if not blocks:
            raise CannotFuse(f"{self.name} has no {' and no '.join(map(str, branch.blocks))}")
        over = None if branch.norm is None else self._norm(self.module, branch.norm)
        if isinstance(blocks[0], Experts) and blocks[0].router.norm is not None:  # it reads what the branch gets
            blocks, over = [replace(blocks[0], norm=over)], None
        after = branch.norm_after
        return Branch(
            norm=over,
            blocks=tuple(blocks),
            norm_after=None if after is None else self._norm(self.module, after, scale=times),
            scale=_times(self.module, self.form.residual_times, self.config) * (times if after is None else 1.0),
            carry=times,
        )

    def _blocks(self, name: str | BranchForm) -> Sequence[Part | Branch]:
        """What is made of a module of the layer, or of a branch inside one."""
        if isinstance(name, BranchForm):
            return [replace(self._branch(name), carry=None)]
        part = getattr(self.module, name, None)
        if part is None:
            return []
        if not (is_own(part, self.backbone) or name.startswith("per_layer_")):  # those are linear layers
            raise CannotFuse(f"{self.name} has a {type(part).__name__} for its {name}")
        match name:
            case "experts":
                return [self._experts(part, self.module, name)]
            case "self_attn":
                return [self._attention(part)]
            case "linear_attn":
                return [self._delta(part)]
            case "per_layer_input_gate":
                return [self._per_layer_gate()]
            case "per_layer_projection":
                return []  # the gate's
        return self._feed_forward(part, name)

    def _per_layer_gate(self) -> PerLayerGate:
        return PerLayerGate(
            gate=self._own_projection("per_layer_input_gate"),
            projection=self._own_projection("per_layer_projection"),
            activation=read_activation(self.name, self.module.act_fn),
            index=self.index,
        )

    def _own_projection(self, name: str) -> Projection:
        """A linear layer of the layer's own."""
        return Projection((read_linear(f"{self.name}.{name}", getattr(self.module, name), frozen=self.frozen),))

    def _norm(self, parent: Any, name: str, *, scale: float = 1.0, like: Tensor | None = None) -> Norm:
        """A norm; ``like``: what ones are made like where it has no weight of its own."""
        module = getattr(parent, name)
        if not is_bare(module) or (self.frozen and any(p.requires_grad for p in module.parameters())):
            raise CannotFuse(f"{self.name} trains a norm, which the fused engine keeps frozen")
        if not is_own(module, self.backbone):
            raise CannotFuse(f"{self.name} has a {type(module).__name__} for its {name}")
        nothing_else(f"{self.name}.{name}", module, ("weight",))
        weight = getattr(module, "weight", None if like is None else torch.ones_like(like))
        if weight is None or weight.ndim != 1:
            raise CannotFuse(f"{self.name} has a {name} with no weight, or other weights for each head")
        return _norm(module, weight, self.form, scale=scale)

    def _attention(self, module: Any) -> SelfAttention:
        if getattr(module, "is_causal", True) is False:
            raise CannotFuse(f"{self.name} sees tokens to come")
        nothing_else(f"{self.name}.self_attn", module, _ATTENTION)
        if getattr(module, "attention_dropout", 0.0):
            raise CannotFuse(f"{self.name} has dropout on attention weights")
        names, borrows = ["q_proj", "k_proj", "v_proj"], None
        if getattr(module, "is_kv_shared_layer", False):
            names, borrows = ["q_proj"], str(module.layer_type)
        elif getattr(module, "v_proj", module) is None:
            names.remove("v_proj")
        normed, own = hasattr(module, "q_norm"), len(names) - 1
        head_dim, o = int(module.head_dim), self._projection("self_attn", module, ("o_proj",))
        heads = o.in_features // head_dim
        qkv = self._projection("self_attn", module, ["qkv_proj"] if hasattr(module, "qkv_proj") else names)
        queries = heads * (1 + self.form.gates_queries)
        kv_heads = (qkv.out_features // head_dim - queries) // own if own else heads // int(module.num_key_value_groups)
        if (
            (heads * head_dim, (queries + own * kv_heads) * head_dim) != (o.in_features, qkv.out_features)
            or kv_heads < 1
            or heads % kv_heads
        ):
            raise CannotFuse(f"{self.name} has projections that don't make whole heads of {head_dim}")
        if own == 1 and not normed:
            raise CannotFuse(f"{self.name} takes keys for values, and has no norm that makes two of them")
        if borrows and heads == 1:
            raise CannotFuse(f"{self.name} has a single query head, whose keys are another layer's")
        lends = getattr(module, "store_full_length_kv", False) and getattr(self.config, "num_kv_shared_layers", 0)
        window = self._window(module)
        return SelfAttention(
            qkv=qkv,
            o=o,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=float(module.scaling),
            window=window,
            rotary=self._rotary(head_dim) if self._is_turned(module, window) else None,
            q_norm=self._norm(module, "q_norm") if normed else None,
            k_norm=self._norm(module, "k_norm") if normed and own else None,
            v_norm=self._norm(module, "v_norm", like=module.k_norm.weight) if hasattr(module, "v_norm") else None,
            norms_rows=self.form.norms_rows,
            keys_are_values=own == 1,
            gated=self.form.gates_queries,
            lends=str(module.layer_type) if lends else None,
            borrows=borrows,
            softcap=_cap(module, "attn_logit_softcapping") if self.form.caps_scores else None,
            sinks=self._sinks(module, heads),
        )

    def _delta(self, module: Any) -> GatedDelta:
        inputs, out = (self._projection("linear_attn", module, names) for names in (input_names(module), ["out_proj"]))
        return read_delta(self.name, module, inputs, out, self._norm(module, "norm"), frozen=self.frozen)

    def _sinks(self, module: Any, heads: int) -> Tensor | None:
        sinks: Tensor | None = getattr(module, "sinks", None)
        if sinks is None:
            return None
        if self.frozen and sinks.requires_grad:
            raise CannotFuse(f"{self.name} trains its sinks, which the fused engine keeps frozen")
        if sinks.shape != (heads,):
            raise CannotFuse(f"{self.name} has sinks of shape {tuple(sinks.shape)} for {heads} heads")
        return sinks

    def _window(self, module: Any) -> int | None:
        window = getattr(self.config if self.form.window_of_all else module, "sliding_window", None)
        found = int(window) if window and getattr(module, "is_sliding", True) else None
        # Transformers' masks go by the config's types, so an attention module without a window has one all the same.
        if found is None and self._kind() == "sliding_attention":
            raise CannotFuse(f"{self.name} is of type sliding_attention, and its attention tells no window")
        masked = None if self._kind() == "full_attention" else getattr(self.config, "sliding_window", None)
        untyped = self._kind() is None and hasattr(module, "sliding_window")
        if (found is not None or untyped) and found != masked:
            raise CannotFuse(f"{self.name} has attention with a window of {found}, and its config of {masked}")
        return found

    def _kind(self) -> str | None:
        """The layer's type by the config, where that has types."""
        kinds = getattr(self.config, "layer_types", None) or ()
        return kinds[self.index] if self.index < len(kinds) else None

    def _is_turned(self, module: Any, window: int | None) -> bool:
        if not getattr(module, "use_rope", True) or self.backbone.rotary_emb is None:
            return False
        if self.form.turned == "windowed if any":
            return window is not None or getattr(module, "sliding_window", None) is None
        return self.form.turned == "all" or window is not None

    def _rotary(self, head_dim: int) -> Rotary:
        module = self.backbone.rotary_emb
        kind = self._kind()
        by_kind = getattr(module, f"{kind}_inv_freq", None)
        angles = getattr(module, "inv_freq", None) if by_kind is None else by_kind
        if angles is None:
            raise CannotFuse(f"{self.name} is rotated by a {type(module).__name__}")
        dim = 2 * int(angles.shape[0])
        if not 0 < dim <= head_dim or head_dim % 2:
            raise CannotFuse(f"{self.name} rotates {dim} columns of heads of {head_dim}")
        return Rotary(module, None if by_kind is None else kind, dim, self.form.interleaved, self._growth())

    def _growth(self) -> tuple[float, int] | None:
        if not self.form.grows_queries:
            return None
        parameters = self.config.rope_parameters
        return float(parameters["llama_4_scaling_beta"]), int(parameters["original_max_position_embeddings"])

    def _feed_forward(self, module: Any, name: str) -> list[GatedMlp | Experts]:
        """An MLP; or experts, and beside them those that every token has."""
        if self.form.router is None or not hasattr(module, "experts"):
            return [self._mlp(module, name)]
        gate = self.form.router.gate
        nothing_else(f"{self.name}.{name}", module, (gate, "experts", *_SHARED, *(f"{part}_gate" for part in _SHARED)))
        if getattr(module, "jitter_noise", 0.0):
            raise CannotFuse(f"{self.name} draws noise for its router")
        return [
            self._experts(module.experts, module, f"{name}.experts"),
            *(
                replace(self._mlp(getattr(module, part), f"{name}.{part}"), weigher=self._weigher(module, name, part))
                for part in _SHARED
                if getattr(module, part, None) is not None
            ),
        ]

    def _weigher(self, mixture: Any, name: str, part: str) -> Linear | None:
        """What weighs the shared expert of each token, where something does."""
        module = getattr(mixture, f"{part}_gate", None)
        if module is None:
            return None
        linear = read_linear(f"{self.name}.{name}.{part}_gate", module, frozen=self.frozen)
        if linear.adapter is not None or linear.bias is not None or linear.out_features != 1:
            raise CannotFuse(f"{linear.name} has an adapter or a bias, or more than one row")
        return linear

    def _experts(self, module: Any, mixture: Any, name: str) -> Experts:
        assert self.form.router is not None
        return read_experts(self.name, name, module, mixture, self.form.router, frozen=self.frozen)

    def _mlp(self, module: Any, name: str) -> GatedMlp:
        for ups, down, activation in _MLPS:
            if all(hasattr(module, part) for part in (*ups, down, activation)):
                nothing_else(f"{self.name}.{name}", module, (*ups, down))
                return GatedMlp(
                    gate_up=self._projection(name, module, ups),
                    down=self._projection(name, module, (down,)),
                    activation=read_activation(self.name, getattr(module, activation)),
                )
        raise CannotFuse(f"{self.name} has a {type(module).__name__} for a feed-forward")

    def _projection(self, owner: str, module: Any, names: Sequence[str]) -> Projection:
        linears = (
            read_linear(f"{self.name}.{owner}.{part}", getattr(module, part), frozen=self.frozen) for part in names
        )
        return Projection(tuple(linears))
