"""Makes one PEFT-wrapped model instance fast inside anybody's own training script, and can undo it.

Two methods of the instance are shadowed by attributes of the same name: the backbone's ``forward``, and the causal
language model's where a TRL trainer gave it a fused head. No class and no other model is touched. A call that the
engine doesn't compute (generation with a cache, hidden states, arguments that it doesn't know, merged or disabled
adapters) goes to the model's own method, and so does a layer that can't be fused. A head that does more than the
engine's (a temperature, 32 bits, the mean of the logits) stays TRL's, over the fused layers.
"""

from __future__ import annotations

import inspect
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from slimtune.batch import IGNORED
from slimtune.engine.attention import Documents, choose
from slimtune.engine.blocks import RotaryTable, Sinks
from slimtune.engine.decoder import (
    Keep,
    LayerComputation,
    Pass,
    Saved,
    computations,
    per_layer_inputs,
    rotary_tables,
)
from slimtune.engine.genuine import a_hook
from slimtune.engine.loss import token_log_probs
from slimtune.engine.per_layer import PerLayerComputation
from slimtune.engine.read import check_values, read_decoder
from slimtune.engine.stored import unpack_for_training
from slimtune.engine.structure import CannotFuse, Decoder, Rotary

__all__ = ["Fusion", "fuse"]

_HEAD_TOKENS = 1024
_HEAD_OUTPUTS = frozenset({"log_probs", "entropy", "is_top1"})
_MIXED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose own layers can be called between fused ones: one mask or two, one rotary table."""
_TOWERS = frozenset({"internvl", "llava", "mistral3", "smolvlm"})
"""Types that read images too, and hand their text model nothing but embedded tokens and what they got themselves."""
_KNOWN = frozenset({
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep",
    "labels", "shift_labels", "num_items_in_batch", "fused_lm_head",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
})  # fmt: skip
"""Arguments that are read here, or that concern the head alone. With another one the model's own forward is called."""
_BOUNDARIES = ("cu_seq_lens_q", "seq_idx")
"""They repeat what position_ids say."""
_ABSENT = object()
_ASKED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What a call asks for, or else the config."""


@dataclass
class Fusion:
    """What :func:`fuse` did to a model."""

    model: nn.Module
    fused_layers: int
    unfused: dict[str, str] = field(default_factory=dict)
    """Layers that stay as they are, with the reason."""
    computed: int = 0
    """Forward calls that the engine has computed."""
    left: Counter[str] = field(default_factory=Counter)
    """Forward calls that it left to the model, by the reason; generation's are among them."""
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _active: bool = field(default=True, repr=False)

    def undo(self) -> None:
        """Give the model its own methods back. Weights and adapters were never changed.

        A method that somebody has wrapped since stays wrapped, and calls the model's own.
        """
        self._active = False
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        total = self.fused_layers + len(self.unfused)
        reasons = "".join(f"; {name} stays unfused: {reason}" for name, reason in self.unfused.items())
        return f"fused {self.fused_layers} of {total} decoder layers and the head{reasons}"


def fuse(model: nn.Module, *, keep: Keep = Keep.ATTENTION, keep_weights: bool | None = None) -> Fusion:
    """Make ``model``, wrapped by PEFT, train with slimtune's fused layers; one line after a trainer is made.

    Args:
        model: Causal language model with a LoRA adapter; usually ``trainer.model``.
        keep: What each layer keeps for its backward. It replaces gradient checkpointing, which fused layers ignore.
        keep_weights: Hold the base dequantised in the compute dtype beside its 4-bit weights: faster, 2 bytes a
            parameter. By default on a CPU only.

    Returns:
        What was swapped, and how to undo it.

    Raises:
        CannotFuse: Nothing can be fused; the message says why.
    """
    check_values(model)
    decoder = read_decoder(model)
    backbone = decoder.backbone
    if hasattr(backbone.forward, "slimtune_fusion"):
        raise CannotFuse("the model is fused already", way_out="Undo that first: Fusion.undo().")
    inside = decoder.model.config.model_type != backbone.config.model_type
    if inside and decoder.model.config.model_type not in _TOWERS:
        raise CannotFuse(
            f"{type(decoder.model).__name__} may hand its text model masks or positions of its own",
            rule=f"Of classes that read images too, {', '.join(sorted(_TOWERS))} are fused.",
            way_out="slimtune train computes its text part with the engine.",
        )
    if decoder.unfused and decoder.backbone.config.model_type not in _MIXED:
        name, reason = next(iter(decoder.unfused.items()))
        raise CannotFuse(f"{name} can't be fused: {reason}", rule="Such a model is fused whole or not at all.")
    fusion = Fusion(model, len(decoder.fused), dict(decoder.unfused))
    for linear in decoder.linears():
        unpack_for_training(linear)
        # bitsandbytes' inference kernel on a CPU would repack the weights that training reads.
        if getattr(linear.base, "support_avx512bf16_for_cpu", False):
            _shadow(fusion, linear.base, "support_avx512bf16_for_cpu", False)
    runner = _Runner(decoder, keep, decoder.head.device.type == "cpu" if keep_weights is None else keep_weights)

    own_backbone, own_model = backbone.forward, decoder.model.forward
    plain_head = not inside and _is_plain_head(own_model)

    def backbone_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not backbone:  # a deep copy of it, whose layers are its own
            return type(self).forward(self, *args, **kwargs)
        if not fusion._active:
            return own_backbone(*args, **kwargs)
        call = runner.accepts(self, args, kwargs)
        if isinstance(call, str):
            fusion.left[call] += 1
            return own_backbone(*args, **kwargs)
        fusion.computed += 1
        return runner.backbone(call)

    def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not decoder.model:
            return type(self).forward(self, *args, **kwargs)
        ours = fusion._active and plain_head and kwargs.get("fused_lm_head")
        call = runner.accepts(self, args, kwargs) if ours else "another head"
        if isinstance(call, str):
            return own_model(*args, **kwargs)
        fusion.computed += 1
        return runner.with_head(call, kwargs)

    for owner, forward in ((backbone, backbone_forward), (decoder.model, model_forward)):
        # generate() checks its arguments against the signature of forward.
        forward.__wrapped__ = type(owner).forward  # type: ignore[attr-defined]
        forward.slimtune_fusion = fusion  # type: ignore[attr-defined]
        _shadow(fusion, owner, "forward", types.MethodType(forward, owner))
    return fusion


def _shadow(fusion: Fusion, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of one instance, and remember how it was."""
    attributes = vars(owner)
    before = attributes.get(name, _ABSENT)

    def restore() -> None:
        if attributes.get(name) is not value:
            return
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    fusion._undo.append(restore)
    setattr(owner, name, value)


@dataclass(frozen=True)
class _Call:
    """A forward call that the engine computes."""

    input_ids: Tensor | None
    embedded: Tensor | None
    """[B, S, H], instead of ids [B, S]."""
    position_ids: Tensor
    """[B, S], below S."""
    attention_mask: Tensor | None
    documents: Documents


@dataclass
class BackboneOutput(BaseModelOutputWithPast):
    """Everything that one of the models' heads reads off its backbone's output; the hidden states alone are there."""

    router_logits: Any = None
    shared_kv_states: Any = None


@dataclass
class HeadOutput(ModelOutput):
    """What TRL's trainer reads from a model called with ``fused_lm_head=True`` (TRL 1.16, trainer/utils.py,
    ``FusedCausalLMOutput``): fields over positions [B, S - 1], zero where the label is -100; None: never asked for."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class _Runner:
    """Computes the calls of one fused model."""

    def __init__(self, decoder: Decoder, keep: Keep, keep_weights: bool) -> None:
        self.decoder, self.keep, self.keep_weights = decoder, keep, keep_weights
        self._layers: dict[torch.dtype, list[LayerComputation | None]] = {}
        self._per_layer: dict[torch.dtype, PerLayerComputation | None] = {}
        self._tables: dict[torch.dtype, tuple[int, dict[Rotary, RotaryTable]]] = {}
        around = [part.wrapper for parts in (decoder.linears(), decoder.stacks()) for part in parts]
        # The rest of the model is called as it is.
        self._uncalled = [part for layer in decoder.fused for part in layer.module.modules()]
        self._adapters = [(each, _adapters_of(each)) for each in around if hasattr(each, "active_adapters")]

    # -- what is computed ---------------------------------------------------------------------------------------------

    def accepts(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | str:
        """The call's inputs, or why the model's own forward has to do it."""
        ids, embedded = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if len(args) > 1:
            return "arguments by their place"
        more = self._asks_for(module, kwargs)
        if more is not None:
            return more
        if not self._adapters_active():
            return "adapters that are off, merged or others"
        hooked = a_hook(self._uncalled)
        if hooked is not None:
            return f"a hook on a {hooked}"
        for name, tensor in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            if tensor is not None and not (isinstance(tensor, Tensor) and tensor.ndim == 2):
                return f"{name} that is no matrix"
        tokens = embedded if ids is None else ids
        if tokens is None or tokens.numel() == 0 or (ids is not None and embedded is not None):
            return "no tokens, or two kinds"
        if ids is None and self.decoder.per_layer is not None:
            return "inputs_embeds"
        if positions is None and any(kwargs.get(name) is not None for name in _BOUNDARIES):
            return "document boundaries without position_ids"
        rows, length = tokens.shape[:2]
        starts = torch.zeros(rows, length, dtype=torch.bool, device=tokens.device)
        starts[:, 0] = True
        if mask is not None:
            # The tokens before a row's first real one are a document of their own; those behind its last follow it.
            real = mask.bool()
            starts[:, 1:] = real[:, 1:] & ~real[:, :-1]
            if bool((starts[:, 1:].sum(1) + real[:, 0] > 1).any()):
                return "an attention_mask with holes"
        elif positions is not None:
            starts[:, 1:] = positions.diff(dim=1) != 1
            if bool(positions.expand(rows, length)[starts].any()):
                return "position_ids of a document that don't count from 0"
        if positions is None:
            positions = torch.arange(length, device=tokens.device)
        elif mask is not None and not bool(((positions >= 0) & (positions < length)).all()):
            return "position_ids beyond the row"
        begins = torch.nonzero(starts.flatten())[:, 0].cpu()
        lengths = torch.diff(begins, append=torch.tensor([rows * length]))
        documents = _documents(tuple(lengths.tolist()), tokens.device)
        return _Call(ids, embedded, positions.expand(rows, length), mask, documents)

    def _asks_for(self, module: Any, kwargs: dict[str, Any]) -> str | None:
        """What the call wants, or may want, that the engine doesn't compute."""

        def asked(name: str, default: Any) -> Any:
            value = kwargs.get(name)
            return default if value is None else value

        if asked("use_cache", self.decoder.backbone.config.use_cache and not module.training):
            return "use_cache"
        if not asked("return_dict", module.config.return_dict):
            return "a tuple"
        wanted = (name for name in _ASKED if asked(name, getattr(module.config, name, False)))
        unknown = (
            name for name, value in kwargs.items() if name not in _KNOWN and value is not None and value is not False
        )
        return next(wanted, None) or next(unknown, None)

    def _adapters_active(self) -> bool:
        """Whether the adapters that were read are still those that the model computes with."""
        return not any(
            layer.disable_adapters or layer.merged_adapters or _adapters_of(layer) != before
            for layer, before in self._adapters
        )

    def _dtype(self) -> torch.dtype:
        device = self.decoder.head.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        first: Any = next(self.decoder.linears()).base
        state = getattr(first.weight, "quant_state", None)
        chosen: torch.dtype = first.weight.dtype if state is None else (first.compute_dtype or state.dtype)
        return chosen

    def _computations(self, dtype: torch.dtype) -> list[LayerComputation | None]:
        if dtype not in self._layers:
            layers = computations(self.decoder, dtype, self.decoder.head.device)
            for layer in layers if self.keep_weights else ():
                for block in layer.blocks if layer is not None else ():
                    block.keep_weights()
            self._layers[dtype] = layers
        return self._layers[dtype]

    def _rotary(self, positions: int, dtype: torch.dtype) -> dict[Rotary, RotaryTable]:
        """Tables of at least so many positions."""
        known, tables = self._tables.get(dtype, (0, {}))
        if known < positions:
            tables = rotary_tables(self.decoder, positions, self.decoder.head.device, dtype)
            self._tables[dtype] = positions, tables
        return tables

    # -- computing ----------------------------------------------------------------------------------------------------

    def backbone(self, call: _Call) -> BackboneOutput:
        """The backbone's output: last_hidden_state [B, S, H], after the final norm."""
        dtype, backbone = self._dtype(), self.decoder.backbone
        embedded: Tensor = backbone.embed_tokens(call.input_ids) if call.embedded is None else call.embedded
        if not hasattr(backbone.embed_tokens, "embed_scale"):  # else the module has done it
            embedded = embedded * self.decoder.embedding_scale
        training, lengths = backbone.training, call.documents.lengths
        on = Pass(
            documents=call.documents,
            ways={
                kind: choose(embedded.device, dtype, kind.head_dim, lengths, softcap=kind.softcap, sinks=kind.sinks)
                for kind in self.decoder.scores
            },
            position_ids=call.position_ids.flatten(),
            tables=self._rotary(call.position_ids.shape[1], dtype),
            # Drawn from torch's own generator, so that a script's seed decides it.
            seed=torch.randint(2**62, (), device=embedded.device) if training else None,
            mlp_tokens=call.position_ids.numel(),
        )
        x: Tensor = self._beside(call, embedded.to(dtype).flatten(0, 1), on, dtype)
        residual: Tensor | None = None
        masks: dict[str, Any] | None = None
        for index, layer in enumerate(self._computations(dtype)):
            if layer is not None:
                x, residual = _fused_layer(layer, x, residual, on, self.keep)
                continue
            masks = self._masks(call, embedded) if masks is None else masks
            summed = _summed(x, residual).view_as(embedded)
            x = self._own_layer(index, summed, call, masks).flatten(0, 1)
            residual = None
        x = _summed(x, residual)
        return BackboneOutput(last_hidden_state=backbone.norm(x.to(embedded.dtype)).view_as(embedded))

    def _beside(self, call: _Call, x: Tensor, on: Pass, dtype: torch.dtype) -> Tensor:
        """x, the embedded tokens [T, H], when the layers have their inputs beside it."""
        if self.decoder.per_layer is None:
            return x
        if dtype not in self._per_layer:
            self._per_layer[dtype] = per_layer_inputs(self.decoder, dtype, x.device)
        computation = self._per_layer[dtype]
        assert computation is not None
        table = computation.table
        assert call.input_ids is not None
        rows = nn.functional.embedding(call.input_ids.flatten().to(table.device), table).to(x.device)
        matrices = [parameter for part in computation.trained for parameter in part.parameters]
        result: Tensor = _FusedPerLayer.apply(computation, on, rows, x, *matrices)
        return result

    def _masks(self, call: _Call, embedded: Tensor) -> dict[str, Any]:
        """As the backbones' own forward makes them (transformers, modeling_qwen2.py, ``Qwen2Model.forward``)."""
        config = self.decoder.backbone.config
        # What was kept before, none here, goes by its place: its name is another in Transformers 5.24.
        arguments = (config, embedded, call.attention_mask, None)
        sliding = getattr(config, "sliding_window", None) is not None
        return {
            "full_attention": create_causal_mask(*arguments, position_ids=call.position_ids),
            "sliding_attention": create_sliding_window_causal_mask(*arguments, position_ids=call.position_ids)
            if sliding
            else None,
        }

    def _own_layer(self, index: int, hidden: Tensor, call: _Call, masks: dict[str, Any]) -> Tensor:
        backbone = self.decoder.backbone
        module = backbone.layers[index]
        window = getattr(module.self_attn, "sliding_window", None)
        if window is None and backbone.config.model_type == "mistral":
            window = backbone.config.sliding_window
        result: Tensor = module(
            hidden,
            attention_mask=masks["sliding_attention" if window else "full_attention"],
            position_ids=call.position_ids,
            use_cache=False,
            position_embeddings=backbone.rotary_emb(hidden, call.position_ids),
        )
        return result

    def with_head(self, call: _Call, kwargs: dict[str, Any]) -> HeadOutput:
        """What TRL's own fused head returns, computed for the supervised positions alone."""
        hidden = self.backbone(call).last_hidden_state
        assert hidden is not None
        labels = kwargs["shift_labels"] if kwargs.get("shift_labels") is not None else kwargs["labels"][:, 1:]
        positions = hidden[:, : labels.shape[1]]
        mask = labels != IGNORED
        head, dtype = self.decoder.head.detach(), self._dtype()
        log_probs, entropy, is_top1 = token_log_probs(
            (positions[mask] * self.decoder.norm.scale).to(dtype),
            head.to(dtype),
            labels[mask],
            _HEAD_TOKENS,
            self.decoder.softcap,
        )
        spread = {
            name: values.new_zeros(mask.shape).masked_scatter(mask, values)
            for name, values in (("log_probs", log_probs), ("entropy", entropy), ("is_top1", is_top1))
        }
        count = kwargs.get("num_items_in_batch")
        count = mask.sum().clamp(min=1) if count is None else count
        return HeadOutput(loss=-spread["log_probs"].sum() / count, **spread, label_mask=mask, aux_loss=None)


def _is_plain_head(forward: Any) -> bool:
    """Whether ``forward`` has a fused head of TRL's that asks for no more than the engine's gives.

    TRL (1.16, trainer/utils.py, ``add_fused_lm_head``) keeps what the trainer asked for in the variables of
    its function alone; a head whose variables are named otherwise is left to TRL.
    """
    asked = inspect.getclosurevars(forward).nonlocals
    return (
        asked.get("temperature") == 1
        and asked.get("cast_lm_head_to_fp32") is False
        and _HEAD_OUTPUTS.issuperset(asked.get("outputs", ("unknown",)))
    )


def _adapters_of(layer: Any) -> list[tuple[object, ...]]:
    """What a PEFT layer computes with: its active adapters, their matrices and scalings."""
    return [
        (key, id(layer.lora_A[key].weight), id(layer.lora_B[key].weight), layer.scaling[key])
        if key in layer.lora_A
        else (key,)
        for key in layer.active_adapters
    ]


def _documents(lengths: tuple[int, ...], device: torch.device) -> Documents:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Documents(lengths, ends.to(device), max(lengths))


class _FusedLayer(torch.autograd.Function):
    """One layer for autograd: (x, residual, its LoRA matrices) to the next pair."""

    @staticmethod
    def forward(
        ctx: Any, layer: LayerComputation, on: Pass, keep: Keep | None, x: Tensor, residual: Tensor | None, *own: Tensor
    ) -> tuple[Tensor, Tensor]:
        _load_adapters(layer)
        (d, m), saved = layer.forward([x] if residual is None else [x, residual], on, keep)
        ctx.layer, ctx.on, ctx.saved = layer, on, saved
        ctx.save_for_backward(*own)
        return d, m

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Any, ...]:
        # Both results are only ever used in their sum, so their gradients are the same.
        layer: LayerComputation = ctx.layer
        saved: Saved | None = ctx.saved
        if saved is None:
            raise RuntimeError("a fused layer's backward ran twice: retain_graph is not supported")
        ctx.saved = None
        _ = ctx.saved_tensors  # torch raises if a matrix was changed since the forward
        _load_adapters(layer)
        sinks = {part: part.fresh_sink() for part in layer.trained}
        dx = layer.backward(g.contiguous(), saved, ctx.on, sinks, need_dx=any(ctx.needs_input_grad[3:5]))
        return None, None, None, dx, dx if ctx.needs_input_grad[4] else None, *_matrix_gradients(layer, sinks)


class _FusedPerLayer(torch.autograd.Function):
    """The layers' inputs beside the stream x, for autograd: x passes, so that its backward is the last."""

    @staticmethod
    def forward(ctx: Any, computation: PerLayerComputation, on: Pass, rows: Tensor, x: Tensor, *own: Tensor) -> Tensor:
        _load_adapters(computation)
        computation.forward(x, rows, on)
        ctx.computation, ctx.on = computation, on
        ctx.save_for_backward(*own)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        computation: PerLayerComputation = ctx.computation
        _ = ctx.saved_tensors  # as above
        sinks = {part: part.fresh_sink() for part in computation.trained}
        if computation.trained:
            _load_adapters(computation)
            computation.backward(ctx.on, sinks)
        return None, None, None, g, *_matrix_gradients(computation, sinks)


def _matrix_gradients(computed: LayerComputation | PerLayerComputation, sinks: Sinks) -> list[Tensor]:
    """Of every LoRA matrix, in the order of its parts' parameters."""
    return [
        grad.to(parameter.dtype)
        for part in computed.trained
        for parameter, grad in zip(part.parameters, part.gradients(sinks[part]), strict=True)
    ]


def _summed(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def _load_adapters(computed: LayerComputation | PerLayerComputation) -> None:
    for site in computed.sites:
        site.a = site.stack_adapters()
    for part in computed.trained:
        part.refresh()


def _fused_layer(
    layer: LayerComputation, x: Tensor, residual: Tensor | None, on: Pass, keep: Keep
) -> tuple[Tensor, Tensor]:
    matrices = [parameter for part in layer.trained for parameter in part.parameters]
    wanted = keep if torch.is_grad_enabled() else None
    result: tuple[Tensor, Tensor] = _FusedLayer.apply(layer, on, wanted, x, residual, *matrices)
    return result
