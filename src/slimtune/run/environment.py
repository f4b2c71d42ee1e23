"""The machine and the versions that a run ran with."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime
from typing import Any

__all__ = ["LIBRARIES", "environment", "library_versions"]

LIBRARIES = (
    "slimtune",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "tokenizers",
    "triton",
)


def library_versions() -> dict[str, str]:
    """Installed version of slimtune and of each library that a result depends on."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def environment(hardware: dict[str, Any]) -> dict[str, Any]:
    """What ``environment.json`` holds."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "hardware": hardware,
        "versions": library_versions(),
    }
