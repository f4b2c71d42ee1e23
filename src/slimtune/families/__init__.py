"""What a model is made of, told once: its decoder layers, and in each of them what mixes tokens and what feeds forward.

A :class:`Family` is a description without tensors. :func:`read_family` finds it on the model's own modules, so that an
architecture needs no entry anywhere to be adapted rightly: a module that mixes tokens is told which of them it may see,
and takes a mask, a cache or a state; a feed-forward takes hidden states alone.
"""

from slimtune.families.read import decoder_of, read_family
from slimtune.families.spec import Family, Layer

__all__ = ["Family", "Layer", "decoder_of", "read_family"]
