"""A Trainer that is one rank of several: each computes its micro-batches of a step, and what they come to is summed.

Once a step, before the gradient is clipped, the ranks sum it and tell each other a few numbers: the losses of their
micro-batches, a sum over the adapter's bits, whether a stop was asked for, whether one of them had to give up. From
there on every rank sees the same and decides alike. Alone it is the Trainer as it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from slimtune.errors import GuardStop
from slimtune.ranks.group import ALONE, Ranks
from slimtune.ranks.meeting import as_told, word_of
from slimtune.ranks.share import Share

__all__ = ["RankedTrainer"]

_FACTS = 5
"""Numbers that a rank tells behind its losses: the sum of its adapter's bits, in words of 16, which float64 holds to
the bit; its own gradient's sum, which is no number if one of its values isn't; whether a stop was asked for; pieces;
whether it gave up."""


class RankedTrainer(Trainer):
    """The mixin; :attr:`ranks` and :attr:`share` are set before training."""

    ranks: Ranks = ALONE
    share: Share
    data: Any
    evaluation: Any
    engine: Any = None
    model: Any
    safety: Any
    progress: Any
    state: Any
    _step_losses: list[Tensor]
    _step_logs: dict[str, Any]
    _tr_loss: Tensor
    _epoch: Iterator[Any] | None = None
    """Where the micro-batches come from, and those of the next step that were read already."""
    _read: list[Any]
    _given_up: GuardStop | None = None
    _told: Tensor
    unsound: tuple[int, ...] = ()
    """Of several ranks those whose own part of this step's gradient, or of its loss, is no number."""
    stop_agreed: str | None = None
    """What asked for a stop, once all ranks have heard of it."""

    # -- before the pass: the tokens that a step's loss is the mean of

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """This rank's micro-batches of a step, those first that were read ahead, and the supervised tokens of all
        ranks'."""
        if self._epoch is not epoch_iterator:
            self._epoch, self._read = epoch_iterator, []
        read = iter(self._read)
        if self.engine is not None:  # which takes their number on the host, where nothing has to be waited for
            device = torch.device("cpu")
        samples, items = super().get_batch_samples(chain(read, epoch_iterator), num_batches, device)
        self._read = list(read)
        if self.ranks.alone or not samples:
            return samples, items
        begins = self.state.global_step * self.share.step
        ends = min(begins + self.share.step, self.share.total)
        _, supervised = self.data.sizes(begins, ends)
        return samples, torch.tensor(supervised)  # on the host, where nothing has to be waited for

    def read_ahead(self) -> None:
        """Read the next step's micro-batches before this one is waited for: the device computes meanwhile."""
        if self.engine is not None and self._epoch is not None:
            self._read += islice(self._epoch, self.args.gradient_accumulation_steps - len(self._read))

    # -- after it

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """The norm of all ranks' gradient."""
        if not self.ranks.alone:
            self._come_together()
        norm: Tensor = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return norm

    def _come_together(self) -> None:
        """Sum the gradient, and let the ranks tell each other; nothing is waited for."""
        if self.engine is None:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            gradient = _flattened(trained)
            mine = self._to_tell(torch.cat([each.detach().reshape(-1) for each in trained]), gradient)
            self.ranks.sum_(gradient)
            _give_back(trained, gradient)
        else:
            flat = self.engine.flat
            mine = self._to_tell(flat.data, flat.grad)
            self.ranks.sum_(flat.grad)
        told = self.ranks.gathered(mine)
        self._step_losses = list(told[:, : self.share.own].reshape(-1).float())
        self._tr_loss.copy_(self._step_logs["loss"] + torch.stack(self._step_losses).sum())
        self._told = told.to("cpu", non_blocking=True)

    def _to_tell(self, weights: Tensor, gradient: Tensor) -> Tensor:
        """float64 [own micro-batches + 5]: their losses, and what stands at :data:`_FACTS`."""
        signals = self.safety.signals
        if self.ranks.abandoned and signals.requested is None:
            signals.requested = "the end of its launcher"
        asked = signals.requested is not None or self.safety.stop_file()
        facts = [0.0, 0.0, asked, self.progress.pieces, self._given_up is not None]
        told = torch.tensor([0.0] * self.share.own + facts, dtype=torch.float64).to(weights.device, non_blocking=True)
        if self._step_losses:
            told[: len(self._step_losses)] = torch.stack([loss.detach() for loss in self._step_losses])
        told[-_FACTS] = weights.view(torch.int16).sum(dtype=torch.int64)
        told[1 - _FACTS] = gradient.sum()
        return told

    def take_in(self) -> None:
        """See what the ranks told each other in this step, once the device has come to it.

        Raises:
            GuardStop: A rank gave up, or its adapter isn't the others'.
        """
        if self.ranks.alone:
            return
        step, told = self.state.global_step + 1, self._told.tolist()
        if any(given_up for *_, given_up in told):
            stop = self._given_up
            words = self.ranks.told(None if stop is None else word_of(self.ranks.rank, stop))
            raise stop or as_told(next(filter(None, words)))
        unsound = [not all(map(math.isfinite, (*losses, gradient))) for *losses, _, gradient, _, _, _ in told]
        self.unsound = tuple(rank for rank, is_so in enumerate(unsound) if is_so)
        for rank, (*_, bits, _, asked, pieces, _) in enumerate(told):
            if bits != told[0][-_FACTS]:
                raise GuardStop(
                    f"the adapter of rank {rank} isn't rank 0's before step {step}",
                    rule="All ranks apply the same gradient to the same weights; nothing of this step was applied.",
                    way_out="A card or its memory may be faulty: go on without it from the last checkpoint.",
                )
            if asked and self.stop_agreed is None:
                self.stop_agreed = self.safety.signals.requested or f"a request to rank {rank}"
            if pieces > self.progress.pieces:
                self.progress.pieces = int(pieces)
                self.safety.warn(f"rank {rank} ran out of memory: micro-batches now run in {int(pieces)} pieces")

    # -- evaluation

    def everyones(self, evaluated: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
        """(sum of losses, supervised tokens) of all held-out micro-batches in their order, from this rank's."""
        if self.ranks.alone:
            return evaluated
        units, count = self.evaluation.per_epoch, self.ranks.count
        evaluated = evaluated[: len(range(self.ranks.rank, units, count))]
        mine = torch.zeros(2, -(-units // count), dtype=torch.float64, device=self.args.device)
        if evaluated:
            mine[0, : len(evaluated)] = torch.stack([total.double() for total, _ in evaluated])
        mine[1, : len(evaluated)] = torch.tensor([float(supervised) for _, supervised in evaluated])
        sums, supervised = self.ranks.gathered(mine.reshape(-1)).view(count, 2, -1).unbind(1)
        at = [(unit % count, unit // count) for unit in range(units)]
        return [(sums[place], int(supervised[place])) for place in at]

    # -- the beginning and the end

    def begin_alike(self) -> None:
        """All ranks begin with rank 0's adapter, however it was drawn."""
        self.ranks.share_([parameter.data for parameter in self.model.parameters() if parameter.requires_grad])

    def check_alike(self) -> None:
        """See that all ranks end with the same adapter.

        Raises:
            GuardStop: One doesn't.
        """
        if self.ranks.alone:
            return
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for rank, other in enumerate(digests := self.ranks.told(digest.hexdigest())):
            if other != digests[0]:
                raise GuardStop(
                    f"the adapter of rank {rank} isn't rank 0's after the last step",
                    rule="All ranks apply the same gradients to the same weights. No adapter was made of it.",
                    way_out="A card or its memory may be faulty: go on without it from the last checkpoint.",
                )


def _flattened(trained: list[nn.Parameter]) -> Tensor:
    """All gradients, and behind them for each parameter whether it has one."""
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    marks = torch.tensor([each.grad is not None for each in trained], dtype=parts[0].dtype, device=parts[0].device)
    return torch.cat([*(part.reshape(-1) for part in parts), marks])


def _give_back(trained: list[nn.Parameter], summed: Tensor) -> None:
    """Gradients, and how many ranks have each; one that none has stays away."""
    *parts, marks = torch.split(summed, [*(each.numel() for each in trained), len(trained)])
    for parameter, part, marked in zip(trained, parts, marks.tolist(), strict=True):
        parameter.grad = part.view_as(parameter) if marked else None
