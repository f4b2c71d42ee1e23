"""The trained tensors of a wrapped model, out of it and back into it, in PEFT's own file format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from slimtune.adapter.change import moves_base
from slimtune.adapter.files import find_adapter
from slimtune.adapter.passport import Passport, check_base, read_passport, tokenizer_hash
from slimtune.adapter.settings import ADAPTER_WEIGHTS, adapter_config, check_values
from slimtune.errors import UserError

__all__ = [
    "adapter_config_bytes",
    "adapter_tensors",
    "adapter_to_start_from",
    "own_storage_",
    "restore_adapter",
    "start_from",
]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What trains, by the names that PEFT saves it under; the tensors themselves, not copies.

    Only trainable parameters are looked at: PEFT's own default walks the whole state, which for a 4-bit base packs
    every quantisation state first.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=trainable, save_embedding_layers=False)
    return tensors


def adapter_config_bytes(model: Any) -> bytes:
    """``adapter_config.json`` as PEFT's ``save_pretrained`` writes it."""
    values = model.peft_config[model.active_adapter].to_dict()
    values["inference_mode"] = True
    values["base_model_name_or_path"] = values["base_model_name_or_path"] or model.base_model.model.name_or_path
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode()


def own_storage_(tensors: Collection[Tensor]) -> None:
    """Give parts of something much larger memory of their own, as PiSSA's and OLoRA's factors are: it is let go."""
    wanted: Counter[int] = Counter()
    for tensor in tensors:
        wanted[tensor.untyped_storage().data_ptr()] += tensor.nbytes
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() > 2 * wanted[storage.data_ptr()]:
            tensor.data = tensor.detach().clone()


def restore_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into the model's adapter.

    Not by PEFT, which takes names that look like those of an older Transformers for such, and leaves out without a word
    what it has renamed (:func:`slimtune.adapter.files.attach_adapter`).

    Raises:
        ValueError: A tensor is missing, unexpected, or has another shape.
    """
    wanted = adapter_tensors(model)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{name} is {'missing from' if name in wanted else 'unexpected in'} the saved adapter")
    for name, tensor in tensors.items():
        if wanted[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(wanted[name].shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)


def adapter_to_start_from(path: Path) -> Path:
    """The folder of the adapter that a new run starts with: the run's at ``path``, or ``path`` itself.

    Raises:
        UserError: There is none.
    """
    folder = find_adapter(path)
    if folder is None:
        raise UserError(f"{path} holds no adapter to start from", way_out="Give a finished run, or its adapter folder.")
    return folder


def start_from(model: Any, path: Path, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model's new adapter the values of a run's, to train on from.

    Args:
        model: Wrapped, its adapter fresh.
        path: The run's folder, or the adapter's.
        base: The folder of the model's base.
        tokenizer: The model's, with the tokens that the run adds.

    Raises:
        UserError: ``path`` holds no adapter, or one of another base or shape, or one whose values would do something
            else here.
    """
    folder = adapter_to_start_from(path)
    saved = adapter_config(folder)
    check_values(folder)
    passport = read_passport(folder)
    if passport is not None:
        check_base(passport, base)
    try:
        restore_adapter(model, load_file(folder / ADAPTER_WEIGHTS))
    except ValueError as error:
        raise UserError(
            f"the adapter in {folder} doesn't fit this run: {error}",
            rule="It must have the rank, the targets and the layers that this run trains.",
            way_out="Give the same --lora-r, --targets and --layers as the run it comes from.",
        ) from None
    _check_meaning(folder, saved, model.peft_config[model.active_adapter])
    if saved.get("trainable_token_indices"):
        _check_tokens(folder, passport, tokenizer)


def _check_meaning(folder: Path, saved: Mapping[str, Any], new: LoraConfig) -> None:
    """See that values mean the same in both adapters: of one shape they are read whatever the scale or the base."""
    keys: dict[str, Any] = {"lora_alpha": 8, "use_rslora": False, "alpha_pattern": {}, "trainable_token_indices": {}}
    for key, unset in keys.items():
        was, now = (value or unset for value in (saved.get(key), getattr(new, key)))
        if was != now:
            raise _other_meaning(folder, key, was, now)
    was, now = saved.get("init_lora_weights", True), new.init_lora_weights
    if was != now and (moves_base(was) or moves_base(now)):
        raise _other_meaning(folder, "init_lora_weights", was, now)


def _other_meaning(folder: Path, key: str, was: Any, now: Any) -> UserError:
    return UserError(
        f"the adapter in {folder} was trained with {key} {was}, and this run has {now}",
        rule="Its values would change the base in another way than they did.",
        way_out="Give the option as the run had it that the adapter comes from.",
    )


def _check_tokens(folder: Path, passport: Passport | None, tokenizer: PreTrainedTokenizerBase) -> None:
    if passport is not None and tokenizer_hash(tokenizer, like=passport.tokenizer) != passport.tokenizer:
        raise UserError(
            f"the adapter in {folder} has rows of tokens that this run doesn't add",
            rule="A row belongs to its token.",
            way_out="Give the same --add-tokens as the run it comes from.",
        )
