"""Can the loaded model compute a text? Some classes can't in 16 bits, in 4, or on this device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.base.quantize import four_bit_formats
from slimtune.errors import UserError

__all__ = ["CANT_TAKE", "cant_compute", "check_computes"]

CANT_TAKE = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What Python and torch raise where a model isn't made as a caller thinks."""


def check_computes(model: Any, ids: Tensor, dtype: torch.dtype) -> None:
    """Compute a text as it will be in use: in evaluation mode, without autocast, without a cache.

    Args:
        model: Loaded, wrapped by PEFT or not, in evaluation mode.
        ids: The text's tokens, int64 [1, S].
        dtype: What it computes in.

    Raises:
        UserError: It can't. After hours of training, or in the middle of a file, that would be late to learn.
    """
    try:
        with torch.no_grad():
            model(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except CANT_TAKE as error:
        raise cant_compute(model, error, dtype) from error


def cant_compute(model: Any, error: Exception, dtype: torch.dtype) -> UserError:
    """The refusal of a model that ended in ``error``."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    others = ["--compute-dtype fp32"] if dtype != torch.float32 else []
    others += ["--quantization none"] if four_bit_formats(model) else []
    said = (str(error).splitlines() or [""])[0]
    return UserError(
        f"{type(bare).__name__} can't compute a document: {type(error).__name__}: {said}",
        rule="It was given text alone, as in use: input_ids, in evaluation mode.",
        way_out=f"In other numbers it may: {' or '.join(others)}." if others else "",
    )
