"""From slimtune's config to TRL's SFTConfig."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from slimtune.config import Config, did_you_mean
from slimtune.errors import UserError
from slimtune.hardware import Hardware

__all__ = ["check_alone", "check_arguments", "check_model", "sft_arguments"]


_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they have started; accelerate waits for all of them (1.14, ``state.py``)."""


def check_alone() -> None:
    """See that this process wasn't started as one of several, for the others would be waited for.

    Raises:
        UserError: It was.
    """
    told = {name: os.environ[name] for name in (*_PROCESSES, "LOCAL_RANK") if os.environ.get(name, "")}
    if told.get("WORLD_SIZE") == "1" or told.get("LOCAL_RANK") == "-1":
        told.pop("LOCAL_RANK", None)
    several = [f"{name}={value}" for name, value in told.items() if name == "LOCAL_RANK" or value != "1"]
    if several:
        raise UserError(
            f"this process was started as one of several ({', '.join(several)})",
            rule="A run of slimtune takes one process and one GPU.",
            way_out="Start it without torchrun, accelerate launch or mpirun; "
            f"or take it out of their environment: env -u {several[0].partition('=')[0]} slimtune …",
        )


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
    config: Config, hardware: Hardware, output: Path, *, steps: int, fused: bool, recompute: bool = True
) -> SFTConfig:
    """The arguments of one run. ``config`` is resolved: it holds no ``auto`` any more.

    Args:
        config: What runs.
        hardware: Where it runs.
        output: The folder of the checkpoints.
        steps: Optimizer steps of the whole run.
        fused: The steps run on slimtune's engine, which has its own mixed precision and recomputation.
        recompute: On a GPU the plain stack computes activations again in the backward pass; not every class can.
    """
    plain_on_gpu = hardware.device == "cuda" and not fused
    recompute = recompute and plain_on_gpu
    return SFTConfig(
        output_dir=str(output),
        # One item of the dataset is one whole micro-batch; all epochs together are one pass over the items.
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.accumulation,
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
        disable_tqdm=True,
        # Rows are rendered, masked and packed by slimtune.data: TRL gets ids and labels.
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        dataloader_pin_memory=hardware.device == "cuda",
    )
