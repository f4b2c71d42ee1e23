"""Can the loaded model compute a text, and is it one that continues it?

Some classes compute in some numbers alone. Some are made for other tasks, or for several: what stands at a token knows
those behind it (XLNet, XLM, CPM-Ant, BERT as a generator unless its config says decoder). Their loss on the next token
has that token before its eyes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimtune.base.quantize import four_bit_formats
from slimtune.errors import UserError

__all__ = ["CANT_TAKE", "ROUNDING", "cant_compute", "check_computes", "differ"]

CANT_TAKE = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What Python and torch raise where a model isn't made as a caller thinks."""
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Shares of the largest logit that don't count: the order of sums may follow a token's place. A few hundred roundings
of 32 bits, which add up, or a few of 16 bits, whose sums are made in 32."""


def check_computes(model: Any, ids: Tensor, dtype: torch.dtype) -> None:
    """Compute a text as it will be in use: in evaluation mode, without autocast, without a cache.

    Args:
        model: Loaded, wrapped by PEFT or not, in evaluation mode.
        ids: The text's tokens, int64 [1, S].
        dtype: What it computes in.

    Raises:
        UserError: It can't, or a token sees those behind it. After hours of training, or in the middle of a file, that
            would be late to learn.
    """
    seen = ids.shape[1] // 2
    behind = ids[:, :1].expand(-1, ids.shape[1] - seen)  # the first token over and over: one that means no image
    try:
        with torch.no_grad():
            texts = (ids, torch.cat([ids[:, :seen], behind], 1))
            one, other = (_logits(model, text)[:, seen // 2 : seen] for text in texts)
    except torch.OutOfMemoryError:
        raise
    except CANT_TAKE as error:
        raise cant_compute(model, error, dtype) from error
    # Most of the tokens just before: one that rounding sends to another expert is no reason to refuse a model.
    if seen and bool(torch.isfinite(one).all()) and differ([one], [other], dtype, most=False):
        raise UserError(
            f"{type(_bare(model)).__name__} is no causal language model: a token's logits change with those behind",
            rule="A token's loss asks for the next one, which must not be seen yet.",
            way_out="Take a chat model; some classes are one where their config says so (is_decoder, causal).",
        )


def differ(some: Sequence[Tensor], others: Sequence[Tensor], dtype: torch.dtype, *, most: bool = True) -> bool:
    """Whether tokens' logits differ by more than rounding, once other tokens stand beside them.

    For a mixture's experts these are other tokens to compute, whose sums may round otherwise and, in 16 bits, send a
    token elsewhere; what sees other tokens changes in nearly all places.

    Args:
        some: Logits [..., tokens, vocabulary].
        others: As many, of the same shapes.
        dtype: What they were computed in.
        most: In 32 bits, look at the token that changes most; else at the median.
    """
    scale = max(float(x.abs().max()) for x in some)
    changed = torch.cat([(a - b).abs().amax(-1).flatten() for a, b in zip(some, others, strict=True)])
    change = float(changed.max() if most and dtype == torch.float32 else changed.median())
    return not change <= 2 * ROUNDING[dtype] * scale  # where it is no number, too


def _logits(model: Any, ids: Tensor) -> Tensor:
    device = model.get_input_embeddings().weight.device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits.float()


def _bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cant_compute(model: Any, error: Exception, dtype: torch.dtype) -> UserError:
    """The refusal of a model that ended in ``error``."""
    others = ["--compute-dtype fp32"] if dtype != torch.float32 else []
    others += ["--quantization none"] if four_bit_formats(model) else []
    said = (str(error).splitlines() or [""])[0]
    return UserError(
        f"{type(_bare(model)).__name__} can't compute a document: {type(error).__name__}: {said}",
        rule="It was given text alone, as in use: input_ids, in evaluation mode.",
        way_out=f"In other numbers it may: {' or '.join(others)}." if others else "",
    )
