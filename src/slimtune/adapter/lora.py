"""The LoRA adapter's configuration, from slimtune's keys to PEFT's."""

from __future__ import annotations

from peft import LoraConfig

from slimtune.config import Config

__all__ = ["lora_config"]


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
