"""Every kernel compiles, with its assembler, for the oldest and the newest GPU that is promised, without one here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KERNELS = 25
DELTA_KERNELS = 7
"""More, from sm_80 on."""
FP8_KERNELS = 6
"""More, from sm_89 on."""
# Most shared memory that one program may take (CUDA C++ programming guide, technical specifications).
LIMITS = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10}


def compiled(capability: int, *arguments: object) -> list[dict[str, Any]]:
    """What compile_for.py prints; no kernel takes more shared memory than there is."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_for.py")), str(capability), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    for entry in kernels:
        assert entry["shared"] <= LIMITS[capability], f"{entry} over {LIMITS[capability]} bytes of shared memory"
    return kernels


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "dtype"), [(75, "float16"), (90, "bfloat16")])
def test_compiles_for(capability: int, dtype: str) -> None:
    kernels = compiled(capability, dtype, LIMITS[capability])
    assert len({entry["kernel"] for entry in kernels}) == (
        KERNELS + DELTA_KERNELS * (capability >= 80) + FP8_KERNELS * (capability >= 89)
    )
    # ptxas 12.8, of Triton 3.6, loses numbers of e4m3 that are stored in pairs of pairs and read back as well.
    assert not [entry["kernel"] for entry in kernels if entry["reads_e4m3"]]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "head_dim", "softcap"), [(80, 256, 50.0), (90, 512, 0.0)])
def test_attention_compiles_for(capability: int, head_dim: int, softcap: float) -> None:
    kernels = compiled(capability, "bfloat16", LIMITS[capability], "attention", head_dim, softcap)
    # Past 256 columns the sums of dk and dv have programs of their own.
    assert len(kernels) == (4 if head_dim <= 256 else 5)
