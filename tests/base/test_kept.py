"""A base's 4-bit bytes from an earlier start are those that loading makes; anything else is thrown away, and said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import modeling_utils

from slimtune.base import kept
from slimtune.base.load import Base, load_base
from slimtune.base.quantize import fingerprint
from slimtune.hardware import detect
from tests.families.tiny import save

HARDWARE = detect()


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own that takes small bases too, and its folder of bases."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "LEAST_BYTES", 0)
    return tmp_path / "cache" / "slimtune" / "bases"


@pytest.fixture(params=["qwen2", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Linear layers that bitsandbytes packs, and experts that slimtune does."""
    return save(request.param, tmp_path / "model")


def load(folder: Path, **options: Any) -> Base:
    return load_base(str(folder), HARDWARE, compute_dtype="fp32", **options)


def test_the_second_start_has_the_same_base(everything: Path, folder: Path) -> None:
    first, second = load(folder), load(folder)
    assert "are kept for the next start" in first.kept
    assert second.kept == "its 4-bit bytes were kept from an earlier start"
    assert fingerprint(second.model) == fingerprint(first.model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(second.model(input_ids=ids).logits, first.model(input_ids=ids).logits)
    one, other = first.model, second.model
    assert type(other) is type(one)
    assert other.name_or_path == one.name_or_path
    assert other.generation_config.to_dict() == one.generation_config.to_dict()
    assert other.config.to_dict() == one.config.to_dict()
    assert [type(x) for x in other.parameters()] == [type(x) for x in one.parameters()]


def test_what_is_read_is_what_is_kept(everything: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's own files aren't opened for their weights."""
    load(folder)
    opened: list[str] = []
    safe_open = modeling_utils.safe_open
    monkeypatch.setattr(
        modeling_utils, "safe_open", lambda path, **options: opened.append(path) or safe_open(path, **options)
    )
    load(folder)
    assert opened == []
    kept.clear()
    load(folder)
    assert opened != []


@pytest.mark.parametrize("what", ["a bit", "cut", "gone", "foreign", "no words"])
def test_what_isnt_what_was_written_is_thrown_away(what: str, everything: Path, tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path / "model")
    first = load(folder)
    (base,) = everything.iterdir()
    files = sorted(base.glob("*.safetensors"))
    if what == "a bit":
        tensors = load_file(files[1])
        name = next(name for name in tensors if name.endswith(":codes"))
        tensors[name].view(-1)[7] ^= 1
        save_file(tensors, files[1])
    elif what == "cut":
        files[1].write_bytes(files[1].read_bytes()[:-1])
    elif what == "gone":
        files[1].unlink()
    elif what == "foreign":
        about = base / "about.json"
        about.write_text(about.read_text().replace('"double_quant": true', '"double_quant": false'))
    else:
        (base / "about.json").write_text("{")
    again = load(folder)
    assert fingerprint(again.model) == fingerprint(first.model)
    assert "are kept for the next start" in again.kept
    assert ("thrown away" in again.kept) == (what in ("a bit", "cut", "gone"))
    assert load(folder).kept == "its 4-bit bytes were kept from an earlier start"


def test_other_files_or_options_are_another_base(everything: Path, tmp_path: Path) -> None:
    folder = save("qwen2", tmp_path / "model")
    load(folder)
    assert "are kept" in load(folder, double_quant=False).kept
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = tensors[name] + 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "are kept" in load(folder).kept
    assert len(kept.kept_bases()) == 3
    assert kept.clear() > 0
    assert kept.kept_bases() == []


def test_a_disk_without_room_keeps_nothing(everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("qwen2", tmp_path / "model")
    monkeypatch.setattr(kept, "_SHARE", 1e-9)
    assert load(folder).kept.endswith("they would take too much of the disk")
    assert list(everything.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_said(
    everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(kept, "save_file", full)
    base = load(save("qwen2", tmp_path / "model"))
    assert base.kept.startswith("its 4-bit bytes aren't kept for the next start: ")
    assert "No space left on device" in base.kept
    assert list(everything.iterdir()) == []


def test_the_one_that_wasnt_used_for_long_makes_room(everything: Path, tmp_path: Path) -> None:
    folder = save("qwen2", tmp_path / "model")
    load(folder)
    load(folder, double_quant=False)
    load(folder)  # used again
    (_, size), (used, _) = kept.kept_bases()
    disk = shutil.disk_usage(everything)
    share = (2.5 * size) / (disk.free + 2 * size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "_SHARE", share)
        load_base(str(folder), HARDWARE, compute_dtype="bf16")
    assert used in [folder for folder, _ in kept.kept_bases()]
    assert len(kept.kept_bases()) == 2


def test_a_packed_weight_goes_to_the_device_that_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers calls the first GPU 0, which is false: the packed weights stayed beside it."""
    asked: list[Any] = []
    monkeypatch.setattr(kept.Params4bit, "from_prequantized", lambda data, stats, device: asked.append(device))
    weight = kept.KeptWeights("weight", {"": torch.zeros(4)}, None)
    for device in (0, torch.device("cuda", 0), None):
        weight.to(device=device)
    assert asked == [0, torch.device("cuda", 0), "cpu"]
