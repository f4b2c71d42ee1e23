"""Which modules an adapter's configuration means, asked before anything is wrapped."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

__all__ = ["adapted_names"]


def adapted_names(lora: LoraConfig, model: nn.Module) -> list[str]:
    """Names of the modules of ``model`` that PEFT will give an adapter, by PEFT's rules (0.21, ``tuners_utils``).

    Args:
        lora: It names its ``target_modules``, as :func:`slimtune.adapter.lora.lora_config` makes it.
        model: Not wrapped.
    """
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(lora, name)]
