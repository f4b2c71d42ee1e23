"""What every block offers, and what one pass shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.attention import Documents, Way
from slimtune.engine.fp8 import Fp8
from slimtune.engine.kernels.formats import Pairs
from slimtune.engine.stacks import Stack
from slimtune.engine.structure import Projection, Rotary, ScoresKind
from slimtune.engine.weights import Gradients, Scratch, Site

__all__ = ["Block", "Keep", "Lent", "Memory", "Pass", "Pays", "RotaryTable", "Sinks", "TwoProjections"]

Sinks = Mapping[Site | Stack, Gradients]
"""Where the adapters' gradients of each site and stack are added; one without adapters has no entry."""

Pays = Callable[..., bool]
"""Whether a product of so many tokens, inputs and outputs, or of a stack of so many experts, gains by FP8."""


class Keep(IntEnum):
    """What a layer keeps for its backward; each level adds to the one before."""

    INPUT = 0
    """Its input alone; all of the layer but its last product is computed again."""
    ATTENDED = 1
    """What attention gave too: of a long document little else costs as much for so few bytes."""
    ATTENTION = 2
    """Every branch's input and result, and what mixers need (q, k, v, o); feed-forwards and norms again."""
    GATES = 3
    """What feed-forwards need too (gate and up): only norms are computed again."""
    ALL = 4
    """The adapters' inputs too: nothing is computed again but act(gate) x up."""


@dataclass(frozen=True)
class RotaryTable:
    """cos and sin of every position, float32 [positions, head dim / 2], and which columns they turn."""

    cos: Tensor
    sin: Tensor
    pairs: Pairs
    growth: Tensor | None = None
    """What a rotated query is multiplied with, float32 [positions]; None where that is 1 everywhere."""

    @classmethod
    def of(cls, rotary: Rotary, head_dim: int, positions: int, device: torch.device, dtype: torch.dtype) -> RotaryTable:
        """Made by the model's own rotary module, so that each of its scalings is right."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        like = torch.empty(0, dtype=wide, device=device)
        which = () if rotary.layer_type is None else (rotary.layer_type,)
        places = torch.arange(positions, device=device)[None]
        if hasattr(rotary.module, "mrope_section"):  # of text, pictures' rows and columns alike (Qwen3.5)
            places = places.expand(3, 1, -1)
        made, tables = rotary.module(like, places, *which), []
        for table, passes in zip(made, (1.0, 0.0), strict=True):
            first, second = table[0].chunk(2, dim=1)
            # A module gives each angle twice, for both columns of its pair: side by side, or the whole row again.
            angles = first if bool((first == second).all()) else table[0][:, ::2]
            if 2 * table.shape[2] == rotary.dim:  # or once
                angles = table[0]
            rest = head_dim // 2 - angles.shape[1]
            tables.append(torch.nn.functional.pad(angles, (0, rest), value=passes).contiguous())
        pairs = Pairs(None if rotary.dim == head_dim else rotary.dim, rotary.interleaved)
        return cls(tables[0], tables[1], pairs, _growth(rotary, positions, like))


def _growth(rotary: Rotary, positions: int, like: Tensor) -> Tensor | None:
    if rotary.growth is None or positions <= rotary.growth[1]:
        return None
    beta, original = rotary.growth
    steps = torch.arange(positions, device=like.device).div(original, rounding_mode="floor").to(like.dtype)
    return 1 + beta * torch.log1p(steps)


@dataclass
class Lent:
    """Tensors that a block made for later layers too, and the gradients that those collected, in float32 or wider."""

    tensors: tuple[Tensor, ...]
    collected: tuple[Tensor, ...] = ()

    def collect(self, *gradients: Tensor) -> None:
        """Add a later layer's gradients, one of each tensor; they may be overwritten."""
        if not self.collected:
            self.collected = tuple(g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients)
            return
        for total, gradient in zip(self.collected, gradients, strict=True):
            total += gradient

    def with_own(self, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The whole gradients: the lender's own, and what was collected."""
        if not self.collected:
            return gradients
        pairs = zip(self.collected, gradients, strict=True)
        return tuple(total.add_(own).to(own.dtype) for total, own in pairs)


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward and backward pass share."""

    documents: Documents
    ways: Mapping[ScoresKind, Way]
    """How each kind of attention is computed."""
    position_ids: Tensor
    """int64 or int32 [T]."""
    tables: Mapping[Rotary, RotaryTable]
    seed: Tensor | None
    """int64 scalar of this micro-batch's dropout; None: no dropout (evaluation)."""
    mlp_tokens: int
    """Tokens that a feed-forward takes at once; fewer need less memory."""
    sparing: bool = False
    """Backwards spare memory: attention goes by groups of heads, and a branch's input is normalised again."""
    lent: dict[str, Lent] = field(default_factory=dict)
    """What blocks made for later layers, by name."""

    def lend(self, name: str, *tensors: Tensor) -> None:
        """Hand tensors to later layers; made again in the backward, they are there already."""
        self.lent.setdefault(name, Lent(tensors))

    @property
    def tokens(self) -> int:
        """T."""
        return self.position_ids.shape[0]

    @property
    def chunks(self) -> Sequence[slice]:
        """The tokens that a feed-forward takes at once."""
        return [slice(i, min(i + self.mlp_tokens, self.tokens)) for i in range(0, self.tokens, self.mlp_tokens)]


@dataclass(frozen=True)
class Memory:
    """The sizes that a memory plan asks blocks about."""

    tokens: int
    """In a micro-batch, or a part of it."""
    mlp_tokens: int
    """That a feed-forward takes at once."""
    ways: Mapping[ScoresKind, Way]
    padded_room: int
    """What :func:`slimtune.engine.attention.padded_tokens` may be in one call."""
    sparing: bool = False
    """:attr:`Pass.sparing`."""


class Block(ABC):
    """One mixer or feed-forward of a branch: y = block(n) of the branch's normalised input n [T, H].

    Its input buffer may be wider than H: the block's own columns follow n's.
    """

    sites: tuple[Site, ...]
    """Its projections."""
    stacks: tuple[Stack, ...] = ()
    """Its expert stacks."""

    @property
    def parts(self) -> tuple[Site | Stack, ...]:
        """Its sites and stacks."""
        return *self.sites, *self.stacks

    @property
    def trained(self) -> tuple[Site | Stack, ...]:
        """Those with adapters."""
        return tuple(part for part in self.parts if part.parameters)

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights as they are multiplied, where they are held; in FP8 without their transposes."""
        return sum(part.kept_bytes for part in self.parts)

    @property
    def turned_bytes(self) -> int:
        """Bytes of those transposes."""
        sites = sum(site.inputs * site.outputs for site in self.sites if site.channels)
        return sites + sum(stack.turned_bytes for stack in self.stacks)

    @property
    def spared_bytes(self) -> int:
        """What weights in FP8 take less than in the compute dtype, with their scales and without their transposes."""
        eighths = [site for site in self.sites if site.channels]
        scales = sum(4 * (site.outputs + site.inputs + site.channels) for site in eighths)
        sites = sum(site.buffer_bytes - site.kept_bytes for site in eighths) - scales
        return sites + sum(stack.spared_bytes for stack in self.stacks)

    @property
    def scratch(self) -> dict[tuple[int, ...], int]:
        """Bytes of the buffers that its weights are made anew in, by shape: others of a shape use the same."""
        return {
            **{site.buffer_shape: site.buffer_bytes for site in self.sites},
            **{stack.buffer_shape: stack.buffer_bytes for stack in self.stacks},
        }

    def keep_weights(self, *, turned: bool = False) -> None:
        """Hold the weights as they are multiplied from now on, in FP8 with their transposes if ``turned``."""
        for part in self.parts:
            part.keep(turned=turned)

    def use_fp8(self, pays: Pays, tokens: int, switch: Fp8 | None) -> None:
        """Multiply in FP8 what gains by it.

        Args:
            pays: As :func:`slimtune.engine.fp8.pays`.
            tokens: In a micro-batch.
            switch: The model's; None: take the sizes of it alone.
        """
        for site in self.sites:
            if pays(tokens, site.inputs, site.outputs):
                site.use_fp8(switch)

    @property
    def in_16_bits(self) -> str:
        """Why experts of its stay there where FP8 was asked for, in words; empty: none do."""
        return ""

    @property
    def fp8_products(self) -> float:
        """Of :attr:`products`, those in FP8."""
        return float(sum(site.inputs * site.outputs for site in self.sites if site.channels))

    @property
    @abstractmethod
    def columns(self) -> int:
        """Width of its input buffer, H or more; the caller writes the first H columns."""

    @property
    @abstractmethod
    def reads_input(self) -> bool:
        """Whether the backward needs the input even if everything else was kept."""

    @abstractmethod
    def forward(self, n: Tensor, on: Pass, keep: Keep | None) -> tuple[Tensor, Any]:
        """y [T, H], and what was kept (None below the level from which it keeps anything, and for None).

        Args:
            n: The input buffer, its first H columns written.
            on: The pass.
            keep: What to keep; None: there will be no backward.
        """

    def again(self, n: Tensor, on: Pass, keep: Keep, made: Any) -> tuple[Tensor, Any]:
        """As :meth:`forward`, which kept ``made`` at :attr:`Keep.ATTENDED`: that isn't computed again."""
        return self.forward(n, on, keep)

    @abstractmethod
    def backward(
        self, dy: Tensor, n: Tensor | None, kept: Any, on: Pass, sinks: Sinks, *, fresh: bool, need_dx: bool
    ) -> Tensor | None:
        """dn [T, H] from dy [T, H], which stays as it is; the adapters' gradients are added.

        Consumes ``kept``: some of its buffers are overwritten.

        Args:
            dy: The gradient of y.
            n: The input buffer; None only where neither ``reads_input`` nor a missing ``kept`` needs it.
            kept: What the forward kept.
            on: The pass.
            sinks: Where the gradients go.
            fresh: n was made anew: the block's own columns are still to be written.
            need_dx: Without it None is returned.
        """

    # -- sizes ----------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> tuple[object, ...]:
        """What its sizes follow from: blocks of one kind have the same."""
        return type(self), self.columns, self.products, self.weight_bytes, *self.scratch.items()

    @abstractmethod
    def kept_bytes(self, memory: Memory, keep: Keep) -> int:
        """Bytes kept from the forward to the backward, the input buffer not among them."""

    @abstractmethod
    def working_bytes(self, memory: Memory) -> int:
        """Bytes that the backward takes at its peak beside what a layer keeps at :attr:`Keep.ATTENTION`."""

    @abstractmethod
    def rows(self, memory: Memory) -> int:
        """Rows that a product takes at once: few don't fill a device."""

    def chunks(self, memory: Memory) -> int:
        """Products that a part goes through each weight in, one after the other: it is made anew for each."""
        return 1

    @property
    def adapted_columns(self) -> int:
        """Columns of one token that its adapters' own products read and write: inputs and outputs."""
        return sum(part.inputs + part.outputs for part in self.trained)

    @property
    @abstractmethod
    def products(self) -> float:
        """Multiply-adds of the frozen products for one token, forward."""

    @abstractmethod
    def products_again(self, keep: Keep) -> float:
        """Of those, how many the backward computes again."""


class TwoProjections(Block):
    """A block whose first projection reads n, and whose second gives y.

    Args:
        projections: The two.
        dtype: Compute dtype.
        device: Where it computes.
        stream: Number of the first one's dropout; the second has the next.
        scratch: Buffers for weights that aren't kept.
    """

    sites: tuple[Site, Site]

    def __init__(
        self,
        projections: tuple[Projection, Projection],
        dtype: torch.dtype,
        device: torch.device,
        stream: int,
        scratch: Scratch,
    ) -> None:
        first, second = projections
        self.dtype = dtype
        self.sites = Site(first, dtype, device, stream, scratch), Site(second, dtype, device, stream + 1, scratch)

    @property
    def columns(self) -> int:
        """The first projection's."""
        return self.sites[0].inputs + self.sites[0].extra

    @property
    def reads_input(self) -> bool:
        """For the gradients of the first projection's adapters."""
        return self.sites[0].groups > 0

    @property
    def products(self) -> float:
        """See :attr:`Block.products`."""
        return float(sum(site.inputs * site.outputs for site in self.sites))
