"""What a machine has free, as the system and its container say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtune.hardware import free_ram

GIB = 2**30


def machine(root: Path, free: int, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {free // 1024} kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_limit_counts(version: int, tmp_path: Path) -> None:
    folder = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory"
    most, used = (
        ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    unused = "inactive_file" if version == 2 else "total_inactive_file"
    limits = {
        f"{folder}/{most}": f"{16 * GIB}\n", f"{folder}/{used}": f"{9 * GIB}\n",
        f"{folder}/memory.stat": f"anon 7\n{unused} {3 * GIB}\n",
    }  # fmt: skip
    assert free_ram(machine(tmp_path / "less", 64 * GIB, limits)) == 10 * GIB
    assert free_ram(machine(tmp_path / "more", 4 * GIB, limits)) == 4 * GIB
    assert free_ram(machine(tmp_path / "none", 64 * GIB, {**limits, f"{folder}/{most}": "max\n"})) == 64 * GIB


def test_a_system_without_these_files_has_none(tmp_path: Path) -> None:
    assert free_ram(tmp_path) == 0


def test_this_machine_has_some() -> None:
    assert 0 < free_ram() < 2**60
