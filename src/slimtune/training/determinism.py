"""Runs that repeat to the bit: what `--deterministic` sets on CUDA, for the time of one run.

On a CPU every run repeats with the same number of threads. On CUDA these don't, unless told to: FlashAttention's
backward and a few of PyTorch's kernels sum by atomics, in whatever order their threads come, and so does cuDNN's
attention, which the engine doesn't take then; cuDNN may pick another kernel by timing; cuBLAS may split its sums
otherwise when it has several workspaces. The engine's own kernels use no atomics and pick nothing by timing.
Source: docs.pytorch.org/docs/stable/notes/randomness.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from slimtune.config import Config
from slimtune.errors import UserError

__all__ = ["deterministic", "fix_workspace"]

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")
"""The two settings that NVIDIA documents as deterministic."""


def fix_workspace(config: Config, environment: MutableMapping[str, str] = os.environ) -> None:
    """Choose cuBLAS's fixed workspaces, in the command's own process, before CUDA starts and reads the variable."""
    if config.deterministic:
        environment.setdefault(WORKSPACE, FIXED[0])


@contextmanager
def deterministic(config: Config, device: str) -> Iterator[bool]:
    """Take deterministic kernels while the body runs, if asked to; afterwards the process is what it was.

    Yields:
        Whether the body's numbers repeat: always on a CPU, on CUDA with ``config.deterministic``.

    Raises:
        UserError: cuBLAS's workspaces aren't fixed, or the model needs an operation that has no deterministic kernel.
    """
    if device != "cuda" or not config.deterministic:
        yield device == "cpu"
        return
    import torch

    if os.environ.get(WORKSPACE) not in FIXED:
        raise UserError(
            f"deterministic: {WORKSPACE} is {os.environ.get(WORKSPACE, 'not set')}",
            rule=f"cuBLAS repeats its sums only with {' or '.join(FIXED)}, and reads it when CUDA starts.",
            way_out=f"Start Python with {WORKSPACE}={FIXED[0]}; the slimtune command sets it by itself.",
        )
    cudnn = torch.backends.cudnn
    fill: Any = torch.utils.deterministic  # its attribute is set at import, where no type checker sees it
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        fill.fill_uninitialized_memory,
    )
    # Not warn_only: with it, FlashAttention keeps its atomics.
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    fill.fill_uninitialized_memory = False  # a debugging aid that costs a write for every new tensor
    try:
        yield True
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(
            f"deterministic can't be had: {str(error).splitlines()[0]}",
            way_out="Train without --deterministic: numbers then repeat but for the order of some sums.",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = before[2:]
