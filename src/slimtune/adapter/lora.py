"""The LoRA adapter's configuration, from slimtune's keys to PEFT's."""

from __future__ import annotations

from peft import LoraConfig
from torch import nn

from slimtune.config import Config, did_you_mean
from slimtune.errors import UserError

__all__ = ["check_names", "lora_config"]


def lora_config(config: Config) -> LoraConfig:
    """PEFT's ``LoraConfig`` for this run (LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353)."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.targets if config.targets == "all-linear" else list(config.targets),
        bias=config.lora_bias,
        init_lora_weights=True if config.lora_init == "default" else config.lora_init,
        use_rslora=config.rslora,
        use_dora=config.dora,
        modules_to_save=list(config.modules_to_save) or None,
        layers_to_transform=None if config.layers is None else list(config.layers),
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
    )


def check_names(config: Config, model: nn.Module) -> None:
    """See that the modules and layers that the config names are the model's.

    Raises:
        UserError: A name matches no module, or a layer isn't there; the nearest name is proposed.
    """
    endings = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    paths = [name for name, _ in model.named_modules()]
    for key, names in (("targets", config.targets), ("modules_to_save", config.modules_to_save)):
        for name in () if names == "all-linear" else names:
            if not any(path == name or path.endswith(f".{name}") for path in paths):
                linear = sorted(
                    {path.rsplit(".", 1)[-1] for path, module in model.named_modules() if _is_linear(module)}
                )
                raise UserError(
                    f"{key} {name!r} is the name of no module of {type(model).__name__}",
                    rule=did_you_mean(name, sorted(endings)) or f"Its linear layers are {', '.join(linear)}.",
                    way_out="Name modules by the end of their names, or take --targets all-linear.",
                )
    layers = getattr(model.config, "num_hidden_layers", None)
    if config.layers is not None and layers is not None and max(config.layers) >= layers:
        raise UserError(
            f"layers {max(config.layers)} is not there: {type(model).__name__} has {layers}",
            rule=f"Layers count from 0 to {layers - 1}.",
        )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
