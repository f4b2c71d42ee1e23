"""Causal attention inside each document, forward and backward, without autograd.

Five ways to compute it, chosen by :func:`choose`:

- ``cudnn``: all documents are rows of one length, and that a round one (a pack of full rows); PyTorch's cuDNN kernel,
  the fastest, which builds a plan for each new length: rows as long as their texts happen to be would pay for it at
  every step.
- ``varlen``: documents of any lengths one after the other; PyTorch's FlashAttention-2 with cumulative lengths, which
  it reads on the device, so a CUDA graph follows new lengths.
- ``efficient``: PyTorch's memory-efficient kernel, for what FlashAttention-2 doesn't take: a T4 and its like, 32 bits.
  Its memory grows with documents x the longest one: where there is room for that it takes all of them, and reads their
  boundaries on the device, as FlashAttention-2 does; else the host gives it a few neighbours at a time
  (:attr:`Documents.runs`).
- ``triton``: soft caps, sinks and heads of more than 256, which PyTorch's kernels don't take; slimtune's own kernel
  (:mod:`slimtune.engine.kernels.attention`), which reads the boundaries on the device.
- ``torch``: anything else (a CPU, 64 bits), document by document; PyTorch's flash kernel for CPUs, or plain matrix
  products where a sliding window is shorter than a document or scores have a soft cap. The host goes over the
  documents, so no CUDA graph can follow new lengths.

A kernel is compared with plain products once, on the device itself (:func:`is_right`), before it is taken where there
is another way. What is computed: :mod:`slimtune.engine.kernels.reference_attention`.

Shapes: T tokens, N heads, K kv heads, D head dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from slimtune.engine.kernels import attention as kernel
from slimtune.engine.kernels import attention_tiles
from slimtune.engine.kernels import reference_attention as reference
from slimtune.engine.kernels._triton import TritonError
from slimtune.engine.kernels.reference_attention import as_many_heads

__all__ = [
    "LONG",
    "ROUND",
    "Attention",
    "Documents",
    "Run",
    "Way",
    "choose",
    "compared",
    "expected_way",
    "heads_at_once",
    "is_right",
    "padded_tokens",
]

Way = Literal["cudnn", "varlen", "efficient", "triton", "torch"]

ROUND = 64
"""Rows of a multiple of this are taken for ones of a length that comes again, as ``max_length`` does."""
LONG = 16384
"""Tokens of a document from which cuDNN's plan for a length that is new, a tenth of a second, is less than what a
model's layers gain by it over FlashAttention-2 (H200: 11 ms a layer of 32 heads of 128)."""
_EFFICIENT_BLOCK = 64
_FILLING = 1 << 17
"""Tokens x query heads that fill a device: about a thousand blocks of 128 queries."""
_CAUSAL_FROM_TOP_LEFT = 1
"""The memory-efficient kernel's ``custom_mask_type``."""
_LAYOUTS: dict[tuple[Any, ...], tuple[int, ...]] = {}
"""Of o and do, the strides that cuDNN's backward was first given beside a layout of q, k and v."""
_NAMES: dict[Way, str] = {
    "cudnn": "cuDNN's attention",
    "varlen": "PyTorch's FlashAttention-2",
    "efficient": "PyTorch's memory-efficient attention",
    "triton": "slimtune's attention kernel",
}


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro-batch of T tokens lie."""

    lengths: tuple[int, ...]
    """Tokens of each, in order, known on the host; they sum to T."""
    boundaries: Tensor
    """int32 [n + 1 or more] on the device: 0, then each document's end; may go on repeating T."""
    longest: int
    """At least the longest document's tokens, at most T; what the grid of ``varlen`` and ``efficient`` is made for."""
    padded_room: int = 0
    """:func:`padded_tokens` that the memory-efficient kernel may take at once, if that is more than 2 T."""

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> Tensor:
        """int32 [T] on the device, which finds it by itself: the first token of each token's document."""
        places = torch.arange(self.tokens, dtype=torch.int32, device=self.boundaries.device)
        return self.boundaries[torch.searchsorted(self.boundaries, places, right=True) - 1]

    @cached_property
    def runs(self) -> list[Run]:
        """All documents, as the device sees them, if there is room; else neighbours that take at most 2 T, or one."""
        count = len(self.boundaries) - 1
        if padded_tokens(count, self.longest) <= self.padded_room:
            return [Run(slice(0, self.tokens), self.boundaries, self.longest)]
        limit, runs = 2 * self.tokens, []
        start = first = longest = 0
        at = 0
        for index, length in enumerate(self.lengths):
            if index > first and padded_tokens(index + 1 - first, max(longest, length)) > limit:
                runs.append(self._run(first, index, slice(start, at), longest))
                start, first, longest = at, index, 0
            at, longest = at + length, max(longest, length)
        runs.append(self._run(first, len(self.lengths), slice(start, at), longest))
        return runs

    def _run(self, first: int, end: int, tokens: slice, longest: int) -> Run:
        return Run(tokens, self.boundaries[first : end + 1] - self.boundaries[first], longest)


@dataclass(frozen=True)
class Run:
    """Neighbouring documents."""

    tokens: slice
    """Where they lie."""
    boundaries: Tensor
    """int32 [n + 1 or more] on the device: 0, then each document's end within the run; may go on repeating the last."""
    longest: int
    """At least the longest one's tokens."""


def padded_tokens(documents: int, longest: int) -> int:
    """What the memory-efficient kernel's sums are as large as: documents x the longest one in whole blocks."""
    return documents * -(-longest // _EFFICIENT_BLOCK) * _EFFICIENT_BLOCK


def heads_at_once(tokens: int, heads: int, kv_heads: int) -> int:
    """How many kv heads, with their query heads, :meth:`Attention.backward_in_place` takes at once."""
    wanted = -(-_FILLING * kv_heads // (tokens * heads))
    return next((count for count in range(wanted, kv_heads) if count and kv_heads % count == 0), kv_heads)


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    lengths: tuple[int, ...],
    *,
    softcap: float | None = None,
    sinks: bool = False,
) -> Way:
    """The fastest way that computes documents of these lengths on this device.

    Where deterministic kernels are asked for it isn't cuDNN's, whose backward adds up queries' gradients by atomics:
    torch refuses it then, but is asked for nothing where the kernel is called by its own name.
    """
    if device.type != "cuda":
        return "torch"
    ways = _ways_of(lengths, device, dtype, head_dim, softcap, sinks)
    for way in ways[:-1]:
        if is_right(way, device, dtype, head_dim, softcap is not None, sinks):
            return way
    return ways[-1]


def compared(
    device: torch.device,
    dtype: torch.dtype,
    scores: Iterable[tuple[int, float | None, bool]],
    packs: Collection[tuple[int, ...]] = (),
) -> dict[str, bool]:
    """The kernels that :func:`choose` takes on this device and has compared with plain products, by their names.

    Args:
        device: Where attention is computed.
        dtype: In which.
        scores: Head dimension, soft cap, and whether there are sinks, of each kind of attention.
        packs: Lengths of documents that come together, beside those of no order.

    Returns:
        Whether each is right; empty where nothing but plain products is taken.
    """
    found: dict[str, bool] = {}
    for head_dim, softcap, sinks in scores if device.type == "cuda" else ():
        for lengths in {(1, 2), *packs}:
            for way in _ways_of(lengths, device, dtype, head_dim, softcap, sinks)[:-1]:
                right = is_right(way, device, dtype, head_dim, softcap is not None, sinks)
                found[_NAMES[way]] = right and found.get(_NAMES[way], True)
                if right:
                    break
    return found


def expected_way(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, *, softcap: float | None, sinks: bool
) -> Way:
    """What :func:`choose` takes for packs on a device that isn't here, if its kernels are right there."""
    return _ways(capability, dtype, head_dim, softcap, sinks)[0]


def _ways_of(
    lengths: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softcap: float | None,
    sinks: bool,
) -> tuple[Way, ...]:
    """What may compute documents of these lengths on a GPU that is here, as :func:`_ways`."""
    ways = _ways(torch.cuda.get_device_capability(device), dtype, head_dim, softcap, sinks)
    rows = len(set(lengths)) == 1 and lengths[0] % ROUND == 0 and head_dim <= 128
    if ways[0] == "varlen" and rows and not torch.are_deterministic_algorithms_enabled():
        return "cudnn", *ways
    return ways


def _ways(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, softcap: float | None, sinks: bool
) -> tuple[Way, ...]:
    """What may compute packs on a GPU, the fastest first; all but the last are tried there before they are taken."""
    old = capability[0] < 8  # FlashAttention-2's, cuDNN's and bf16's kernels begin there
    if dtype == torch.float64 or (old and dtype == torch.bfloat16):
        return ("torch",)
    narrow = old or dtype == torch.float32
    flash = softcap is None and head_dim % 8 == 0 and head_dim <= 256 and not narrow
    if flash and not sinks:
        return "varlen", "torch"
    last: Way = "varlen" if flash else "torch"
    if softcap is not None or sinks or head_dim % 8:
        return "triton", last
    return ("efficient", "triton", last) if narrow else ("triton", "efficient", last)


@dataclass(frozen=True)
class Attention:
    """One layer's attention over given documents.

    Args:
        documents: The documents.
        way: How to compute it.
        scale: What the scores are multiplied with.
        window: Sliding window in tokens, or None.
        softcap: Scores are softcap · tanh(score / softcap); None: as they are. By ``triton`` and ``torch`` alone.
        sinks: One logit a query head, [N], that takes its share of the softmax and gives no value; frozen here.
            By ``triton``, ``varlen`` and ``torch`` alone, whose logsumexp they are put into.
    """

    documents: Documents
    way: Way
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and self.way not in ("triton", "torch"):
            raise ValueError(f"{self.way} attention has no soft cap")
        if self.sinks is not None and self.way not in ("triton", "varlen", "torch"):
            raise ValueError(f"{self.way} attention has no sinks")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """o [T, N, D] of q [T, N, D], k and v [T, K, D], and what the backward needs besides them."""
        if self.way == "varlen":
            return self._varlen_forward(q, k, v)
        if self.way == "triton":
            o, logsumexp = kernel.attention_forward(
                q, k, v, self.documents.boundaries, window=self.window, sinks=self.sinks, **self._scores
            )
            return o, (logsumexp,)
        if self.way == "efficient":
            return self._efficient_forward(q, k, v)
        if self.way == "cudnn" and not self._windowed(self.documents.longest):
            return self._cudnn_forward(q, k, v)
        if self.way == "cudnn":
            return self._varlen_forward(q, k, v)
        return self._torch_forward(q, k, v)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq [T, N, D], dk and dv [T, K, D]."""
        if self.way == "torch":
            return self._torch_backward(do, q, k, v, o, saved)
        if self.way == "triton":
            ends = self.documents.boundaries
            return kernel.attention_backward(do, q, k, v, o, saved[0], ends, window=self.window, **self._scores)
        if self.way == "efficient":
            return self._efficient_backward(do, q, k, v, o, saved)
        if self.way == "cudnn" and not self._windowed(self.documents.longest):
            return self._cudnn_backward(do, q, k, v, o, saved)
        return self._varlen_backward(do, q, k, v, o, saved)

    def backward_in_place(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...]) -> None:
        """As :meth:`backward`, by groups of kv heads with their query heads; q, k and v become their gradients.

        What a kernel takes beside its arguments, sums in float32 and keys' gradients for each query head, is a group's.
        """
        kv_heads, each = k.shape[1], q.shape[1] // k.shape[1]
        count = heads_at_once(q.shape[0], q.shape[1], kv_heads)
        for first in range(0, kv_heads, count):
            kv, heads = slice(first, first + count), slice(first * each, (first + count) * each)
            group = q[:, heads], k[:, kv], v[:, kv]
            gradients = self.backward(do[:, heads], *group, o[:, heads], self._of_heads(saved, heads))
            for x, gradient in zip(group, gradients, strict=True):
                x.copy_(gradient)

    def _of_heads(self, saved: tuple[Any, ...], heads: slice) -> tuple[Any, ...]:
        """What the forward saved, of some query heads."""
        if self.way == "torch":
            return tuple(logsumexp[:, heads] for logsumexp in saved)
        if self.way == "efficient":
            return tuple((logsumexp[:, heads], *rest) for logsumexp, *rest in saved)
        logsumexp, *rest = saved
        rows = self.way == "cudnn" and not self._windowed(self.documents.longest)
        return (logsumexp[:, heads] if rows else logsumexp[heads], *rest)

    def _windowed(self, length: int) -> bool:
        return self.window is not None and self.window < length

    @property
    def _scores(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap}

    def _sunk(self, o: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
        """o [..., N, L, D] and logsumexp [..., N, L] when the sinks have taken their share.

        Of a softmax whose logsumexp is l a sink s leaves sigmoid(l - s), and the logsumexp is log(exp(l) + exp(s)). A
        backward that is given these two is right as it is.
        """
        if self.sinks is None:
            return o, logsumexp
        sinks = self.sinks.to(logsumexp.dtype)[:, None]
        return o * torch.sigmoid(logsumexp - sinks)[..., None].to(o.dtype), torch.logaddexp(logsumexp, sinks)

    # -- FlashAttention-2 over cumulative lengths ---------------------------------------------------------------------

    def _varlen_options(self) -> dict[str, Any]:
        left = self.window - 1 if self.window is not None and self._windowed(self.documents.longest) else None
        return {
            "scale": self.scale,
            "window_size_left": left,
            "window_size_right": None if left is None else 0,
        }

    def _varlen_forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        ends, longest = self.documents.boundaries, self.documents.longest
        o, logsumexp, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, ends, ends, longest, longest, 0.0, True, False, **self._varlen_options()
        )
        o, logsumexp = self._sunk(o.transpose(0, 1), logsumexp)
        return o.transpose(0, 1), (logsumexp, rng, unused)

    def _varlen_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        ends, longest = self.documents.boundaries, self.documents.longest
        logsumexp, rng, unused = saved
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do, q, k, v, o, logsumexp, ends, ends, longest, longest, 0.0, True, rng, unused, **self._varlen_options()
        )
        return dq, dk, dv

    # -- the memory-efficient kernel over cumulative lengths ----------------------------------------------------------

    def _efficient_options(self, run: Run) -> dict[str, Any]:
        return {"scale": self.scale, "window_size": self.window if self._windowed(run.longest) else None}

    def _efficient_forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        saved = []
        for run in self.documents.runs:
            parts = [as_many_heads(x[run.tokens], q.shape[1])[None] for x in (q, k, v)]
            piece, logsumexp, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
                *parts, None, run.boundaries, run.boundaries, run.longest, run.longest, 0.0, _CAUSAL_FROM_TOP_LEFT,
                True, **self._efficient_options(run),
            )  # fmt: skip
            o[run.tokens] = piece[0]
            saved.append((logsumexp, seed, offset))
        return o, tuple(saved)

    def _efficient_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        for run, (logsumexp, seed, offset) in zip(self.documents.runs, saved, strict=True):
            do_, q_, k_, v_ = (as_many_heads(x[run.tokens], q.shape[1])[None] for x in (do, q, k, v))
            # The kernel takes o for contiguous without a look at its strides (torch 2.11, kernel_backward.h).
            o_ = o[run.tokens].contiguous()[None]
            *pieces, _ = torch.ops.aten._efficient_attention_backward(
                do_, q_, k_, v_, None, o_, run.boundaries, run.boundaries, run.longest, run.longest, logsumexp, 0.0,
                seed, offset, _CAUSAL_FROM_TOP_LEFT, False, **self._efficient_options(run),
            )  # fmt: skip
            for grad, piece in zip(grads, pieces, strict=True):
                grad[run.tokens] = _summed_heads(piece[0], grad.shape[1])
        return grads[0], grads[1], grads[2]

    # -- cuDNN over rows of one length --------------------------------------------------------------------------------

    def _rows(self, x: Tensor) -> Tensor:
        """[T, heads, D] as [rows, heads, row length, D], the same memory."""
        length = self.documents.longest
        return x.view(-1, length, *x.shape[1:]).transpose(1, 2)

    def _cudnn_forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(
            self._rows(q), self._rows(k), self._rows(v), None, True, 0.0, True, False, scale=self.scale
        )
        o, logsumexp, _, _, _, _, seed, offset, _ = result
        return o.transpose(1, 2).flatten(0, 1), (logsumexp, seed, offset)

    def _cudnn_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logsumexp, seed, offset = saved
        length = self.documents.longest
        do_, q_, k_, v_, o_ = (self._rows(x) for x in (do, q, k, v, o))
        laid_out = (q.device, q.dtype, *((x.shape, x.stride()) for x in (q_, k_, v_)))
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _laid_out(do_, "do", *laid_out), q_, k_, v_, _laid_out(o_, "o", *laid_out), logsumexp, seed, offset,
            None, None, None, length, length, 0.0, True, scale=self.scale,
        )  # fmt: skip
        dq, dk, dv = (grad.transpose(1, 2).flatten(0, 1) for grad in grads)
        return dq, dk, dv

    # -- document by document -----------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[slice, int]]:
        """(tokens, rows): neighbouring documents of one length are computed together, as rows."""
        start, index, lengths = 0, 0, self.documents.lengths
        while index < len(lengths):
            rows = 1
            while index + rows < len(lengths) and lengths[index + rows] == lengths[index]:
                rows += 1
            if lengths[index]:
                yield slice(start, start + rows * lengths[index]), rows
            start += rows * lengths[index]
            index += rows

    def _torch_forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        saved = []
        for tokens, rows in self._pieces():
            q_, k_, v_ = (_as_rows(x[tokens], rows, q.shape[1]) for x in (q, k, v))
            if self._by_flash_kernel(q_):
                piece, logsumexp = self._sunk(
                    *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_, k_, v_, 0.0, True, scale=self.scale)
                )
            else:
                hidden = reference.hidden_in(q_.shape[2], self.window, q.device)
                piece, logsumexp = reference.plain_forward(q_, k_, v_, hidden, sinks=self.sinks, **self._scores)
            o[tokens] = piece.transpose(1, 2).flatten(0, 1)
            saved.append(logsumexp)
        return o, tuple(saved)

    def _torch_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        for (tokens, rows), logsumexp in zip(self._pieces(), saved, strict=True):
            do_, q_, k_, v_, o_ = (_as_rows(x[tokens], rows, q.shape[1]) for x in (do, q, k, v, o))
            if self._by_flash_kernel(q_):
                piece = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    do_, q_, k_, v_, o_, logsumexp, 0.0, True, scale=self.scale
                )
            else:
                hidden = reference.hidden_in(q_.shape[2], self.window, q.device)
                piece = reference.plain_backward(do_, q_, k_, v_, o_, logsumexp, hidden, **self._scores)
            for grad, part in zip(grads, piece, strict=True):
                grad[tokens] = _summed_heads(part.transpose(1, 2).flatten(0, 1), grad.shape[1])
        return grads[0], grads[1], grads[2]

    def _by_flash_kernel(self, q: Tensor) -> bool:
        return q.device.type == "cpu" and self.softcap is None and not self._windowed(q.shape[2])


@cache
def is_right(
    way: Way, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool = False, sinks: bool = False
) -> bool:
    """Whether a kernel computes on this device what plain products in float32 do.

    Each architecture, dtype and head dimension has a kernel of its own, and no one has tried them all with documents
    packed like these. Its backward is tried twice, with o and its gradient laid out otherwise, as layers' are. Draws
    from a generator of its own.
    """
    if way == "triton" and not attention_tiles.fits(device, dtype, head_dim):
        return False
    lengths, heads = (2 * ROUND,) * 2 if way == "cudnn" else (150, 9, 64, 1, 32), 2
    tokens, columns = sum(lengths), heads * head_dim
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, tokens, columns + 8, generator=generator).to(device, dtype)
    # Rows of wider buffers, as the engine's are; both query heads share a kv head.
    q, k, v, do = (x[:, :columns].view(tokens, heads, head_dim) for x in wide)
    ends = torch.tensor([0, *lengths, 0]).cumsum(0).int().to(device)
    longest = lengths[0] if way == "cudnn" else tokens
    documents = Documents(lengths, ends, longest, padded_room=padded_tokens(len(ends), tokens))
    extra: dict[str, Any] = {
        "softcap": 2.0 if softcap else None,
        "sinks": torch.tensor([0.5, -1.0], device=device) if sinks else None,
    }

    def computed(way: Way, dtype: torch.dtype, window: int | None) -> list[Tensor]:
        attention = Attention(documents, way, head_dim**-0.5, window, **extra)
        q_, k_, v_, do_ = (x.to(dtype) for x in (q, k[:, :1], v[:, :1], do))
        o, saved = attention.forward(q_, k_, v_)
        in_wide = torch.nn.functional.pad(o.flatten(1), (0, 8))[:, :columns].view(o.shape)
        # The close one first: whatever reads the other one by its strides stays inside of it.
        first = attention.backward(do_.contiguous(), q_, k_, v_, o.contiguous(), saved)
        again = attention.backward(do_, q_, k_, v_, in_wide, saved)
        return [x.float() for x in (o, *first, *again)]

    bound = 1e-4 if dtype == torch.float32 else 2e-2
    try:
        right = all(
            bool((a - b).norm() <= bound * b.norm())
            for window in ((None,) if way == "cudnn" else (None, 40))  # in a window it isn't cuDNN's that computes
            for a, b in zip(computed(way, dtype, window), computed("torch", torch.float32, window), strict=True)
        )
    except torch.OutOfMemoryError:  # which says nothing of the kernel
        raise
    except (RuntimeError, TritonError):  # no kernel for it
        right = False
    if not right:
        warnings.warn(
            f"{_NAMES[way]} is wrong on {device} in {dtype}, head dimension {head_dim}: another way is taken, "
            "plain products at last, which are slower",
            stacklevel=2,
        )
    return right


def _laid_out(x: Tensor, *beside: Any) -> Tensor:
    """x with the strides that it had when it was first beside these: itself, or a copy.

    torch 2.11 keeps cuDNN's plan by the sizes and strides of q, k and v, and the plan reads o and do by
    those that they had when it was made: with others it computes something else, and says nothing. They have others
    where layers differ in o's adapters, and where a layer's o is in FP8 now and in 16 bits then.
    """
    strides = _LAYOUTS.setdefault(beside, x.stride())
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _as_rows(x: Tensor, rows: int, heads: int) -> Tensor:
    """[rows x length, heads or fewer, D] as [rows, heads, length, D]; kv heads are repeated for their query heads."""
    return as_many_heads(x, heads).reshape(rows, -1, heads, x.shape[2]).transpose(1, 2)


def _summed_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """[T, heads, D] as [T, kv heads, D]: the gradients of query heads that share a kv head add up."""
    return grad if grad.shape[1] == kv_heads else grad.view(grad.shape[0], kv_heads, -1, grad.shape[2]).sum(2)
