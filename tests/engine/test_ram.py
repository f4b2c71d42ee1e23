"""Locked RAM: exact sizes, found by its tensors, and a refusal that says the way out."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from slimtune.engine import ram as ram_module
from slimtune.engine.ram import LockedRam, host_of
from slimtune.errors import UserError
from slimtune.ranks.group import Ranks
from slimtune.ranks.host import Host, on_host
from slimtune.ranks.place import Place


def test_it_lives_as_long_as_a_tensor_over_it() -> None:
    ram = LockedRam(4096, torch.device("cpu"), "tests")
    part = ram.on_device()[1024:2048].view(torch.float32)
    part.fill_(3.0)
    assert ram.host.nbytes == 4096
    interface = ram.__cuda_array_interface__
    assert (interface["shape"], interface["data"]) == ((4096,), (ram.host.data_ptr(), False))
    del ram
    gc.collect()
    host = host_of(part)
    assert host is not None
    assert (host.data_ptr(), host.dtype, host.shape) == (part.data_ptr(), part.dtype, part.shape)
    assert host_of(torch.zeros(4096)) is None
    start = part.data_ptr() - 1024
    assert start in ram_module._STARTS
    del part, host
    gc.collect()
    assert start not in ram_module._STARTS


def test_ranks_of_one_host_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram_module, "free_ram", lambda: 1000)
    assert ram_module.ram_to_lock() == 700
    monkeypatch.setattr(Ranks, "left", False)
    monkeypatch.setattr(Ranks, "told", lambda self, value: [value, 300 if isinstance(value, int) else value])
    with on_host(Host(Ranks(Place(1, 3)), (1, 2))):
        assert ram_module.ram_to_lock() == 300, "on the host of rank 0 less is free"


def test_a_refusal_says_how_much_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaGetErrorString=lambda _: "out of memory")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(UserError, match=r"0\.00GiB of RAM can't be locked .*out of memory") as refused:
        LockedRam(4096, torch.device("cuda"), "layers' inputs")
    assert "--max-length" in (refused.value.way_out or "")
    with pytest.raises(UserError, match="GiB of RAM can't be locked"):
        LockedRam(1 << 62, torch.device("cuda"), "layers' inputs")
