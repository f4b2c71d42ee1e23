"""Every kernel compiles, with its assembler, for the oldest and the newest GPU that is promised, without one here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = 22
# Most shared memory that one program may take (CUDA C++ programming guide, technical specifications).
LIMITS = {75: 64 << 10, 90: 227 << 10}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "dtype"), [(75, "float16"), (90, "bfloat16")])
def test_compiles_for(capability: int, dtype: str) -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_for.py")), str(capability), dtype],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert len({entry["kernel"] for entry in compiled}) == KERNELS
    for entry in compiled:
        assert entry["shared"] <= LIMITS[capability], f"{entry} over {LIMITS[capability]} bytes of shared memory"
