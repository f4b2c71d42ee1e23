"""The flat gradient's norm, the clipping factor and the non-finite flag: a few launches of torch's own kernels.

Nothing waits for the device: the factor and the flag go on to the optimizer's kernel as tensors.
"""

from slimtune.engine.kernels.reference import clip_factor, global_norm

__all__ = ["clip_factor", "global_norm"]
