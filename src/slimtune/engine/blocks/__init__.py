"""What a layer's branches are made of: mixers and feed-forwards, each with its forward, backward and sizes."""

from slimtune.engine.blocks.attention import AttentionBlock
from slimtune.engine.blocks.block import Block, Keep, Lent, Memory, Pass, RotaryTable, Sinks
from slimtune.engine.blocks.branch import BranchBlock, BranchComputation, BranchSaved
from slimtune.engine.blocks.delta import DeltaBlock
from slimtune.engine.blocks.experts import ExpertsBlock
from slimtune.engine.blocks.mlp import MlpBlock
from slimtune.engine.blocks.per_layer import PerLayerBlock

__all__ = [
    "AttentionBlock",
    "Block",
    "BranchBlock",
    "BranchComputation",
    "BranchSaved",
    "DeltaBlock",
    "ExpertsBlock",
    "Keep",
    "Lent",
    "Memory",
    "MlpBlock",
    "Pass",
    "PerLayerBlock",
    "RotaryTable",
    "Sinks",
]
