"""Causal attention inside each document, forward and backward, without autograd.

Four ways to compute it, chosen by :func:`choose`:

- ``cudnn``: all documents are rows of one length, and that a round one (a pack of full rows); PyTorch's cuDNN kernel,
  the fastest, which builds a plan for each new length: rows as long as their texts happen to be would pay for it at
  every step.
- ``varlen``: documents of any lengths one after the other; PyTorch's FlashAttention-2 with cumulative lengths, which
  it reads on the device, so a CUDA graph follows new lengths.
- ``efficient``: PyTorch's memory-efficient kernel, for what FlashAttention-2 doesn't take: a T4 and its like, 32 bits.
  It is compared with plain products once, on the device itself (:func:`efficient_is_right`). Its memory grows with
  documents x the longest one: where there is room for that it takes all of them, and reads their boundaries on the
  device, as FlashAttention-2 does; else the host gives it a few neighbours at a time (:attr:`Documents.runs`).
- ``torch``: anything else (a CPU, 64 bits), document by document; PyTorch's flash kernel for CPUs, or plain matrix
  products where a sliding window is shorter than a document. The host goes over the documents, so no CUDA graph can
  follow new lengths.

Shapes: T tokens, N heads, K kv heads, D head dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["ROUND", "Attention", "Documents", "Run", "Way", "choose", "efficient_is_right", "padded_tokens"]

Way = Literal["cudnn", "varlen", "efficient", "torch"]

ROUND = 64
"""Rows of a multiple of this are taken for ones of a length that comes again, as ``max_length`` does."""
_EFFICIENT_BLOCK = 64
_CAUSAL_FROM_TOP_LEFT = 1
"""The memory-efficient kernel's ``custom_mask_type``."""


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


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, lengths: tuple[int, ...]) -> Way:
    """The fastest way that computes documents of these lengths on this device."""
    if device.type != "cuda" or dtype == torch.float64 or head_dim % 8:
        return "torch"
    old = torch.cuda.get_device_capability(device)[0] < 8  # FlashAttention-2's, cuDNN's and bf16's kernels begin there
    if old and dtype == torch.bfloat16:
        return "torch"
    if old or dtype == torch.float32 or head_dim > 256:
        return "efficient" if efficient_is_right(device, dtype, head_dim) else "torch"
    if len(set(lengths)) == 1 and lengths[0] % ROUND == 0 and head_dim <= 128:
        return "cudnn"
    return "varlen"


@dataclass(frozen=True)
class Attention:
    """One layer's attention over given documents.

    Args:
        documents: The documents.
        way: How to compute it.
        scale: What the scores are multiplied with.
        window: Sliding window in tokens, or None.
    """

    documents: Documents
    way: Way
    scale: float
    window: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """o [T, N, D] of q [T, N, D], k and v [T, K, D], and what the backward needs besides them."""
        if self.way == "varlen":
            return self._varlen_forward(q, k, v)
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
        if self.way == "efficient":
            return self._efficient_backward(do, q, k, v, o, saved)
        if self.way == "cudnn" and not self._windowed(self.documents.longest):
            return self._cudnn_backward(do, q, k, v, o, saved)
        return self._varlen_backward(do, q, k, v, o, saved)

    def _windowed(self, length: int) -> bool:
        return self.window is not None and self.window < length

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
        return o, (logsumexp, rng, unused)

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
            parts = [_as_many_heads(x[run.tokens], q.shape[1])[None] for x in (q, k, v)]
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
            do_, q_, k_, v_ = (_as_many_heads(x[run.tokens], q.shape[1])[None] for x in (do, q, k, v))
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
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            self._rows(do), self._rows(q), self._rows(k), self._rows(v), self._rows(o), logsumexp, seed, offset,
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
            parts = [_as_rows(x[tokens], rows, q.shape[1]) for x in (q, k, v)]
            if self._by_flash_kernel(parts[0]):
                piece, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *parts, 0.0, True, scale=self.scale
                )
            else:
                probabilities, logsumexp = self._probabilities(parts[0], parts[1], None)
                piece = probabilities @ parts[2]
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
                piece = self._plain_backward(do_, q_, k_, v_, o_, logsumexp)
            for grad, part in zip(grads, piece, strict=True):
                grad[tokens] = _summed_heads(part.transpose(1, 2).flatten(0, 1), grad.shape[1])
        return grads[0], grads[1], grads[2]

    def _by_flash_kernel(self, q: Tensor) -> bool:
        return q.device.type == "cpu" and not self._windowed(q.shape[2])

    def _probabilities(self, q: Tensor, k: Tensor, logsumexp: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32)) * self.scale
        position = torch.arange(q.shape[2], device=q.device)
        distance = position[:, None] - position
        hidden = distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)
        scores = scores.masked_fill(hidden, -torch.inf)
        logsumexp = torch.logsumexp(scores, dim=-1) if logsumexp is None else logsumexp
        return torch.exp(scores - logsumexp[..., None]).to(q.dtype), logsumexp

    def _plain_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        p, _ = self._probabilities(q, k, logsumexp)
        dp = do @ v.transpose(2, 3)
        ds = p * (dp - (do * o).sum(-1, keepdim=True)) * self.scale
        return ds @ k, ds.transpose(2, 3) @ q, p.transpose(2, 3) @ do


@cache
def efficient_is_right(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the memory-efficient kernel computes on this device what plain products in float32 do.

    Each architecture, dtype and head dimension has a kernel of its own, and no one has tried them all with documents
    packed like these. Draws from a generator of its own.
    """
    lengths, heads = (150, 9, 64, 1, 32), 2
    tokens, columns = sum(lengths), heads * head_dim
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, tokens, columns + 8, generator=generator).to(device, dtype)
    # Rows of wider buffers, as the engine's are.
    q, k, v, do = (x[:, :columns].view(tokens, heads, head_dim) for x in wide)
    ends = torch.tensor([0, *lengths, 0]).cumsum(0).int().to(device)
    documents = Documents(lengths, ends, tokens, padded_room=padded_tokens(len(ends), tokens))

    def computed(way: Way, dtype: torch.dtype) -> list[Tensor]:
        attention = Attention(documents, way, head_dim**-0.5)
        q_, k_, v_, do_ = (x.to(dtype) for x in (q, k, v, do))
        o, saved = attention.forward(q_, k_, v_)
        o = torch.nn.functional.pad(o.flatten(1), (0, 8))[:, :columns].view(o.shape)
        return [x.float() for x in (o, *attention.backward(do_, q_, k_, v_, o, saved))]

    try:
        pairs = zip(computed("efficient", dtype), computed("torch", torch.float32), strict=True)
        bound = 1e-4 if dtype == torch.float32 else 2e-2
        right = all(bool((a - b).norm() <= bound * b.norm()) for a, b in pairs)
    except RuntimeError:  # no kernel for it
        right = False
    if not right:
        warnings.warn(
            f"PyTorch's memory-efficient attention is wrong on {device} in {dtype}, head dimension {head_dim}: "
            "plain products are taken, which are slower",
            stacklevel=2,
        )
    return right


def _as_rows(x: Tensor, rows: int, heads: int) -> Tensor:
    """[rows x length, heads or fewer, D] as [rows, heads, length, D]; kv heads are repeated for their query heads."""
    return _as_many_heads(x, heads).reshape(rows, -1, heads, x.shape[2]).transpose(1, 2)


def _as_many_heads(x: Tensor, heads: int) -> Tensor:
    """[T, heads or fewer, D] as [T, heads, D]; kv heads are repeated for their query heads."""
    if x.shape[1] == heads:
        return x
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], -1).reshape(x.shape[0], heads, x.shape[2])


def _summed_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """[T, heads, D] as [T, kv heads, D]: the gradients of query heads that share a kv head add up."""
    return grad if grad.shape[1] == kv_heads else grad.view(grad.shape[0], kv_heads, -1, grad.shape[2]).sum(2)
