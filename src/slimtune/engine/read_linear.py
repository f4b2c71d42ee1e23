"""Reads one linear layer and PEFT's adapter around it, or an activation, as the engine computes it; changes nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from slimtune.engine.structure import Activation, Adapter, CannotFuse, Linear

__all__ = ["FLOATS", "is_bare", "nothing_else", "read_activation", "read_adapter", "read_linear"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of weights that aren't packed."""


def is_bare(module: Any) -> bool:
    """Whether PEFT hasn't wrapped it."""
    return not any(hasattr(module, part) for part in ("base_layer", "modules_to_save", "token_adapter"))


def nothing_else(name: str, module: nn.Module, known: Collection[str]) -> None:
    """Hold a module to the names of what is read of it: another weight is one that the engine would leave out.

    Raises:
        CannotFuse: It has a parameter, or a module with parameters, of another name.
    """
    parts = (part for part, child in module.named_children() if any(True for _ in child.parameters()))
    for part in (*parts, *(own for own, _ in module.named_parameters(recurse=False))):
        if part not in known:
            raise CannotFuse(f"{name} has a {part}, which the engine doesn't compute")


def read_activation(name: str, module: Any) -> Activation:
    """What a gate of the layer called ``name`` goes through.

    Raises:
        CannotFuse: The engine has no such activation.
    """
    known: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    for key, activation in known.items():
        if type(module) is type(ACT2FN[key]):
            return activation
    raise CannotFuse(f"{name} has activation {type(module).__name__}")


def read_linear(name: str, module: Any, *, frozen: bool) -> Linear:
    """A linear layer, PEFT's or plain; ``frozen``: its own weight and bias may not train.

    Raises:
        CannotFuse: Its weight or its adapter is none that the engine computes.
    """
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
    elif type(base) is nn.Linear and type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOATS:
        out_features, in_features = weight.shape
    elif (packed := getattr(weight, "format", None)) is not None:
        raise CannotFuse(f"{name} is packed in {packed} by rows of {weight.shape[-1]}, which the engine doesn't unpack")
    else:
        raise CannotFuse(f"{name} is a {type(base).__name__} of {weight.dtype}, neither NF4 nor a 16- or 32-bit linear")
    if frozen and any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        raise CannotFuse(f"{name} trains its base weight or bias, which the fused engine keeps frozen")
    adapter = read_adapter(name, module) if module is not base else None
    return Linear(name, base, module, adapter, int(in_features), int(out_features))


def read_adapter(name: str, module: Any) -> Adapter | None:
    """The active adapter of one of PEFT's layers, if there is one.

    Raises:
        CannotFuse: It is no plain LoRA, or one of several.
    """
    # AdaLoRA keeps matrices by these names too, as parameters.
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
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
