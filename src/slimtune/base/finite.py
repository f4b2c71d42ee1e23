"""A base whose files hold a NaN or an infinity answers nothing, or worse: in 4 bits a NaN may become a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.errors import UserError

__all__ = ["check_finite", "is_finite"]


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is a number. A sum takes no room, and is one only if they are, but for its own overflow."""
    total = tensor.detach().sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def check_finite(name: str, model: Any) -> None:
    """See that a base's weights are numbers: those in 4 bits as they were read, the others as they are.

    Args:
        name: The model's name, for the message.
        model: As it was loaded.

    Raises:
        UserError: One isn't.
    """
    bad: list[str] = list(getattr(getattr(model, "hf_quantizer", None), "not_finite", ()))
    for path, parameter in () if bad else model.named_parameters():
        plain = type(parameter) is torch.nn.Parameter and type(parameter.data) is Tensor
        if plain and parameter.is_floating_point() and not parameter.is_meta and not is_finite(parameter):
            bad.append(path)
            break
    if bad:
        raise UserError(
            f"{bad[0]} of {name} holds a NaN or an infinity ({str(model.dtype).removeprefix('torch.')})",
            rule="A model with it answers nothing that was learnt.",
            way_out="Check that the download is whole, or take another precision: --compute-dtype fp32.",
        )
