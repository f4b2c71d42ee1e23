from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slimtune.adapter.files import DTYPES, TensorSpec, WeightFiles, write_safetensors
from slimtune.errors import UserError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
SPECS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.builds(TensorSpec, st.sampled_from(sorted(DTYPES.values(), key=str)), SHAPES),
    max_size=6,
)


def _random(spec: TensorSpec) -> torch.Tensor:
    raw = torch.randint(0, 256, (spec.nbytes,), dtype=torch.uint8)
    return (raw % 2 if spec.dtype == torch.bool else raw).view(spec.dtype).reshape(spec.shape)


@settings(max_examples=60, deadline=None)
@given(specs=SPECS)
def test_what_is_written_tensor_by_tensor_is_what_safetensors_reads(
    specs: dict[str, TensorSpec], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("written") / "model.safetensors"
    tensors = {name: _random(spec) for name, spec in specs.items()}
    write_safetensors(file, specs, tensors.items(), {"who": "ünï"})
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        same = read[name].reshape(-1).view(torch.uint8) == tensor.reshape(-1).view(torch.uint8)
        assert bool(same.all())
    assert [path.name for path in file.parent.iterdir()] == ["model.safetensors"]


def test_a_tensor_that_is_not_what_was_announced_leaves_no_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="belongs"):
        write_safetensors(file, {"a": TensorSpec(torch.float32, (2,))}, [("a", torch.zeros(3))])
    assert not list(tmp_path.iterdir())


def test_fingerprint_sees_every_bit_and_no_sharding(tmp_path: Path) -> None:
    tensors = {f"layer.{n}": torch.randn(40, 7).to(torch.bfloat16) for n in range(4)}
    whole, split, changed, renamed = (tmp_path / name for name in ("whole", "split", "changed", "renamed"))
    for folder in (whole, split, changed, renamed):
        folder.mkdir()
    save_file(tensors, whole / "model.safetensors")
    for part, names in enumerate((["layer.3", "layer.0"], ["layer.1", "layer.2"])):
        save_file({name: tensors[name] for name in names}, split / f"model-{part}.safetensors")
    flipped = {name: tensor.clone() for name, tensor in tensors.items()}
    flipped["layer.2"].view(torch.int16)[39, 6] ^= 1
    save_file(flipped, changed / "model.safetensors")
    save_file({name.replace("3", "9"): tensor for name, tensor in tensors.items()}, renamed / "model.safetensors")
    one = WeightFiles(whole).fingerprint()
    assert WeightFiles(split).fingerprint() == one
    assert WeightFiles(changed).fingerprint() != one
    assert WeightFiles(renamed).fingerprint() != one


def test_a_folder_without_weights_and_a_cut_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.safetensors weights"):
        WeightFiles(tmp_path)
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors can't be read"):
        WeightFiles(tmp_path)
