"""Segments that grow are chosen where nobody has chosen."""

from __future__ import annotations

import pytest

from slimtune.training.allocator import growing_segments


def test_it_is_set_for_torch() -> None:
    environment: dict[str, str] = {}
    growing_segments(environment)
    assert environment == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_somebody_has_set_stays(name: str) -> None:
    environment = {name: "max_split_size_mb:512"}
    growing_segments(environment)
    assert environment == {name: "max_split_size_mb:512"}
