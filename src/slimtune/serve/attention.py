"""Attention of a batch of requests on a CPU: each request's queries over its own keys, and over no other's.

Continuous batching packs the tokens of all requests into one row. Transformers' SDPA path then computes every query
over every key of the batch and masks what is another request's: sixteen requests cost 256 times the attention of one.
Its flash path has no such waste, but needs a GPU. This is that path's interface (packed queries and keys, cumulative
lengths, no mask) by torch's attention for CPUs, one call a request.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache

__all__ = ["attend_by_request", "packed_attention"]

_NAME = "slimtune_packed"
# What Transformers' models hand over beside the usual.
_NOT_DONE = ("softcap", "s_aux", "position_bias")


def attend_by_request(model: PreTrainedModel) -> None:
    """Let ``model`` compute its attention by :func:`packed_attention` from now on.

    Called between making the manager, which accepts Transformers' own implementations only, and starting it, which
    asks whether masks are needed: they aren't.
    """
    AttentionInterface.register(_NAME, packed_attention)
    model.set_attn_implementation(_NAME)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    cache: PagedAttentionCache | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over packed requests, causal within each.

    Args:
        module: The layer's attention.
        query: New tokens' queries, [1, heads, tokens, head size].
        key: Their keys, [1, key heads, tokens, head size], if there is a ``cache``; else all keys, request by request.
        value: Their values, shaped as ``key``.
        attention_mask: None; there is nothing to mask between requests.
        cu_seq_lens_q: Where each request's queries begin and end, int32 [requests + 1].
        cache: The paged cache, which takes up the new keys and values and gives out all. None since Transformers 5.24,
            whose layers do that before they call their attention.
        scaling: Of the scores; by the head size unless given.
        sliding_window: Most keys that a query sees, itself included.
        kwargs: What else the model and the manager hand over: the cache's indices, and where each request's keys are.

    Returns:
        [1, tokens, heads, head size], and no attention weights.

    Raises:
        NotImplementedError: The model wants something of its attention that this one doesn't do.
    """
    for name in _NOT_DONE:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention by request has no {name}")
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    asking = itertools.pairwise(cu_seq_lens_q.tolist())
    asked = itertools.pairwise(kwargs["cu_seq_lens_k"].tolist())
    made = [
        _attention(query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], scaling, sliding_window)
        for (q0, q1), (k0, k1) in zip(asking, asked, strict=True)
    ]
    return torch.cat(made, 2).transpose(1, 2).contiguous(), None


def _attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One request's: ``query`` are its last tokens. Shapes as in :func:`packed_attention`."""
    _, heads, new, size = query.shape
    key_heads, length = key.shape[1:3]
    if new == 1:
        # The query heads that share a key head are that head's queries, so keys and values aren't repeated for them.
        # A window needs no mask: the cache gives out no more keys than it is wide.
        grouped = query.reshape(1, key_heads, heads // key_heads, size)
        made = functional.scaled_dot_product_attention(grouped, key, value, scale=scaling)
        return made.reshape(1, heads, 1, -1)
    seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    if window is not None:
        seen = seen.triu(length - new - window + 1)
    return functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True)
