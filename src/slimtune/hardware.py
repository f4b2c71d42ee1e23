"""What this machine offers: device, native dtypes, memory. Looks, changes nothing."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from slimtune.errors import UserError, shown

__all__ = ["CARDS", "Card", "Hardware", "card_named", "detect", "free_ram"]

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

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA's, of the device here; without one that of a card with bf16."""
        return torch.cuda.get_device_capability(0) if self.device == "cuda" else (8, 0)

    @property
    def card(self) -> Card:
        """The device here as a card to plan for; without a GPU what RAM is free."""
        memory = self.memory_bytes if self.device == "cuda" else free_ram()
        sold = known_card(self.name)
        if self.device == "cpu" or sold is None:
            return Card(self.name, memory, self.capability)
        return replace(sold, name=self.name, memory_bytes=memory)

    @property
    def without_fp8(self) -> str | None:
        """Why nothing can be multiplied in FP8 here; None if it can."""
        if self.device != "cuda" or torch.version.hip is not None:
            return "FP8 is multiplied on an NVIDIA GPU, and here is none"
        return self.card.without_fp8

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``environment.json``."""
        return asdict(self)


@dataclass(frozen=True)
class Card:
    """A GPU to plan for, which need not be here."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """Of CUDA: below 8.0 there is no bf16, and other kernels."""
    tflops: float = 0.0
    """10^12 operations a second of dense 16-bit products with sums in fp32, as its maker publishes them; 0: unknown."""
    bandwidth: float = 0.0
    """GB that its memory moves a second, published too."""
    link: float = 25.0
    """GB that it sends a second to a card beside it: by NVLink, as published, or the bus, PCIe 4.0 of 16 lanes."""

    @property
    def bus(self) -> float:
        """GB that its bus brings to RAM or back in a second: PCIe 5.0's as an H200 was measured, older ones' a half and
        a quarter of it."""
        major, _ = self.capability
        return 54.0 if major >= 9 else 25.0 if major == 8 else 12.5

    @property
    def compute_dtype(self) -> DType:
        """The fastest dtype that is native there."""
        return "bf16" if self.capability >= (8, 0) else "fp16"

    @property
    def without_fp8(self) -> str | None:
        """Why nothing can be multiplied in FP8 there; None if it can."""
        if self.capability >= (8, 9):
            return None
        major, minor = self.capability
        return f"{self.name} (compute capability {major}.{minor}) multiplies no FP8: that begins with 8.9"


_SOLD: dict[tuple[int, int], dict[str, tuple[int, float, float]]] = {
    (7, 0): {"V100": (16, 125, 900), "V100 32GB": (32, 125, 900)},
    (7, 5): {"T4": (16, 65, 320), "RTX 2080 Ti": (11, 53.8, 616)},
    (8, 0): {"A100": (40, 312, 1555), "A100 80GB": (80, 312, 2039), "A30": (24, 165, 933)},
    (8, 6): {
        "A10": (24, 125, 600), "A10G": (24, 70, 600), "A40": (48, 149.7, 696), "A6000": (48, 154.8, 768),
        "RTX 3060": (12, 25.5, 360), "RTX 3080": (10, 59.5, 760), "RTX 3090": (24, 71, 936),
    },
    (8, 9): {
        "L4": (24, 121, 300), "L40S": (48, 362, 864), "RTX 4060": (8, 30.2, 272), "RTX 4060 Ti 16GB": (16, 44.1, 288),
        "RTX 4070": (12, 58.3, 504), "RTX 4080": (16, 97.5, 717), "RTX 4090": (24, 165.2, 1008),
    },
    (9, 0): {"H100": (80, 989, 3350), "H100 PCIe": (80, 756, 2000), "H200": (141, 989, 4800)},
    (10, 0): {"B200": (180, 2250, 8000)},
    (12, 0): {"RTX 5070 Ti": (16, 87.9, 896), "RTX 5080": (16, 112.6, 960), "RTX 5090": (32, 209.5, 1792)},
}  # fmt: skip
"""GB as they are sold, TFLOP/s and GB/s (:class:`Card`), by compute capability."""
_LINKED = {
    "V100": 150.0,
    "V100 32GB": 150.0,
    "A100": 300.0,
    "A100 80GB": 300.0,
    "H100": 450.0,
    "H200": 450.0,
    "B200": 900.0,
}
CARDS = {
    name: Card(
        name,
        size * 10**9 if size > 100 else size * 2**30,
        capability,
        tflops,
        bandwidth,
        _LINKED.get(name, Card.link),
    )
    for capability, cards in _SOLD.items()
    for name, (size, tflops, bandwidth) in cards.items()
}


_OTHERS = ("ti", "super", "laptop", "nvl", "ada", "d")
"""What makes another card of a name: a 3080 Ti is no 3080."""


def known_card(device: str) -> Card | None:
    """The card that a device's name speaks of, as "NVIDIA H100 80GB HBM3" of the H100; None for others."""
    name = _plain(device)
    known = {_plain(each): card for each, card in CARDS.items()}
    longest = max((each for each in known if name.startswith(each)), key=len, default=None)
    if longest is None or name.removeprefix(longest).startswith(_OTHERS):
        return None
    return known[longest]


def card_named(name: str) -> Card:
    """A card by what people call it, whatever the spelling.

    Raises:
        UserError: None is called so.
    """
    known = {_plain(each): card for each, card in CARDS.items()}
    if (card := known.get(_plain(name))) is not None:
        return card
    near = difflib.get_close_matches(_plain(name), known, n=1)
    raise UserError(
        f"unknown GPU {shown(name, 60)!r}",
        rule=f"Known are {', '.join(sorted(CARDS))}.",
        way_out=f"Did you mean {known[near[0]].name}?" if near else "Give its memory instead: --memory 24GiB",
    )


def _plain(name: str) -> str:
    word = re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
    return re.sub(r"(?<=\d)gi?b$", "gb", word)


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
