"""Small runs in a test's own folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.small import SmallRun, small_run

MakeRun = Callable[..., SmallRun]


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    """:func:`small_run` by name; the same name again goes on with the run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def make(name: str = "run", **options: Any) -> SmallRun:
        return small_run(tmp_path / name, **options)

    yield make
    torch.set_num_threads(threads)
