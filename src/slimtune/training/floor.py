"""What a step has to compute at the least, and how fast this machine multiplies: the measure of a run's speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Floor", "Work"]

_PROBE_SECONDS = 0.1
_PROBE_TOKENS = 4096
"""Enough to fill any device; more would only take memory."""


@dataclass(frozen=True)
class Work:
    """The sizes that a dense decoder's own work follows from."""

    linear: int
    """Weights of its linear layers, without the head."""
    head: int
    """Weights of the head."""
    attention: int
    """Layers x heads x head dimension."""

    @classmethod
    def of(cls, model: Any) -> Work:
        """Count ``model``, a causal language model that isn't wrapped yet; a 4-bit weight counts as one weight."""
        config = model.config.get_text_config()
        head: Any = model.get_output_embeddings()
        linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            linear=sum(module.in_features * module.out_features for module in linears),
            head=head.in_features * head.out_features,
            attention=config.num_hidden_layers * config.num_attention_heads * head_dim,
        )

    def flops(self, lengths: Iterable[int], supervised: int) -> float:
        """Floating-point operations of a QLoRA step, forward and backward.

        A frozen weight is used once each way, 2 operations a token: its own gradient isn't needed. Causal attention
        takes two products forward and five backward over half of a document's square (FlashAttention-2,
        arXiv:2307.08691, section 4.1). What is computed again, and the adapters' fraction of a percent, don't count.

        Args:
            lengths: Tokens of each document.
            supervised: Supervised tokens; the head need see no others.
        """
        tokens = squares = 0
        for length in lengths:
            tokens += length
            squares += length * length
        return 4.0 * self.linear * tokens + 4.0 * self.head * supervised + 7.0 * self.attention * squares


@dataclass(frozen=True)
class Floor:
    """The least time that steps can take here: their work at the rate at which this machine multiplies."""

    work: Work
    flops_per_second: float
    """Of large products in the compute dtype, measured."""

    @classmethod
    def measure(cls, model: Any, dtype: torch.dtype, tokens: int) -> Floor:
        """Multiply matrices of the model's MLP for a tenth of a second.

        Args:
            model: As :meth:`Work.of` takes it; its sizes and its device.
            dtype: The compute dtype.
            tokens: Tokens in a micro-batch.
        """
        config = model.config.get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        device = model.get_input_embeddings().weight.device
        rows = min(tokens, _PROBE_TOKENS)
        # Random, as a GPU multiplies ones faster; by a generator of its own, so that the run's stays where it is.
        draw = torch.Generator(device)
        a = torch.randn(rows, config.hidden_size, dtype=dtype, device=device, generator=draw)
        b = torch.randn(config.hidden_size, inner, dtype=dtype, device=device, generator=draw)
        _multiply(a, b, 3)
        once = _multiply(a, b, 3) / 3
        times = max(3, round(_PROBE_SECONDS / once))
        seconds = _multiply(a, b, times)
        return cls(Work.of(model), 2.0 * rows * config.hidden_size * inner * times / seconds)

    def seconds(self, lengths: Iterable[int], supervised: int) -> float:
        """The least seconds for documents of these lengths."""
        return self.work.flops(lengths, supervised) / self.flops_per_second


def _multiply(a: torch.Tensor, b: torch.Tensor, times: int) -> float:
    """Seconds for so many products."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    wait: Callable[[], None] = torch.cuda.synchronize if a.device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        torch.mm(a, b, out=out)
    wait()
    return time.perf_counter() - begin
