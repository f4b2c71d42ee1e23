"""The head's way back in FP8: dx = dz · W, summed over the whole vocabulary.

Forward the head stays in 16 bits, so that the logits and the loss are what they are there. The gradient's rows come in
e4m3 where the logits were (:mod:`slimtune.engine.kernels.cross_entropy_fp8`), and what is held is the head's transpose:
half of the head once more. Each row's target stays out of the product: its own row, as the product would take it, is
added to what that gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimtune.engine.fp8 import Fp8
from slimtune.engine.kernels import cross_entropy_fp8, fp8
from slimtune.engine.kernels.reference_fp8 import LARGEST, LEAST

__all__ = ["Fp8Head"]

_MULTIPLE = 16
"""What a product in FP8 wants of both its sides."""
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
        parts = [slice(start, start + _ROWS) for start in range(0, self.vocabulary, _ROWS)]
        most = torch.stack([head[part].abs().amax(0) for part in parts]).amax(0)
        self.scales = most.float().clamp(min=LEAST) * (1.0 / LARGEST)
        """float32 [H]."""
        self.turned = torch.zeros(hidden, self.width, dtype=torch.uint8, device=head.device).view(fp8.E4M3)
        """e4m3 [H, width], zeros behind the vocabulary."""
        across = self.turned[:, : self.vocabulary]
        for part in parts:
            across[:, part] = self._eighths(head[part].to(torch.float32, copy=True)).t()

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
        return hidden * (_padded(vocabulary) + 4) if taken else 0

    def loss_and_grad(self, logits: Tensor, targets: Tensor, out: Tensor, *, softcap: float | None = None) -> Tensor:
        """Sum of the losses, float32; ``out`` becomes the gradient of what the head multiplied.

        Args:
            logits: bfloat16 [n, width], the vocabulary's first; overwritten.
            targets: int64 [n].
            out: bfloat16 [n, H].
            softcap: As the kernel has it.
        """
        loss, rows, scales, own = cross_entropy_fp8.loss_and_grad_(logits, targets, self.vocabulary, softcap=softcap)
        fp8.product(rows, scales, self.turned, self.scales, out=out, long_sum=True)
        out.addcmul_(self._rounded(targets.clamp(min=0)), own, value=-1)
        return loss

    def _rounded(self, tokens: Tensor) -> Tensor:
        """The tokens' rows of what the product takes, float32 [n, H].

        Were a target's exact and the others rounded, what a token pushes as a target and as one of the others would
        never cancel: a training would come to rest elsewhere, the further the longer it goes (decision 175).
        """
        wide = self._head.index_select(0, tokens).float()
        return wide.copy_(self._eighths(wide)).mul_(self.scales)

    def _eighths(self, wide: Tensor) -> Tensor:
        """Rows of the head, float32 [n, H], in e4m3; overwritten."""
        return wide.mul_(1.0 / self.scales).clamp_(-LARGEST, LARGEST).to(fp8.E4M3)


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // _MULTIPLE) * _MULTIPLE
