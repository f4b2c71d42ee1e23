"""What a layer's branches are made of: mixers and feed-forwards, each with its forward, backward and sizes."""

from slimtune.engine.blocks.attention import AttentionBlock
from slimtune.engine.blocks.block import Block, Keep, Lent, Memory, Pass, RotaryTable, Sinks
from slimtune.engine.blocks.experts import ExpertsBlock
from slimtune.engine.blocks.mlp import MlpBlock

__all__ = [
    "AttentionBlock",
    "Block",
    "ExpertsBlock",
    "Keep",
    "Lent",
    "Memory",
    "MlpBlock",
    "Pass",
    "RotaryTable",
    "Sinks",
]
