"""What this machine offers: device, native dtypes, memory. Looks, changes nothing."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ["Hardware", "detect", "free_ram"]

DType = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Hardware:
    """The device that a run uses."""

    device: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int
    """Bytes of the GPU's memory, or of the machine's RAM."""
    compute_dtype: DType
    """The fastest dtype that is native here."""
    compute_dtype_reason: str
    cpu_threads: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``environment.json``."""
        return asdict(self)


@lru_cache(maxsize=1)
def detect() -> Hardware:
    """Look at the first CUDA device, or at the CPU where there is none."""
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = f"compute capability {properties.major}.{properties.minor}"
        # is_bf16_supported(including_emulation=False) is false on Turing and Volta, whose bf16 is emulated and slow.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            dtype: DType = "bf16"
            reason = f"bf16 is native on {properties.name} ({capability})"
        else:
            dtype, reason = "fp16", f"{properties.name} ({capability}) has no native bf16"
        return Hardware("cuda", properties.name, properties.total_memory, dtype, reason, threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _cpu_has_bf16_gemm():
        dtype, reason = "bf16", "this CPU multiplies bf16 natively (AVX512-BF16 or AMX)"
    else:
        dtype, reason = "fp32", "this CPU has no bf16 instructions, so fp32 is fastest"
    return Hardware("cpu", _cpuinfo("model name") or "CPU", memory, dtype, reason, threads)


def free_ram(root: Path = Path("/")) -> int:
    """Bytes of RAM that a process may still take: what the system has free, or its container allows if that is less.

    Args:
        root: Where /proc and /sys lie.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
    for most, used, unused in _LIMITS:
        try:
            limit, taken = (int((root / "sys/fs/cgroup" / name).read_text()) for name in (most, used))
            statistics = (root / "sys/fs/cgroup" / Path(used).with_name("memory.stat")).read_text().split()
        except (OSError, ValueError):  # no such limit: "max", or the other kind of container
            continue
        # Of what counts as taken, pages of files that nobody uses are given back.
        files = int(statistics[statistics.index(unused) + 1]) if unused in statistics else 0
        free = min(free, max(0, limit - taken + files))
    return free


_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Of control groups, version 2 and 1: the limit, what is taken, and what of it is given back when asked for."""


def _cpuinfo(key: str) -> str:
    """One value of the kernel's description of the first processor; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _cpu_has_bf16_gemm() -> bool:
    return bool(set(_cpuinfo("flags").split()) & {"avx512_bf16", "amx_bf16"})
