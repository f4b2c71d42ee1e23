"""How torch keeps the GPU's memory in a command's own process: in segments that grow.

By default torch's allocator asks the driver for a block of each size that it hasn't, and keeps it. A segment that grows
is one range of addresses, whose free pages serve any size or go back to the driver. It is half of what a step within a
budget needs: pages that hold a little of the base stay, which is what :mod:`slimtune.base.shelves` is for.
Source: docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

__all__ = ["growing_segments"]

_SETTING = "PYTORCH_CUDA_ALLOC_CONF"
"""By the name that torch 2.11 and 2.15 both know."""
_NAMES = (_SETTING, "PYTORCH_ALLOC_CONF")


def growing_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Choose segments that grow, before torch is loaded and reads the variable; what somebody has set stays."""
    if not any(name in environment for name in _NAMES):
        environment[_SETTING] = "expandable_segments:True"
