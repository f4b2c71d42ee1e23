"""Which of Transformers' classes a base is, and why some are none that slimtune can train.

A checkpoint with images is loaded as the class that its own config names, tower and all, and trained on text alone:
its modules then have the names that vLLM, llama.cpp's converters and plain PEFT look for, and merged files stay whole
(docs/decisions/0055-image-text-whole.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from slimtune.base.sizes import check_sizes
from slimtune.base.source import from_pretrained, upstream_errors
from slimtune.errors import UserError

__all__ = ["check_whole", "language_class", "skeleton"]

_NEEDED = "slimtune trains models that continue text: causal language models, with or without images as input."


def language_class(config: PreTrainedConfig, source: str) -> Any:
    """The Auto class that loads a base as a model that continues text.

    Args:
        config: The base's config.
        source: Its folder or hub id, for messages.

    Raises:
        UserError: The model is of another kind: encoder, sequence to sequence, audio, diffusion.
    """
    automatic = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in automatic:
        return AutoModelForCausalLM
    if "AutoModelForImageTextToText" in automatic:
        return AutoModelForImageTextToText
    if kind := _other_kind(config):
        raise UserError(f"{source} can't be trained: it is {kind}", rule=_NEEDED, way_out="Take a chat model.")
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def skeleton(source: Path | str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The base of a folder or hub id without its weights: every module and parameter, on the meta device.

    Raises:
        UserError: The config can't be read, or isn't that of a model that continues text.
    """
    source = str(source)
    config = from_pretrained(AutoConfig, source, revision=revision, trust_remote_code=trust_remote_code)
    if Path(source).is_dir():
        check_sizes(Path(source), config)
    # A quantised base's modules are those of its 16-bit original.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader = language_class(config, source)
    with torch.device("meta"), upstream_errors(source):
        model: PreTrainedModel = loader.from_config(config, trust_remote_code=trust_remote_code)
        # `torch.normal` with a size knows nothing of the device at hand: DiffLlama's lambdas would hold values.
        nn.Module.to(model, "meta")
    return model


def check_whole(name: str, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """See that the files held every parameter: Transformers begins the others at random, and only warns of it.

    Args:
        name: The model's name, for the message.
        model: As it was loaded.
        missing: What the files didn't hold, as Transformers reports it.

    Raises:
        UserError: A parameter has no weights, a classifier's language head for example.
    """
    parameters = {parameter for parameter, _ in model.named_parameters()}
    if lacking := sorted(parameters & set(missing)):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(
            f"the files of {name} hold nothing for {lacking[0]}{more}",
            rule=f"{type(model).__name__} needs it; it would begin at random.",
            way_out="Take the checkpoint of a chat model, or check that the download is whole.",
        )


def _other_kind(config: PreTrainedConfig) -> str:
    """What the model is instead of a causal language model; empty if it is one, or can be used as one."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return f"a sequence-to-sequence model ({name})"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        return f"an encoder ({name}): it fills gaps and continues nothing"
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        model: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        return _why_not_on_text(model, name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"a model of type {name}, for which Transformers has no class that continues text"
    return ""


def _why_not_on_text(model: type[PreTrainedModel], name: str) -> str:
    forward = inspect.signature(model.forward).parameters
    if "labels" not in forward or "input_ids" not in forward:
        return f"a model of type {name}: {model.__name__} has no loss on text"
    needed = [
        key
        for key, parameter in forward.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and key != "self"
    ]
    if needed and needed != ["input_ids"]:
        return f"a model of type {name}: {model.__name__} takes no text without {' and '.join(needed)}"
    return ""
