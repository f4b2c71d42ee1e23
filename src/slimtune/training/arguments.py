"""From slimtune's config to TRL's SFTConfig."""

from __future__ import annotations

from pathlib import Path

from trl import SFTConfig

from slimtune.config import Config
from slimtune.hardware import Hardware

__all__ = ["sft_arguments"]


def sft_arguments(config: Config, hardware: Hardware, output: Path, *, fused: bool) -> SFTConfig:
    """The arguments of one run. ``config`` is resolved: it holds no ``auto`` any more.

    Args:
        config: What runs.
        hardware: Where it runs.
        output: The folder of the checkpoints.
        fused: The steps run on slimtune's engine, which has its own mixed precision and recomputation.
    """
    plain_on_gpu = hardware.device == "cuda" and not fused
    return SFTConfig(
        output_dir=str(output),
        # One item of the dataset is one whole micro-batch; all epochs together are one pass over the items.
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        seed=config.seed,
        data_seed=config.seed,
        full_determinism=False,
        use_cpu=hardware.device == "cpu",
        bf16=plain_on_gpu and config.compute_dtype == "bf16",
        fp16=plain_on_gpu and config.compute_dtype == "fp16",
        gradient_checkpointing=plain_on_gpu,
        gradient_checkpointing_kwargs={"use_reentrant": False} if plain_on_gpu else None,
        logging_steps=config.logging_steps,
        # The true value is logged; slimtune's guard decides what a NaN does.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        eval_strategy="steps" if config.eval or config.eval_share else "no",
        eval_steps=config.eval_steps if config.eval_steps != "auto" else None,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        # Rows are rendered, masked and packed by slimtune.data: TRL gets ids and labels.
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        dataloader_pin_memory=hardware.device == "cuda",
    )
