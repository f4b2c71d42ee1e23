"""What a model weighs is known from its headers, to the byte; and what a person can get wrong about them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimtune.base import unloaded
from slimtune.base.load import Base, load_base
from slimtune.base.quantize import bytes_by_part
from slimtune.base.unloaded import unloaded_base
from slimtune.errors import UserError
from slimtune.hardware import Hardware
from tests.engine import models


def weighed(base: Base) -> int:
    return sum(part.bytes_now for part in bytes_by_part(base.model))


def test_the_embedded_model_weighs_what_it_will(base: Base) -> None:
    known = unloaded_base("smollm2-135m", dtype=torch.float32)
    assert known.nbytes == weighed(base)
    assert all(parameter.is_meta for parameter in known.model.parameters())
    files = Path(known.source).glob("*.safetensors")
    assert known.file_bytes == sum(tensor.nbytes for file in files for tensor in load_file(file).values())


@pytest.mark.parametrize(
    ("family", "quantization", "double"),
    [("qwen3_moe", "nf4", True), ("qwen3_moe", "nf4", False), ("gemma4-e2b", "nf4", True), ("gpt_oss", "none", True)],
)
def test_so_do_experts_and_tables(
    family: str, quantization: str, double: bool, model_folder: Path, tmp_path: Path, hardware: Hardware
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / family, ignore=shutil.ignore_patterns("*.safetensors*", "*.json"))
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    models.make_base(family).save_pretrained(folder)
    options = {"quantization": quantization, "double_quant": double}
    known = unloaded_base(str(folder), dtype=torch.float32, **options)
    assert known.nbytes == weighed(load_base(str(folder), hardware, compute_dtype="fp32", **options))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    models.make_base("qwen3").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_files_of_an_index_are_one_model(sharded: Path) -> None:
    known = unloaded_base(str(sharded), dtype=torch.float32)
    assert known.file_bytes == sum(parameter.nbytes for parameter in models.make_base("qwen3").parameters())


def test_a_folder_without_its_index_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"safetensors files and no model\.safetensors\.index\.json") as refused:
        unloaded_base(str(sharded), dtype=torch.float32)
    assert "Download it too" in (refused.value.way_out or "")
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="has no safetensors files"):
        unloaded_base(str(sharded), dtype=torch.float32)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": "gone.safetensors"}}'])
def test_an_index_that_is_none_is_refused(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="can't be read"):
        unloaded_base(str(sharded), dtype=torch.float32)


def test_a_header_that_lies_is_refused(sharded: Path) -> None:
    file = next(iter(sorted(sharded.glob("*.safetensors"))))
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=f"{file.name} can't be read"):
        unloaded_base(str(sharded), dtype=torch.float32)
    file.write_bytes(whole)
    save_file({name: tensor[:1].clone() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"hold [\d,]+ weights, and its config names"):
        unloaded_base(str(sharded), dtype=torch.float32)


def test_a_hub_id_is_asked_for_headers_alone(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config comes from the cache or the hub as Transformers reads it; here from a folder."""
    tensor = SimpleNamespace(shape=[10**6, 1000], dtype="BF16")
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors={"a": tensor})})
    asked = []

    def get(source: str, revision: str | None) -> SimpleNamespace:
        asked.append((source, revision))
        return metadata

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get)
    monkeypatch.setattr("slimtune.base.unloaded.model_source", lambda _: "owner/name")
    read = unloaded_base.__globals__["from_pretrained"]
    for module in ("slimtune.base.unloaded", "slimtune.base.classes"):
        monkeypatch.setattr(f"{module}.from_pretrained", lambda loader, _, **options: read(loader, str(sharded)))
    known = unloaded_base("owner/name", dtype=torch.bfloat16, revision="v1")
    assert asked == [("owner/name", "v1")]
    assert known.file_bytes == 2 * 10**9


def test_what_the_hubs_cache_has_whole_is_read_there(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "1"
    shutil.copytree(sharded, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert unloaded._tensors("owner/name", None) == unloaded._tensors(str(sharded), None)
    next(snapshot.glob("*.safetensors")).unlink()  # a download that was broken off: the hub is asked
    with pytest.raises(UserError, match="can't be loaded"):
        unloaded._tensors("owner/name", None)


def test_a_hub_that_is_out_of_reach_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="model nobody/nothing can't be loaded") as refused:
        unloaded_base("nobody/nothing", dtype=torch.bfloat16)
    assert "network" in (refused.value.way_out or "")
    assert "\n" not in refused.value.what


def test_the_index_may_name_no_file_outside_its_folder(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "../other.safetensors")}))
    with pytest.raises(UserError, match=r"model/other\.safetensors can't be read: it isn't there"):
        unloaded_base(str(sharded), dtype=torch.float32)
