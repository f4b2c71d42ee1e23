"""Which code made what is kept: what other code or another library made is made anew."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

__all__ = ["code_sum"]


@cache
def code_sum(packages: tuple[str, ...], libraries: tuple[str, ...]) -> str:
    """SHA-256 over the modules of some of slimtune's packages and the versions of some libraries.

    Args:
        packages: Names below ``slimtune``; modules of packages inside them don't count.
        libraries: Distributions.
    """
    made = hashlib.sha256()
    for library in libraries:
        made.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    for package in packages:
        for file in sorted((Path(__file__).parent / package).glob("*.py")):
            made.update(file.read_bytes())
    return made.hexdigest()
