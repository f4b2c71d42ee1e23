"""What a step has to compute at the least, and how fast this machine multiplies: the measure of a run's speed."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimtune.families import decoder_of

__all__ = ["Floor", "Work"]

_PROBE_SECONDS = 0.1
_PROBE_TOKENS = 4096
"""Enough to fill any device; more would only take memory."""


@dataclass(frozen=True)
class Work:
    """The sizes that a decoder's own work follows from, counted on its modules.

    Recurrences of state-space and linear-attention layers don't count: a part of a percent, and the rest is a floor.
    """

    linear: int
    """Weights that one token is multiplied with, without the head: of experts, those of a token's own ones."""
    head: int
    """Weights of the head."""
    attention: Mapping[int | None, int]
    """Heads x head dimension, summed over the attention layers that see so many tokens back; None: all of them."""
    largest: tuple[int, int] = (0, 0)
    """(inputs, outputs) of the largest linear layer."""

    @classmethod
    def of(cls, model: Any) -> Work | None:
        """Count ``model``, a causal language model that isn't wrapped yet; a 4-bit weight counts as one weight.

        Returns:
            None where the model's modules don't say how much of it a token sees.
        """
        config = model.config.get_text_config()
        head: Any = model.get_output_embeddings()
        linear, attention = 0, Counter[int | None]()
        largest: tuple[int, ...] = (0, 0)
        decoder = decoder_of(model)  # an image-text model's towers have no part in a step on text
        for name, module in decoder.named_modules():
            if module is head or isinstance(module, nn.Embedding):
                continue
            for parameter in module.parameters(recurse=False):
                shape = _shape(parameter)
                if len(shape) < 2:
                    continue
                experts = _experts(decoder, name, shape)
                share = _experts_of_a_token(module, config) / experts if experts else 1.0
                if not share:
                    return None
                linear += round(math.prod(shape) * share)
                largest = max(largest, shape[-2:], key=math.prod)
            layer = _layer_config(module, config)
            if width := _attention_width(module, layer):
                attention[_window(module, layer)] += width
        if not linear:
            return None
        weights = 0 if head is None else math.prod(_shape(head.weight))
        return cls(linear, weights, dict(attention), (largest[1], largest[0]))

    def flops(self, lengths: Iterable[int], supervised: int) -> float:
        """Floating-point operations of a QLoRA step, forward and backward.

        A frozen weight is used once each way, 2 operations a token: its own gradient isn't needed. Causal attention
        takes two products forward and five backward over half of a document's square (FlashAttention-2,
        arXiv:2307.08691, section 4.1), less what a window leaves out. What is computed again, and the adapters'
        fraction of a percent, don't count.

        Args:
            lengths: Tokens of each document.
            supervised: Supervised tokens; the head need see no others.
        """
        lengths = list(lengths)
        return 4.0 * self.linear * sum(lengths) + 4.0 * self.head * supervised + 7.0 * self.squares(lengths)

    def squares(self, lengths: Iterable[int]) -> float:
        """Of attention, one product over half of each document's square counting once: 2 operations a pair."""
        lengths = list(lengths)
        return sum(
            width * sum(n * n if window is None or n <= window else 2 * n * window - window * window for n in lengths)
            for window, width in self.attention.items()
        )


def _shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a weight, or of what a 4-bit weight stands for."""
    return tuple(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))


def _experts(decoder: Any, name: str, shape: tuple[int, ...]) -> int:
    """How many experts stand beside the one that a module belongs to, or in its stack of them; 0 for other modules."""
    among = re.search(r"(.*\bexperts)\.\d+\b", name)
    if among is not None:
        return len(decoder.get_submodule(among[1]))
    return shape[0] if len(shape) == 3 and "conv" not in name and shape[0] > 1 else 0


def _experts_of_a_token(experts: nn.Module, config: Any) -> int:
    """How many of a stack of experts one token goes through; 0 where neither module nor config says so.

    The names are those of Transformers 5.23's configs.
    """
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
    found = (_setting(owner, name) for owner in (config, experts) for name in names)
    return next((count for count in found if isinstance(count, int) and count > 0), 0)


def _attention_width(module: nn.Module, config: Any) -> int:
    """Heads x head dimension of an attention module; 0 for any other, linear attention (with a convolution) too.

    Where queries and values differ in width (latent attention), the mean: each is in half of the products.
    """
    own = vars(module)
    if "ttention" not in type(module).__name__ or any(isinstance(part, nn.Conv1d) for part in module.children()):
        return 0
    values = own.get("v_head_dim", own.get("head_dim"))
    queries = own.get("qk_head_dim", values)
    heads = own.get("num_heads") or own.get("num_attention_heads") or _setting(config, "num_attention_heads")
    if isinstance(values, int) and isinstance(queries, int) and isinstance(heads, int):
        return heads * (queries + values) // 2
    return 0


def _window(module: nn.Module, config: Any) -> int | None:
    """Tokens that a layer sees back; None: all. Without kinds of layers the config's window is every layer's."""
    if "sliding_window" in vars(module) or _setting(config, "layer_types"):
        return vars(module).get("sliding_window")
    window: int | None = _setting(config, "sliding_window")
    return window


def _layer_config(module: nn.Module, config: Any) -> Any:
    """The config of the layer that a module belongs to, where layers differ (Transformers 5.23)."""
    index = vars(module).get("layer_idx")
    if not getattr(config, "is_heterogeneous", False) or not isinstance(index, int):
        return config
    return config.per_layer_config[index]


def _setting(owner: Any, name: str) -> Any:
    """A config's or a module's own value, or None. Transformers refuses to read what differs between layers."""
    return vars(owner).get(getattr(owner, "attribute_map", {}).get(name, name))


@dataclass(frozen=True)
class Floor:
    """The least time that steps can take here: their work at the rate at which this machine multiplies."""

    work: Work
    flops_per_second: float
    """Of large products in the compute dtype, measured."""

    @classmethod
    def measure(cls, model: Any, dtype: torch.dtype, tokens: int) -> Floor | None:
        """Multiply matrices of the model's largest linear layer for a tenth of a second.

        Args:
            model: As :meth:`Work.of` takes it; its sizes and its device.
            dtype: The compute dtype.
            tokens: Tokens in a micro-batch.

        Returns:
            None where the model's work can't be counted: a run has no measure of its speed then, and is no worse.
        """
        work = Work.of(model)
        if work is None:
            return None
        inputs, outputs = work.largest
        device = model.get_input_embeddings().weight.device
        rows = min(tokens, _PROBE_TOKENS)
        # Random, as a GPU multiplies ones faster; by a generator of its own, so that the run's stays where it is.
        draw = torch.Generator(device)
        a = torch.randn(rows, inputs, dtype=dtype, device=device, generator=draw)
        b = torch.randn(inputs, outputs, dtype=dtype, device=device, generator=draw)
        _multiply(a, b, 3)
        once = _multiply(a, b, 3) / 3
        times = max(3, round(_PROBE_SECONDS / once))
        seconds = _multiply(a, b, times)
        return cls(work, 2.0 * rows * inputs * outputs * times / seconds)

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
