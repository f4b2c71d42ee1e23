"""From slimtune's config to TRL's SFTConfig."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from slimtune.adapter.state import adapter_to_start_from
from slimtune.config import Config, did_you_mean
from slimtune.errors import UserError
from slimtune.hardware import Hardware
from slimtune.run.replaced import tell_stranded

__all__ = ["check_arguments", "check_model", "check_start", "sft_arguments"]


def check_arguments(config: Config) -> None:
    """See that what the config names for the Trainer is there, before anything heavy is loaded.

    Raises:
        UserError: Transformers knows no such optimizer, or a logger's package isn't installed.
    """
    known = [str(name.value) for name in OptimizerNames]
    if config.optim != "auto" and config.optim not in known:
        raise UserError(
            f"optim {config.optim!r} is no optimizer that Transformers knows",
            rule=did_you_mean(config.optim, known),
            way_out="auto takes the one that fits this machine; adamw_torch is the plain one.",
        )
    for logger in config.report_to:
        if importlib.util.find_spec(logger) is None:
            raise UserError(f"report_to {logger}: it is not installed", way_out=f"pip install {logger}")


def check_start(config: Config) -> None:
    """See that there is an adapter where ``config`` says that the new one starts, and that it stays there.

    Raises:
        UserError: There is none, or the new run would take its place.
    """
    if config.start_from is None:
        return
    tell_stranded(config.start_from)
    adapter = adapter_to_start_from(config.start_from)
    if config.overwrite and config.output and adapter.resolve().is_relative_to(config.output.resolve()):
        raise UserError(
            f"{config.output} can't be replaced by a run that starts from it",
            rule="--overwrite puts the old run aside before the new one begins.",
            way_out="Choose another folder (-o).",
        )


def check_model(config: Config, model: Any) -> None:
    """See that this model has what the config names, before it is wrapped.

    Raises:
        UserError: An adapter on the head, or an auxiliary loss that it doesn't have.
    """
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    for target in config.targets if isinstance(config.targets, tuple) else ():
        if any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f"targets {target!r} is the head of {type(model).__name__}, which takes no adapter",
                rule="TRL's trainer computes the loss from the head's weight, so an adapter on it would never train.",
                way_out=f"--modules-to-save {target} trains a copy of the head itself.",
            )
    if config.router_aux_loss is not None and not hasattr(model.config.get_text_config(), "output_router_logits"):
        raise UserError(
            f"router_aux_loss: {type(model).__name__} has no auxiliary loss",
            rule="A mixture of experts that tells where its routers send tokens has one.",
            way_out="Leave router_aux_loss out.",
        )


def sft_arguments(
    config: Config, hardware: Hardware, output: Path, *, steps: int, fused: bool, recompute: bool = True, ranks: int = 1
) -> SFTConfig:
    """The arguments of one run. ``config`` is resolved: it holds no ``auto`` any more.

    Args:
        config: What runs.
        hardware: Where it runs.
        output: The folder of the checkpoints.
        steps: Optimizer steps of the whole run.
        fused: The steps run on slimtune's engine, which has its own mixed precision and recomputation.
        ranks: Processes that share each step's micro-batches.
        recompute: On a GPU the plain stack computes activations again in the backward pass; not every class can.
    """
    plain_on_gpu = hardware.device == "cuda" and not fused
    recompute = recompute and plain_on_gpu
    return SFTConfig(
        output_dir=str(output),
        # One item of the dataset is one whole micro-batch; all epochs together are one pass over the items.
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.accumulation // ranks,
        num_train_epochs=1,
        learning_rate=config.rate,
        lr_scheduler_type=config.lr_scheduler,
        # Rounded down: the first step of a warm-up has a rate of 0, and a run of a few steps has none to give away.
        warmup_steps=math.floor(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        seed=config.seed,
        data_seed=config.seed,
        full_determinism=False,
        use_cpu=hardware.device == "cpu",
        bf16=plain_on_gpu and config.compute_dtype == "bf16",
        fp16=plain_on_gpu and config.compute_dtype == "fp16",
        gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
        # TRL would add the architecture's own weight of it.
        router_aux_loss_coef=config.router_aux_loss or 0.0,
        logging_steps=config.logging_steps,
        # The true value is logged; slimtune's guard decides what a NaN does.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        eval_strategy="steps" if config.eval or config.eval_share else "no",
        eval_steps=config.eval_steps if config.eval_steps != "auto" else None,
        report_to=list(config.report_to) or "none",
        run_name=None if config.output is None else config.output.name,  # what loggers call it
        trackio_space_id=None,  # on this machine: what is measured goes nowhere unasked
        disable_tqdm=True,
        # Rows are rendered, masked and packed by slimtune.data: TRL gets ids and labels.
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        dataloader_pin_memory=hardware.device == "cuda",
    )
