"""What goes off the device, and what state dicts become on their way to a file and back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from slimtune.training.checkpoint import Checkpoints, OffDevice, Snapshot, from_plain, to_plain

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_copies_are_of_their_moment(device: str) -> None:
    flat = torch.arange(24, dtype=torch.float32, device=device)
    codes = torch.arange(8, dtype=torch.uint8, device=device)
    tensors = {
        "a": flat[:6].view(2, 3),
        "b": flat[8:20].view(3, 4),
        "transposed": flat[8:20].view(3, 4).T,
        "codes": codes,
        "scalar": torch.tensor(2.5, dtype=torch.float64, device=device),
        "empty": torch.empty(0, 3, device=device),
    }
    before = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    copies = OffDevice([flat, *tensors.values()])
    flat.zero_()
    codes.fill_(255)
    made = copies.of(tensors)
    assert made.keys() == before.keys()
    for name, tensor in made.items():
        assert tensor.device.type == "cpu"
        assert tensor.dtype == before[name].dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, before[name])
    read = load(save(made))
    assert all(torch.equal(read[name], before[name]) for name in before)


def test_views_of_one_storage_are_one_copy() -> None:
    flat = torch.zeros(1024)
    views = {str(at): flat[at : at + 8] for at in range(0, 1024, 8)}
    assert len(OffDevice(views.values())._copies) == 1
    assert OffDevice([flat]).of(views).keys() == views.keys()
    with pytest.raises(KeyError):
        OffDevice([flat]).of({"another": torch.zeros(8)})


def test_a_state_dict_comes_back_as_it_was() -> None:
    shared = torch.arange(3)
    tree = {"state": {0: {"step": 3, "m": shared, "v": (shared, [1.5, None, True])}}, "groups": [{"lr": 1e-3}]}
    plain, tensors = to_plain(tree)
    assert len(tensors) == 1
    back = from_plain(json.loads(json.dumps(plain)), tensors)
    assert back["state"][0]["m"] is back["state"][0]["v"][0]
    assert torch.equal(back["state"][0]["m"], shared)
    assert back["state"][0]["v"][1] == [1.5, None, True]
    assert back["groups"] == [{"lr": 1e-3}]
    with pytest.raises(TypeError, match="without pickle"):
        to_plain({"what": object()})


def test_what_stands_in_line_gives_way_to_what_is_newer_unless_it_is_the_best(tmp_path: Path) -> None:
    checkpoints, free = Checkpoints(tmp_path, keep=9), threading.Event()

    def of(step: int) -> Callable[[], Snapshot]:
        def made() -> Snapshot:
            free.wait(30)
            return Snapshot(step, {"adapter_model": {"a": torch.ones(2)}})

        return made

    assert not checkpoints.save_later(1, of(1)), "nothing is under way"
    checkpoints.save(1, of(1))
    assert checkpoints.saving
    assert checkpoints.save_later(2, of(2))
    assert checkpoints.save_later(3, of(3)), "in place of 2"
    checkpoints.best_step = 3
    assert not checkpoints.save_later(4, of(4)), "3 is the best now: 4 has to wait"
    checkpoints.best_step = 5
    assert checkpoints.save_later(5, of(5)), "and isn't any more"
    free.set()
    assert checkpoints.wait() == 5
    assert not checkpoints.saving
    assert checkpoints.steps() == [5, 1]
