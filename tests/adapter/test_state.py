"""The trained tensors of a wrapped model."""

from __future__ import annotations

import torch
from torch import nn

from slimtune.adapter.state import own_storage_


def test_a_part_of_something_large_gets_its_own_memory() -> None:
    large = torch.arange(4096.0)
    part, transposed = nn.Parameter(large[8:16]), nn.Parameter(large[100:108].view(2, 4).T)
    flat = torch.zeros(64)
    views = [nn.Parameter(flat[:32]), nn.Parameter(flat[32:])]
    own_storage_([part, transposed, *views])
    assert part.untyped_storage().nbytes() == transposed.untyped_storage().nbytes() == 32
    assert torch.equal(part, large[8:16])
    assert torch.equal(transposed, large[100:108].view(2, 4).T)
    # What is used whole stays where it is.
    assert {view.untyped_storage().data_ptr() for view in views} == {flat.untyped_storage().data_ptr()}
