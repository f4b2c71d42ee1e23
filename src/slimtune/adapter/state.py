"""The trained tensors of a wrapped model, out of it and back into it, in PEFT's own file format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

__all__ = ["adapter_config_bytes", "adapter_tensors", "restore_adapter"]


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


def restore_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into the model's adapter.

    Raises:
        ValueError: A tensor is missing, unexpected, or has another shape.
    """
    wanted = adapter_tensors(model)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{name} is {'missing from' if name in wanted else 'unexpected in'} the saved adapter")
    for name, tensor in tensors.items():
        if wanted[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(wanted[name].shape)}")
    set_peft_model_state_dict(model, dict(tensors))
