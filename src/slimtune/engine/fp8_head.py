"""The head's way back in FP8: dx = dz · W, summed over the whole vocabulary.

Forward the head stays in 16 bits, so that the logits and the loss are what they are there. The gradient's rows come in
e4m3 where the logits were (:mod:`slimtune.engine.kernels.cross_entropy_fp8`), and what is held is the head's transpose:
half of the head once more. Each row's target stays out of the product: its own row, as the product would take it, is
taken from what that gives.

What rounding lost of the head is the same at every token, and what a training can't change in a model meets the same
rows again and again, so that it doesn't cancel as the rounding of the gradient's rows does. For the first rows of the
head it comes as further columns behind the vocabulary, as some channels' does in a projection: the ids of a BPE are in
the order of its merges, and the first ones most of a text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimtune.engine.fp8 import Fp8
from slimtune.engine.kernels import cross_entropy_fp8, fp8
from slimtune.engine.kernels.reference_fp8 import LARGEST, LEAST, lost

__all__ = ["Fp8Head"]

_MULTIPLE = 16
"""What a product in FP8 wants of both its sides."""
_AGAIN = 2048
"""Rows of the head that come with what rounding lost of them, at most: two thirds of an English text's tokens. Of a
small vocabulary it is a sixteenth."""
_ROWS = 4096
"""Of the head that are turned at once."""


class Fp8Head:
    """A frozen head whose gradient is multiplied in FP8.

    Args:
        head: bfloat16 [V, H].
        switch: The model's.
    """

    def __init__(self, head: Tensor, switch: Fp8) -> None:
        self._head, self.switch = head, switch
        self.vocabulary, hidden = head.shape
        self.width = _padded(self.vocabulary)
        """Columns of a buffer of 16 bits for logits and, in their place, the gradient's rows."""
        self.again = _again(self.vocabulary)
        parts = [slice(start, start + _ROWS) for start in range(0, self.vocabulary, _ROWS)]
        most = torch.stack([head[part].abs().amax(0) for part in parts]).amax(0)
        self.scales = most.float().clamp(min=LEAST) * (1.0 / LARGEST)
        """float32 [H]."""
        columns = self.width + self.again
        self.turned = torch.zeros(hidden, columns, dtype=torch.uint8, device=head.device).view(fp8.E4M3)
        """e4m3 [H, width + again], zeros behind the vocabulary."""
        across = self.turned[:, : self.vocabulary]
        for part in parts:
            across[:, part] = self._exact(head[part]).to(fp8.E4M3).t()
        self.turned[:, self.width :] = lost(self._exact(head[: self.again])).to(fp8.E4M3).t()

    @staticmethod
    def bytes_of(pays: Callable[..., bool], tokens: int, vocabulary: int, hidden: int) -> int:
        """What a head of this shape takes more so; 0 where it stays in 16 bits.

        Args:
            pays: As :func:`slimtune.engine.fp8.pays`.
            tokens: In a micro-batch.
            vocabulary: V.
            hidden: H.
        """
        taken = hidden % _MULTIPLE == 0 and pays(tokens, hidden, vocabulary)
        return hidden * (_padded(vocabulary) + _again(vocabulary) + 4) if taken else 0

    def loss_and_grad(
        self, logits: Tensor, targets: Tensor, out: Tensor, *, before: int = 0, softcap: float | None = None
    ) -> Tensor:
        """Sum of the losses, float32; ``out`` becomes the gradient of what the head multiplied.

        Args:
            logits: bfloat16 [n, width], the vocabulary's first; overwritten.
            targets: int64 [n].
            out: bfloat16 [n, H].
            before: Supervised tokens of the micro-batch before these.
            softcap: As the kernel has it.
        """
        loss, rows, scales, own = cross_entropy_fp8.loss_and_grad_(
            logits, targets, self.vocabulary, again=self.again, before=before, softcap=softcap
        )
        fp8.product(rows, scales, self.turned, self.scales, out=out, long_sum=True)
        # As the product has them. Were the targets' rows exact and the others rounded, what a token pushes as a target
        # and as one of the others would never cancel, and a training come to rest elsewhere (decision 175).
        cross_entropy_fp8.subtract_targets_(out, self._head, targets, own, self.scales, self.again)
        return loss

    def _exact(self, rows: Tensor) -> Tensor:
        """Rows of the head in e4m3's range, float32 [n, H]."""
        return rows.to(torch.float32, copy=True).mul_(1.0 / self.scales).clamp_(-LARGEST, LARGEST)


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // _MULTIPLE) * _MULTIPLE


def _again(vocabulary: int) -> int:
    return min(_AGAIN, vocabulary // (16 * _MULTIPLE) * _MULTIPLE)
