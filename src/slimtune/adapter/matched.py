"""Which modules an adapter's configuration means, asked before anything is wrapped."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

__all__ = ["adapted_names"]


def adapted_names(lora: LoraConfig, model: nn.Module) -> list[str]:
    """Names of the modules of ``model`` that PEFT will give an adapter, by PEFT's rules (0.21, ``tuners_utils``).

    A module stands here too if one of its parameters is adapted, as an expert stack is.

    Args:
        lora: It names its ``target_modules``, as :func:`slimtune.adapter.lora.lora_config` makes it.
        model: Not wrapped.
    """
    ends = tuple(lora.target_parameters or ())
    return [
        name
        for name, module in model.named_modules()
        if name and (check_target_module_exists(lora, name) or _has_target(name, module, ends))
    ]


def _has_target(name: str, module: nn.Module, ends: tuple[str, ...]) -> bool:
    full = (f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))
    return any(path == end or path.endswith(f".{end}") for path in full for end in ends)
