"""The LoRA adapter's configuration, from slimtune's keys to PEFT's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from slimtune.adapter.patterns import check_patterns
from slimtune.adapter.targets import Targets
from slimtune.base.quantize import four_bit_formats
from slimtune.config import Config, did_you_mean
from slimtune.errors import UserError
from slimtune.families import read_family

__all__ = ["Coverage", "check_names", "coverage", "give_dropout_", "lora_config", "wrapped"]


def lora_config(config: Config, targets: Targets, rows: dict[str, list[int]] | None = None) -> LoraConfig:
    """PEFT's ``LoraConfig`` for this run (LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353).

    Args:
        config: The run's.
        targets: What gets an adapter.
        rows: By the name of an embedding or head, the rows of it that train.

    Raises:
        UserError: Experts are among the targets, and an option that PEFT doesn't have for them. Or a module is to get
            an adapter and to train whole.
    """
    for name in config.modules_to_save:
        if twice := [
            end for end in targets.modules if f".{name}".endswith(f".{end}") or f".{end}".endswith(f".{name}")
        ]:
            raise UserError(
                f"modules_to_save {name!r} is among the targets ({twice[0]})",
                rule="A module gets an adapter, or trains whole.",
                way_out="Leave it out of one of the two.",
            )
    if targets.parameters:
        _check_options(config, targets)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.alpha,
        # PEFT has no dropout for weights adapted as tensors and refuses a config that has one; see give_dropout_.
        lora_dropout=0.0 if targets.parameters else config.lora_dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        exclude_modules=targets.exclude,
        init_lora_weights=True if config.lora_init == "default" else config.lora_init,
        use_rslora=config.rslora,
        use_dora=config.dora,
        modules_to_save=list(config.modules_to_save) or None,
        layers_to_transform=None if config.layers is None or not targets.modules else list(config.layers),
        rank_pattern=_patterns(config.rank_pattern, targets),
        alpha_pattern=_patterns(config.alpha_pattern, targets),
        trainable_token_indices=rows or None,
    )


def wrapped(model: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """``model`` wrapped as SFTTrainer wraps it; a skeleton on the meta device too, which stays one."""
    with torch.device(model.device):
        made: nn.Module = get_peft_model(model, lora)
    return made


def _patterns(asked: Mapping[str, int], targets: Targets) -> dict[str, int]:
    """For PEFT a linear layer that is adapted as a tensor has its weight's name."""
    as_tensors = any(name.endswith(".weight") for name in targets.parameters)
    beside = {rf"(?:{pattern})\.weight": value for pattern, value in asked.items()} if as_tensors else {}
    return {**asked, **beside}


def _check_options(config: Config, targets: Targets) -> None:
    options = {
        "dora: true": config.dora,
        f"lora_init: {config.lora_init}": config.lora_init not in ("default", "gaussian"),
    }
    for option, is_set in options.items():
        if is_set:
            raise UserError(
                f"{option} can't be had with {targets.parameters[0]} among the targets",
                rule="PEFT adapts it as a tensor, and has plain LoRA alone for these.",
                way_out="Leave the option, or name other targets: --targets attention",
            )


def give_dropout_(model: nn.Module, config: Config) -> None:
    """Give the wrapped model's linear layers the dropout that the PEFT config couldn't have beside expert stacks.

    Dropout is no part of an adapter's files but a number that nothing reads after training; these say 0.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and config.lora_dropout:
            for name in module.lora_A:
                module.lora_dropout[name] = nn.Dropout(config.lora_dropout)


@dataclass(frozen=True)
class Coverage:
    """What of the base an adapter stands beside."""

    layers: int
    """Decoder layers of the model."""
    adapted_layers: int
    adapted_weights: int
    """Weights of the base in the modules and stacks that carry an adapter."""
    expert_parameters: int
    """Parameters of the adapter that belong to expert stacks."""


def coverage(model: nn.Module, targets: Targets) -> Coverage:
    """Count on the wrapped model."""
    layers: set[str] = set()
    weights = expert_parameters = 0
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not (module.lora_A or module.lora_embedding_A):
            continue
        name = path.removeprefix("base_model.model.").replace(".base_layer", "")
        layers |= {layer for layer in targets.layers if name.startswith(f"{layer}.")}
        stack = f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
        weights += module.get_param().numel() if stack else module.in_features * module.out_features
        if stack in targets.stacks:
            own: Sequence[Any] = [*module.lora_A.parameters(), *module.lora_B.parameters()]
            expert_parameters += sum(parameter.numel() for parameter in own)
    return Coverage(len(targets.layers), len(layers), weights, expert_parameters)


def check_names(config: Config, model: Any) -> None:
    """See that the modules to save and the layers that the config names are the model's, and that those can be copied.

    Args:
        config: The run's.
        model: The base, loaded.

    Raises:
        UserError: A name matches no module, or a layer isn't there; the nearest name is proposed. Or a pattern is none,
            or isn't matched in time. Or a module to save lies in 4 bits, or isn't the only one that PEFT would take.
    """
    paths = [name for name, _ in model.named_modules()]
    asked = config.model_dump(include={"rank_pattern", "alpha_pattern", "modules_to_save"})
    check_patterns("the run's config", asked, [*paths, *(name for name, _ in model.named_parameters())])
    for name in config.modules_to_save:
        _check_copied(name, model, paths)
    if config.layers is not None:
        _check_layers(config.layers, model)


def _check_layers(asked: Sequence[int], model: Any) -> None:
    """By the layers' own names, as PEFT counts them: BLT is three models, and its config says no number."""
    ends = [layer.path.rpartition(".")[2] for layer in read_family(model).layers]
    there = {int(end) for end in ends if end.isdigit()}
    if missing := set(asked) - there:
        raise UserError(
            f"layers {max(missing)} is not there: {type(model).__name__} has {len(there)}",
            rule=f"Layers count from 0 to {max(there, default=0)}.",
        )


def _holds_numbers(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _check_copied(name: str, model: Any, paths: Sequence[str]) -> None:
    """See that a module of ``modules_to_save`` can be copied, to train whole."""
    meant = [path for path in paths if path == name or path.endswith(f".{name}")]
    if not meant:
        raise UserError(
            f"modules_to_save {name!r} is the name of no module of {type(model).__name__}",
            rule=did_you_mean(name, sorted({path.rsplit(".", 1)[-1] for path in paths})),
            way_out="Name modules by the end of their names.",
        )
    for path in paths:
        if path.endswith(name) and path not in meant:
            raise UserError(
                f"modules_to_save {name!r} is the end of {path} too",
                rule="PEFT takes every module whose name ends so, in the middle of a word as well.",
                way_out=f"Say more of the name: --modules-to-save {meant[0]}",
            )
    for path in meant:
        inside = [part for part, module in model.get_submodule(path).named_modules() if part and _holds_numbers(module)]
        if inside:
            raise UserError(
                f"modules_to_save {name!r}: {path} is made of other modules",
                rule="What slimtune finds on a model, as attention and what carries adapters, isn't in such a copy.",
                way_out=f"Name what it is made of: --modules-to-save {','.join(inside)}",
            )
        if formats := four_bit_formats(model.get_submodule(path)):
            raise UserError(
                f"modules_to_save {name!r}: {path} lies in {formats[0]}",
                rule="A copy that trains whole holds plain numbers.",
                way_out=f"--targets {name} puts an adapter on it where it can carry one; or --quantization none.",
            )
