"""The description of a model's text part. No tensors, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CHOOSES", "OTHER_SEQUENCE", "Family", "Layer"]

CHOOSES = "it chooses tokens or experts"
OTHER_SEQUENCE = "it reads another sequence than the text"
"""Reasons against an adapter that are in the nature of a module; the others are in how it is computed."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer. All names are the model's own, from its top."""

    path: str
    """The layer's module."""
    mixers: tuple[str, ...]
    """Classes of the modules that mix tokens: attention of any kind, linear attention, state spaces, convolutions."""
    attention: tuple[str, ...]
    """Linear layers of whatever mixes tokens."""
    mlp: tuple[str, ...]
    """Linear layers of dense and shared feed-forwards; no router, no gate that weighs one path against another."""
    experts: tuple[str, ...]
    """Parameters that hold one matrix for each expert, [experts, rows, columns]."""


@dataclass(frozen=True)
class Family:
    """A model's text part."""

    model_type: str
    text: str
    """The decoder's module; empty where it is the model itself."""
    head: str
    """The module that gives the logits; empty if there is none."""
    layers: tuple[Layer, ...]
    towers: tuple[str, ...] = ()
    """Modules inside the text part that see pictures or sound."""
    uncalled: frozenset[str] = frozenset()
    """Linear layers whose weight the model's code takes itself, for a fused kernel, instead of calling the layer."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Linear layers of the text part that an adapter can't be put on, with the reason."""

    @property
    def mixers(self) -> tuple[str, ...]:
        """Classes of what mixes tokens, each once, in the order of the layers."""
        return tuple(dict.fromkeys(name for layer in self.layers for name in layer.mixers))

    def names(self, part: str) -> tuple[str, ...]:
        """All names of one part: ``attention``, ``mlp`` or ``experts``. A module that layers share stands once."""
        return tuple(dict.fromkeys(name for layer in self.layers for name in getattr(layer, part)))

    def in_text(self, name: str) -> bool:
        """Whether a module belongs to the text part, head included."""
        return (_under(name, self.text) or bool(self.head and _under(name, self.head))) and not any(
            _under(name, tower) for tower in self.towers
        )


def _under(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")
