"""How a micro-batch's documents go through a model that trains on Transformers' own forward.

*packed*: one after the other, as one row; the model gets what keeps them apart (:mod:`slimtune.training.packs`, and
the arguments by which Transformers isolates the states of recurrent layers). *padded*: as rows, with an attention mask.
*alone*: one at a time. Loss and gradients are those of the documents one by one, whichever it is; which one a model
gets is found by :mod:`slimtune.training.isolation`.

For a harness, with ``model`` wrapped or not::

    layout = Layout(model, "packed")
    for piece in layout.pieces(batch):              # batch: MicroBatch.inputs(), on the host
        with layout.passed(piece) as inputs:        # the body holds the forward and the backward
            loss = model(**inputs, use_cache=False).loss

The documents' weights, if they have any, are :class:`LayoutTrainer`'s to apply: no model takes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimtune.batch import LENGTHS, WEIGHTS, MicroBatch
from slimtune.training.packs import DocumentAttention, documents_of
from slimtune.training.plain import PlainTrainer

__all__ = ["Kind", "Layout", "LayoutTrainer"]

Kind = Literal["packed", "padded", "alone"]


class Layout:
    """One model's way to take micro-batches.

    Args:
        model: A causal language model; wrapped by PEFT or not, on its device.
        kind: packed, padded or alone.
        boundaries: Packed: pass where documents begin and end as arguments too, for recurrent layers.
    """

    def __init__(self, model: nn.Module, kind: Kind, *, boundaries: bool = True) -> None:
        self.kind, self.boundaries = kind, boundaries
        self._attention = DocumentAttention(model)
        self._device = next(model.parameters()).device
        base: Any = getattr(model, "get_base_model", lambda: model)()
        parameters = inspect.signature(type(base).forward).parameters.values()
        self._takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self._takes = {parameter.name for parameter in parameters}

    def pieces(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """What goes through the model at once: all of a micro-batch, or each document that supervises something."""
        if self.kind != "alone":
            return [batch]
        micro = MicroBatch.of(batch)
        parts = micro.split(1)
        return [part.inputs() for part in [part for part in parts if part.supervised] or parts[:1]]

    @contextmanager
    def passed(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The model's inputs for a micro-batch or piece; forward and backward are the body's."""
        inputs = {key: value for key, value in batch.items() if key not in (LENGTHS, WEIGHTS)}
        if self.kind != "packed" or inputs["input_ids"].shape[0] > 1:
            yield inputs
            return
        lengths: tuple[int, ...] = batch[LENGTHS] if LENGTHS in batch else MicroBatch.of(batch).lengths
        documents = documents_of(lengths, self._device)
        if self.boundaries:
            inputs |= self._accepted(_boundaries(lengths, documents.boundaries))
        with self._attention.within(documents):
            yield inputs

    def _accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in arguments.items() if self._takes_any or name in self._takes}


def _boundaries(lengths: tuple[int, ...], ends: Tensor) -> dict[str, Any]:
    """The names by which Transformers' recurrent layers take them (as TRL's padding-free collator makes them)."""
    index = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": index[None].to(ends.device, non_blocking=True),
    }


@contextmanager
def _added_at_once(model: nn.Module) -> Iterator[None]:
    """What the body adds to the gradients is summed up first: so two ranks' sum is to the bit what one process adds
    up."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    yield
    for parameter, grad in zip(trained, before, strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)


class LayoutTrainer(PlainTrainer):
    """PlainTrainer whose micro-batches go through its model by :attr:`layout`, which is set before training."""

    layout: Layout

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch, forward and backward; the documents of each weight by themselves."""
        losses: list[Tensor] = []
        parts, items = [(1.0, inputs)], num_items_in_batch
        if WEIGHTS in inputs:
            micro = MicroBatch.of(inputs)
            items = micro.supervised if items is None else items
            parts = [(weight, part.inputs()) for weight, part in micro.by_weight()] or parts
        pieces = [(weight, piece) for weight, part in parts for piece in self.layout.pieces(part)]
        with _added_at_once(model) if len(pieces) > 1 else nullcontext():
            for weight, piece in pieces:
                # The loss is a sum over tokens, divided by the window's number of them.
                of = items if items is None else items / weight
                with self.layout.passed(piece) as passed:
                    losses.append(super().training_step(model, passed, of) / weight)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def evaluation_sum(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum of an evaluation batch's negative log-likelihoods, and the number of its supervised tokens."""
        sums: list[Tensor] = []
        supervised = 0
        for piece in self.layout.pieces(inputs):
            with self.layout.passed(piece) as passed:
                total, count = super().evaluation_sum(model, passed)
            sums.append(total)
            supervised += count
        return torch.stack(sums).sum(), supervised
