"""Reads a model, as Transformers makes it, into a :class:`Family`; changes nothing, works on the meta device too."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from slimtune.families.spec import CHOOSES, OTHER_SEQUENCE, Family, Layer

__all__ = ["decoder_of", "is_linear", "read_family"]

_SEQUENCE = frozenset(
    {"attention_mask", "past_key_values", "past_key_value", "layer_past", "cache_params", "cache", "state", "mask"}
)
"""Arguments by which a module is told which tokens it may see, or what it kept of those before."""
_FEED_FORWARD = re.compile(r"(MLP|Mlp|MoE|Moe|MoeBlock|MoELayer|FFN|FFNBlock|FeedForward)$")
_CHOOSERS = re.compile(r"(indexer|scorer|router|gating)$")
"""Modules that choose tokens or experts. What they choose is not differentiable in them, or not to be unlearned."""
_WEIGHERS = re.compile(r"^(gate|wg|altup)$|expert_gate$|hyper_connection$|_hc$|^per_layer_|norm")
"""In a layer, but outside of what mixes tokens: gates and small maps that weigh one path against another."""
_CROSS = re.compile(r"^(cross_attn|encoder_attn|crossattention)$")


def read_family(model: Any) -> Family:
    """The description of ``model``'s text part.

    Args:
        model: A plain ``PreTrainedModel``, quantised or not, without adapters.
    """
    names = {id(module): name for name, module in model.named_modules()}
    text = _text_part(model)
    towers = _towers(text)
    inside_towers = {id(module) for tower in towers for module in tower.modules()}
    unfit: dict[str, str] = {}
    uncalled: set[str] = set()
    layers = tuple(_read_layer(layer, names, unfit, uncalled) for layer in _layers(text, inside_towers))
    head = model.get_output_embeddings()
    return Family(
        model_type=str(getattr(model.config, "model_type", "")),
        text=names[id(text)],
        head="" if head is None else names.get(id(head), ""),
        layers=layers,
        towers=tuple(names[id(tower)] for tower in towers),
        uncalled=frozenset(uncalled),
        unfit=unfit,
    )


def is_linear(module: nn.Module) -> bool:
    """Whether it is y = W x + b, of whatever class: torch's, a subclass, 4-bit, or GPT-2's transposed one."""
    # A grouped one multiplies each group of its input by other rows.
    return isinstance(module, nn.Linear | Conv1D) and getattr(module, "n_groups", 1) == 1


def decoder_of(model: Any) -> Any:
    """What reads text in a model, as Transformers finds it; the model itself where that is none.

    Transformers looks for it by name, and ModernBERT calls its head a decoder.
    """
    found = model.get_decoder()
    return model if found is model.get_output_embeddings() else found


def _text_part(model: Any) -> nn.Module:
    whole: nn.Module = model
    decoder: nn.Module = decoder_of(model)
    return decoder if any(_layers(decoder, set())) else whole


def _towers(text: nn.Module) -> list[nn.Module]:
    """Models inside the text part that don't read text, the outermost of them."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in text.modules():
        # Transformers' PreTrainedModel says what it reads.
        reads = getattr(module, "input_modalities", "text")
        if id(module) not in inside and "text" not in ((reads,) if isinstance(reads, str) else reads):
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    return found


def _layers(text: nn.Module, inside_towers: set[int]) -> Iterator[nn.Module]:
    """The decoder layers: what stands in lists and mixes tokens somewhere; not what stands inside such a layer."""
    inside: set[int] = set()
    for module in text.modules():
        if not isinstance(module, nn.ModuleList) or id(module) in inside or id(module) in inside_towers:
            continue
        for layer in module:
            parts = list(layer.modules())
            if any(_sees_the_sequence(part) for part in parts):
                inside |= {id(part) for part in parts}
                yield layer


def _sees_the_sequence(module: nn.Module) -> bool:
    # The class's, as hooks replace the instance's.
    return not _SEQUENCE.isdisjoint(inspect.signature(type(module).forward).parameters)


def _read_layer(layer: nn.Module, names: dict[int, str], unfit: dict[str, str], uncalled: set[str]) -> Layer:
    mixers = list(_mixers(layer))
    mixing = {id(part) for mixer in mixers for part in mixer.modules()}
    unreached = {id(part) for mixer in mixers for part in _read_past_the_call(mixer)}
    uncalled |= {names[part] for part in unreached}
    attention: list[str] = []
    mlp: list[str] = []
    experts: list[str] = []
    for path, module in layer.named_modules():
        name, parts = names[id(module)], path.split(".")
        if _is_stack_of_experts(module, parts):
            experts += [f"{name}.{own}" for own, value in module.named_parameters(recurse=False) if value.dim() == 3]
        elif isinstance(module, nn.Linear | Conv1D):
            is_mixing = id(module) in mixing
            reason = _why_unfit(module, parts, unreached=id(module) in unreached)
            if reason:
                unfit[name] = reason
            elif is_mixing:
                attention.append(name)
            elif not any(_WEIGHERS.search(part) for part in parts):
                mlp.append(name)
    classes = tuple(dict.fromkeys(type(mixer).__name__ for mixer in mixers))
    return Layer(names[id(layer)], classes, tuple(attention), tuple(mlp), tuple(experts))


def _why_unfit(module: nn.Module, path: list[str], *, unreached: bool) -> str:
    if any(_CHOOSERS.search(part) for part in path):
        return CHOOSES
    if any(_CROSS.search(part) for part in path):
        return OTHER_SEQUENCE
    if unreached:
        return "the model's code takes its weight past it, where an adapter doesn't reach"
    return "" if is_linear(module) else "it multiplies groups of its input by other rows"


def _mixers(layer: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules below the layer that see the sequence and hold no feed-forward; else the layer itself."""
    inside: set[int] = set()
    for module in layer.modules():
        if module is layer or id(module) in inside or not _sees_the_sequence(module) or _holds_feed_forward(module):
            continue
        inside |= {id(part) for part in module.modules()}
        yield module
    if not inside and not _holds_feed_forward(layer):
        yield layer


def _holds_feed_forward(module: nn.Module) -> bool:
    return any(_FEED_FORWARD.search(type(part).__name__) for part in module.modules())


def _read_past_the_call(mixer: nn.Module) -> Iterator[nn.Module]:
    """Linear layers whose ``weight`` the code takes itself, for a fused kernel, instead of calling the layer.

    PEFT adapts a call: where there is none, an adapter trains towards nothing, without an error.
    """
    for module in mixer.modules():
        if not isinstance(module, nn.Linear):
            read = {name for function in _functions(type(module)) for name in _weights_in(function)}
            yield from (child for name, child in module.named_children() if name in read)


def _functions(cls: type) -> Iterator[Any]:
    for owner in cls.__mro__:
        if owner is nn.Module:
            return
        for name, value in vars(owner).items():
            if inspect.isfunction(value) and "init" not in name and "reset" not in name:
                yield inspect.unwrap(value)


def _weights_in(function: Any) -> list[str]:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # made at run time
        return []
    # A slice of a weight is BLOOM's imitation of tensor parallelism, off unless a config asks for it.
    return re.findall(r"self\.(\w+)\.weight\b(?!\[)", source)


def _is_stack_of_experts(module: nn.Module, path: list[str]) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    named = "expert" in type(module).__name__.lower() or any("expert" in part for part in path)
    return named and any(value.dim() == 3 and value.shape[0] > 1 for _, value in module.named_parameters(recurse=False))
