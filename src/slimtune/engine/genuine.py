"""Whether a model's modules do what their classes in Transformers do, which is what the engine computes in their place.

The engine reads weights and sizes off the modules and doesn't call them. A class of somebody's own, a ``forward`` set
on one instance, a hook or a registered attention function would be left out without a word; here each gets its word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["a_hook", "altered", "is_own", "registered"]

_KERNELS = frozenset({"liger_kernel", "fla"})
"""Packages of other kernels for the same functions."""
_TRUSTED = _KERNELS | {"transformers", "torch", "peft", "bitsandbytes", "slimtune"}
"""Packages whose modules may lie in a model: what the engine can't compute of them is refused where it is read."""
_HARMLESS = frozenset({"output_capturing_hook", "make_inputs_require_grad", "make_inputs_require_grads"})
"""Hooks of Transformers, PEFT and TRL that change no value: they note outputs that a call asks for, which the engine
leaves to the model, or let gradients reach inputs of layers that are recomputed."""


def is_own(module: Any, backbone: nn.Module) -> bool:
    """Whether a module's class, PEFT's wrapping taken off, stands in the same file of Transformers as its decoder's."""
    for wrapped in ("base_layer", "original_module"):
        while wrapped in getattr(module, "_modules", {}):
            module = getattr(module, wrapped)
    where = type(module).__module__
    return where == type(backbone).__module__ or where.partition(".")[0] in _KERNELS


def altered(parts: Iterable[tuple[str, nn.Module]], backbone: nn.Module) -> str | None:
    """Which of a decoder's modules, by their names, isn't Transformers' any more; None if all are."""
    for name, part in parts:
        where, called = type(part).__module__, f"{name} ({type(part).__name__})" if name else type(part).__name__
        foreign = where.startswith("transformers.models.") and not is_own(part, backbone)
        if foreign or where.partition(".")[0] not in _TRUSTED:
            return f"{called} is code of its own"
        forward = vars(part).get("forward")
        # A fused model is told apart by who fuses it.
        if forward is not None and not hasattr(forward, "slimtune_fusion") and _package(forward) not in _TRUSTED:
            return f"{called} has a forward of its own"
    return None


def a_hook(modules: Iterable[nn.Module]) -> str | None:
    """The kind of the first module that has a hook; None if none has."""
    for module in modules:
        before, after = module._forward_pre_hooks, module._forward_hooks
        if before or after or module._backward_pre_hooks or module._backward_hooks:
            back = (*module._backward_pre_hooks.values(), *module._backward_hooks.values())
            if any(
                getattr(hook, "__name__", "") not in _HARMLESS for hook in (*before.values(), *after.values(), *back)
            ):
                return type(module).__name__
    return None


def registered(config: Any) -> str | None:
    """The attention or the experts of somebody's own that a config names; None if it names Transformers'."""
    for name, functions in (
        (config._attn_implementation, ALL_ATTENTION_FUNCTIONS),
        (getattr(config, "_experts_implementation", None), ALL_EXPERTS_FUNCTIONS),
    ):
        function = functions.get(name) if name else None
        if function is not None and _package(function) not in _TRUSTED:
            return str(name)
    return None


def _package(function: Any) -> str:
    """The package that a function was written in, whatever it says of itself (functools.wraps copies that)."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    names: dict[str, Any] = getattr(function, "__globals__", {})
    return str(names.get("__name__", "")).partition(".")[0]
