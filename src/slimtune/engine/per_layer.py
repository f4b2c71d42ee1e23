"""Every layer's own input of each token, beside the stream, and the table that it is read from.

    p [T, L, P] = norm(projection(x)) + scale x table[tokens]

x are the embedded tokens, L the layers. The table [vocabulary, L x P] is most of a small model (Gemma 4 E4B: 5.6 GB of
16 bits), of which a micro-batch needs a row a token: beside a GPU it lives in RAM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtune.engine.blocks import Memory, Pass, Sinks
from slimtune.engine.blocks.per_layer import PER_LAYER
from slimtune.engine.kernels import norm
from slimtune.engine.ram import host_of, keep_there
from slimtune.engine.stacks import Stack
from slimtune.engine.structure import PerLayerInputs
from slimtune.engine.weights import Scratch, Site
from slimtune.ranks.host import here

__all__ = ["PerLayerComputation", "keep_in_ram"]

_WHAT = "per-layer embeddings"


class PerLayerComputation:
    """Makes p, lends it to the layers, and turns what they leave in its place into the adapter's gradient."""

    def __init__(self, part: PerLayerInputs, dtype: torch.dtype, device: torch.device, stream: int) -> None:
        self.part, self.dtype = part, dtype
        self.site = Site(part.projection, dtype, device, stream, Scratch())
        self.sites = (self.site,)
        self.trained: tuple[Site | Stack, ...] = (self.site,) if self.site.parameters else ()

    @property
    def table(self) -> Tensor:
        """[vocabulary, L x P]."""
        weight: Tensor = self.part.embedding.weight
        return weight.detach()

    def forward(self, x: Tensor, rows: Tensor, on: Pass) -> None:
        """Lend p to the layers.

        Args:
            x: [T, H], the embedded tokens; stays as it is.
            rows: [T, L x P], the tokens' rows of the table, in any floating dtype.
            on: The pass.
        """
        over, shape = self.part.norm, (x.shape[0], self.part.layers, self.part.width)
        buffer = self.site.buffer_of(x, on.seed)
        p, _, rstd = norm.norm_forward(self.site.forward(buffer).view(-1, shape[2]), over.weight, over.eps)
        p.add_(rows.view(p.shape), alpha=self.part.scale)
        on.lend(PER_LAYER, p.view(shape), *((buffer, rstd) if self.trained else ()))

    def backward(self, on: Pass, sinks: Sinks) -> None:
        """Add the adapter's gradients; only where there is one, and when every layer's backward has run."""
        (p, buffer, rstd), over = on.lent[PER_LAYER].tensors, self.part.norm
        before = self.site.forward(buffer).view(-1, self.part.width)
        dz = norm.norm_backward(p.view(before.shape), before, over.weight, rstd, out=p.view(before.shape))
        self.site.backward(dz.view(p.shape[0], -1), buffer, on.seed, sinks[self.site], need_dx=False)

    # -- sizes ----------------------------------------------------------------------------------------------------

    def kept_bytes(self, memory: Memory) -> int:
        """Bytes from the forward's begin to the backward's end."""
        columns, floats = self.site.outputs, 0
        if self.trained:
            columns, floats = columns + self.site.inputs + self.site.extra, self.part.layers
        return memory.tokens * (columns * self.dtype.itemsize + 4 * floats) + self.site.kept_bytes

    def working_bytes(self, memory: Memory) -> int:
        """Bytes beside those, at the begin and the end: the product, and the table's rows."""
        return memory.tokens * self.site.outputs * (self.dtype.itemsize + self.table.element_size())


def keep_in_ram(embedding: nn.Module) -> None:
    """Let a table live in RAM wherever its model is moved to; the module still takes and gives tensors of any device.

    A trainer moves its model to the device when training begins, and whoever moves a model moves every parameter. The
    ranks of one host have it there once.
    """
    kind: Any = type(embedding)
    for parameter in embedding.parameters(recurse=False):
        host = host_of(parameter.data)
        if host is not None:  # it was loaded there
            parameter.data = host
            continue
        with here().common(parameter.nbytes, _WHAT) as (memory, writes):
            if memory is not None:
                home = memory.view(parameter.dtype).view(parameter.shape)
                keep_there(parameter.data, home, _WHAT, writes=writes)
                parameter.data = home
    embedding.to("cpu")

    def forward(self: nn.Module, tokens: Tensor) -> Tensor:
        rows: Tensor = kind.forward(self, tokens.cpu())
        return rows.to(tokens.device)

    def stay(self: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return self

    embedding.__class__ = type(kind.__name__, (kind,), {"forward": forward, "_apply": stay})
