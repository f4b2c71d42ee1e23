"""Attention inside each document of a pack, for models that train on Transformers' own forward.

Transformers finds packed documents by their positions, in models that hand these to its mask functions, and then makes
a mask of T x T. Here the documents' lengths are known, and a mask is a note of them: :func:`pack_mask` stands where
models call ``create_causal_mask`` and its like, :func:`packed_attention` where they call
``ALL_ATTENTION_FUNCTIONS``. Both are registered under :data:`NAME` when they are first used, and a model has them
while :meth:`DocumentAttention.within` lasts. A model whose attention goes another way, or asks for something that isn't
computed here, ends in :class:`CannotPack` or in an error of its own: the proof in
:mod:`slimtune.training.isolation` sees it, and the run goes unpacked.

What is computed: causal attention, sliding windows, whatever pattern the model's mask function draws inside a document
(chunks), soft caps, attention sinks, grouped heads, values of another size than queries, dropout. On CUDA by the
engine's attention over cumulative lengths, without a mask; patterns other than windows, dropout and what the engine has
no kernel for document by document.

Shapes: T tokens, N heads, K kv heads, D head dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from slimtune.engine.attention import Attention, Documents, Way, choose

__all__ = ["NAME", "CannotPack", "DocumentAttention", "PackMask", "documents_of", "pack_mask", "packed_attention"]

NAME = "slimtune_packs"
_PACK: ContextVar[Documents | None] = ContextVar("slimtune_pack", default=None)
_KNOWN = frozenset({"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})
"""Tensors that models hand to their attention and that change nothing in it."""
_WHOLE = 512
"""Patterns of documents of up to so many tokens are looked at whole; of longer ones some queries."""


class CannotPack(Exception):
    """This model's attention over a pack can't be computed here; the text says what is in the way."""


def documents_of(lengths: tuple[int, ...], device: torch.device) -> Documents:
    """The documents of a pack, as attention takes them."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Documents(lengths, ends.to(device, non_blocking=True), max(lengths))


class DocumentAttention:
    """Attention inside documents, for one model instance and for as long as it is asked for.

    Args:
        model: A model of Transformers', wrapped by PEFT or not.
    """

    def __init__(self, model: nn.Module) -> None:
        owners = (module.config for module in model.modules() if isinstance(module, PreTrainedModel))
        self._configs: list[PretrainedConfig] = list({id(config): config for config in owners}.values())

    @contextmanager
    def within(self, documents: Documents) -> Iterator[None]:
        """While the body runs, the model attends inside ``documents``. The body holds the backward too."""
        AttentionInterface.register(NAME, packed_attention)
        AttentionMaskInterface.register(NAME, pack_mask)
        before = [config._attn_implementation for config in self._configs]
        token = _PACK.set(documents)
        try:
            for config in self._configs:
                config._attn_implementation_internal = NAME
            yield
        finally:
            _PACK.reset(token)
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = implementation


@dataclass(frozen=True)
class PackMask:
    """What a layer may see: keys of its own document, by a pattern."""

    documents: Documents
    mask_function: Callable[..., Any]
    """Transformers' (batch, head, query, key) -> allowed."""

    @cached_property
    def window(self) -> int | None:
        """The sliding window in tokens; None if there is none that matters here."""
        return self._pattern[0]

    @property
    def is_window(self) -> bool:
        """Whether the pattern is causal, with or without a sliding window."""
        return self._pattern[1]

    @cached_property
    def _pattern(self) -> tuple[int | None, bool]:
        """(window, whether that says it all), from the longest document: patterns are the same in all."""
        start, length = 0, 0
        for begin, end in self.bounds:
            if end - begin > length:
                start, length = begin, end - begin
        device = self.documents.boundaries.device
        last = self._allowed(torch.tensor([length - 1], device=device), start, length)
        seen = int(last.sum())
        queries = torch.arange(length, device=device)
        if length > _WHOLE:
            near = [0, 1, seen - 1, seen, seen + 1, length // 2, length - 2, length - 1]
            queries = torch.tensor(sorted({min(at, length - 1) for at in near}), device=device)
        distance = queries[:, None] - torch.arange(length, device=device)
        expected = (distance >= 0) & (distance < seen)
        is_window = bool((self._allowed(queries, start, length) == expected).all())
        return (seen if seen < length else None), is_window

    def _allowed(self, queries: Tensor, start: int, length: int) -> Tensor:
        """bool [queries, length]: what these queries of a document may see of it."""
        zero = torch.zeros((), dtype=torch.int64, device=queries.device)
        keys = torch.arange(start, start + length, device=queries.device)
        allowed: Tensor = self.mask_function(zero, zero, (queries + start)[:, None], keys[None])
        return allowed.expand(len(queries), length)

    @cached_property
    def patterns(self) -> list[Tensor]:
        """bool [1, 1, L, L] for each document."""
        device = self.documents.boundaries.device
        return [
            self._allowed(torch.arange(end - begin, device=device), begin, end - begin)[None, None]
            for begin, end in self.bounds
        ]

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Where each document begins and ends."""
        return list(itertools.pairwise(itertools.accumulate(self.documents.lengths, initial=0)))


def pack_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """A mask function of Transformers' (masking_utils.py, ``AttentionMaskInterface``) that makes a :class:`PackMask`.

    Raises:
        CannotPack: The call isn't for one whole pack.
    """
    documents = _PACK.get()
    if documents is None:  # another model of the process, that shares this one's config
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
    if (batch_size, q_length, kv_length, q_offset, kv_offset) != (1, documents.tokens, documents.tokens, 0, 0):
        raise CannotPack(f"its mask is made for {batch_size} x {q_length} x {kv_length} tokens")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise CannotPack("it masks tokens of a pack")
    return PackMask(documents, mask_function)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of Transformers' (modeling_utils.py, ``AttentionInterface``) over a pack.

    Args:
        module: The layer's attention.
        query: [1, N, T, D].
        key: [1, K, T, D].
        value: [1, K, T, another D].
        attention_mask: The :class:`PackMask` of the layer.
        scaling: Of the scores; by the head size unless given.
        dropout: Of the probabilities.
        softcap: Scores are softcap · tanh(score / softcap).
        s_aux: One sink a head, [N]: a score that takes its share of the probabilities and gives no value.
        is_causal: None, or True.
        kwargs: What else the model hands over. The mask has the window.

    Returns:
        [1, T, N, D of the values], and no attention weights.

    Raises:
        CannotPack: The mask isn't a pack's, or the model hands over something that changes attention.
    """
    if not isinstance(attention_mask, PackMask):
        raise CannotPack("its attention takes a mask of its own")
    strange = [name for name, given in kwargs.items() if isinstance(given, Tensor) and name not in _KNOWN]
    if strange or is_causal is False:
        raise CannotPack(f"its attention is told {strange[0] if strange else 'not to be causal'}")
    device = query.device
    if torch.is_autocast_enabled(device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(device.type)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout == 0.0 and attention_mask.is_window:
        way = _way(query, value, attention_mask.documents, softcap, s_aux)
        if way in _BY_LENGTHS:
            return _by_lengths(query, key, value, scale, attention_mask, way, softcap, s_aux), None
    made = [
        _document(
            query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end],
            scale, _seen(attention_mask, at, end - begin), softcap, s_aux, dropout,
        )
        for at, (begin, end) in enumerate(attention_mask.bounds)
    ]  # fmt: skip
    return torch.cat(made, 2).transpose(1, 2).contiguous(), None


# -- document by document ---------------------------------------------------------------------------------------------


def _seen(mask: PackMask, at: int, length: int) -> Tensor | None:
    """bool [1, 1, L, L] of a document; None if it is just causal."""
    causal = mask.is_window and (mask.window is None or mask.window >= length)
    return None if causal else mask.patterns[at]


def _document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    allowed: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """[1, N, L, D] of one document, by autograd."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(
            query, key, value, allowed, dropout, is_causal=allowed is None, scale=scale
        )
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if allowed is None:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    probabilities = torch.softmax(scores, -1).to(value.dtype)[..., : key.shape[2]]
    return functional.dropout(probabilities, dropout) @ value


# -- the engine's attention over cumulative lengths --------------------------------------------------------------------

_BY_LENGTHS = ("cudnn", "varlen", "triton")


def _way(query: Tensor, value: Tensor, documents: Documents, softcap: float | None, sinks: Tensor | None) -> Way:
    size = _padded_size(query, value)
    return choose(query.device, query.dtype, size, documents.lengths, softcap=softcap, sinks=sinks is not None)


def _padded_size(query: Tensor, value: Tensor) -> int:
    return -(-max(query.shape[-1], value.shape[-1]) // 8) * 8


def _by_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: PackMask,
    way: Way,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[1, T, N, D of the values]."""
    size = _padded_size(query, value)
    q, k, v = (functional.pad(x, (0, size - x.shape[-1])).squeeze(0).transpose(0, 1) for x in (query, key, value))
    kept = None if sinks is None else sinks.detach()
    attention = Attention(mask.documents, way, scale, mask.window, softcap, kept)
    o: Tensor = _ByLengths.apply(q, k, v, sinks, attention)
    return o[None, ..., : value.shape[-1]]


class _ByLengths(torch.autograd.Function):
    """The engine's attention for autograd. The sinks' gradient: ds = -Σ exp(s - logsumexp) (do · o) over the tokens."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attention: Attention) -> Tensor:
        """o [T, N, D] of q [T, N, D], k and v [T, K, D], sinks [N]."""
        o, saved = attention.forward(q, k, v)
        ctx.save_for_backward(q, k, v, o, sinks, *saved)
        ctx.attention = attention
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        """Gradients of q, k, v and the sinks."""
        q, k, v, o, sinks, *saved = ctx.saved_tensors
        do = do.contiguous()
        dq, dk, dv = ctx.attention.backward(do, q, k, v, o, tuple(saved))
        ds = None
        if sinks is not None and ctx.needs_input_grad[3]:
            share = torch.exp(sinks.float()[:, None] - saved[0]).transpose(0, 1)
            ds = -(share * (do.float() * o.float()).sum(-1)).sum(0).to(sinks.dtype)
        return dq, dk, dv, ds, None
