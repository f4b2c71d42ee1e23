"""A model before its weights are there: its config, the headers of its files, and what it will weigh.

Nothing but headers is read: of a local folder and of what lies in the hub's cache through safetensors, of other hub ids
by requests for the first bytes of each file (:func:`huggingface_hub.get_safetensors_metadata`), a few megabytes for any
model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel

from slimtune.base.classes import language_class, skeleton
from slimtune.base.named import model_source
from slimtune.base.packed import NF4_BLOCK, bulk_bytes
from slimtune.base.quantizer import policy_of
from slimtune.base.source import from_pretrained, local_revision, upstream_errors
from slimtune.base.stored import Stored, stored_format
from slimtune.errors import UserError, shown

__all__ = ["Unloaded", "unloaded_base"]

_INDEX, _ONE = "model.safetensors.index.json", "model.safetensors"
_SCALES_AT_ONCE = 256
_WHOLE = 0.98
"""Of a model's weights that its files must hold: a buffer or a tied head more or less is no other model."""


@dataclass(frozen=True)
class Unloaded:
    """What is known of a base without its weights."""

    model: PreTrainedModel
    """On the meta device, in float32; unquantised."""
    source: str
    stored: Stored
    """How its files hold it."""
    file_bytes: int
    """Of all tensors in its files: what a download takes."""
    four_bit: frozenset[str]
    """Names of the parameters that will lie in 4 bits."""
    dtype: torch.dtype
    """What the others will lie in."""
    double_quant: bool

    def bytes_of(self, name: str, parameter: torch.Tensor) -> int:
        """What a parameter will take as it is loaded."""
        if name not in self.four_bit:
            return parameter.numel() * self.dtype.itemsize
        matrices = parameter.shape[0] if parameter.dim() == 3 else 1
        weights = parameter.numel() // matrices
        if self.stored == "mxfp4" and parameter.dim() == 3:
            return matrices * (weights // 2 + weights // 32)
        blocks = math.ceil(weights / NF4_BLOCK)
        scales = blocks + 4 * math.ceil(blocks / _SCALES_AT_ONCE) + 4 if self.double_quant else 4 * blocks
        return matrices * (blocks * NF4_BLOCK // 2 + scales)

    def bulk_of(self, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
        """Bytes of each of the tensors that hold most of a parameter, as it is loaded."""
        if name not in self.four_bit:
            return (self.bytes_of(name, parameter),)
        in_mxfp4 = self.stored == "mxfp4" and parameter.dim() == 3
        return bulk_bytes(parameter.shape, double_quant=self.double_quant, mxfp4=in_mxfp4)

    @property
    def nbytes(self) -> int:
        """What the base will take in memory."""
        return sum(self.bytes_of(name, parameter) for name, parameter in self.model.named_parameters())


def unloaded_base(
    model: str,
    *,
    dtype: torch.dtype,
    quantization: str = "nf4",
    double_quant: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    headers: bool = True,
) -> Unloaded:
    """The base that :func:`slimtune.base.load.load_base` would load, without a weight read.

    Without ``headers`` the config alone is looked at, which may be there when the hub can't be reached.

    Raises:
        UserError: The model is unknown or can't be reached, its files have no index or hold something else than its
            config says, or it is none that continues text.
    """
    source = model_source(model)
    config = from_pretrained(
        AutoConfig, source, revision=local_revision(source, revision), trust_remote_code=trust_remote_code
    )
    language_class(config, source)
    stored = stored_format(model, config)
    made = skeleton(source, revision=local_revision(source, revision), trust_remote_code=trust_remote_code)
    tensors = _tensors(source, revision) if headers else []
    policy = policy_of(made)
    four_bit = (policy.linears | policy.packed) if quantization == "nf4" or stored == "bitsandbytes" else frozenset()
    if stored == "mxfp4":
        four_bit |= {name for name in policy.packed if made.get_parameter(name).dim() == 3}
    weights = sum(parameter.numel() for parameter in made.parameters())
    in_files = sum(count for count, _ in tensors)
    if headers and stored == "plain" and in_files < _WHOLE * weights:
        raise UserError(
            f"the files of {model} hold {in_files:,} weights, and its config names {weights:,}",
            rule="A model is made of what its files hold.",
            way_out="Check that the download is whole.",
        )
    return Unloaded(made, source, stored, sum(size for _, size in tensors), four_bit, dtype, double_quant)


def _tensors(source: str, revision: str | None) -> list[tuple[int, int]]:
    folder = Path(source) if Path(source).is_dir() else _downloaded(source, revision)
    return _hub_tensors(source, revision) if folder is None else _local_tensors(folder)


def _downloaded(source: str, revision: str | None) -> Path | None:
    """Where the hub's cache has all of a model's weights; None where it hasn't."""
    from huggingface_hub import try_to_load_from_cache

    with upstream_errors(source):
        one, index = (try_to_load_from_cache(source, name, revision=revision) for name in (_ONE, _INDEX))
    if isinstance(index, str):
        folder = Path(index).parent
        return folder if all((folder / name).is_file() for name in _weight_map(Path(index)).values()) else None
    return Path(one).parent if isinstance(one, str) else None


def _local_tensors(folder: Path) -> list[tuple[int, int]]:
    """Elements and bytes of every tensor in a folder's files, by their headers.

    Raises:
        UserError: There is no index to several files, or a file is missing or isn't what its header says.
    """
    index, files = folder / _INDEX, sorted(folder.glob("*.safetensors"))
    if index.is_file():
        files = sorted({folder / name for name in _weight_map(index).values()})
    elif (folder / _ONE).is_file():
        files = [folder / _ONE]
    elif files:
        raise UserError(
            f"model folder {folder} has {len(files)} safetensors files and no {_INDEX}",
            rule="The index says which file holds which weight; Transformers reads none without it.",
            way_out="Download it too, or save the model anew: save_pretrained writes it.",
        )
    else:
        raise UserError(
            f"model folder {folder} has no safetensors files",
            rule="A base is a folder with config.json and safetensors weights.",
            way_out="Check that the download is whole; other formats are saved anew by save_pretrained.",
        )
    return [tensor for file in files for tensor in _tensors_of(file)]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(Path(file).name) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index} can't be read: {shown(str(error), 200)}",
            rule="It holds weight_map: the file of each weight, by its name.",
            way_out="Check that the download is whole.",
        ) from None
    return names


def _tensors_of(file: Path) -> list[tuple[int, int]]:
    try:
        # It sees that the header's tensors fill the file, to the byte. For torch it would ask for memory of that size.
        with safe_open(file, framework="np") as handle:
            slices = [handle.get_slice(name) for name in handle.keys()]  # noqa: SIM118 - safe_open is no mapping
            return [_sizes(slice_.get_shape(), slice_.get_dtype()) for slice_ in slices]
    except FileNotFoundError:
        problem = "it isn't there"
    except (OSError, SafetensorError) as error:
        problem = shown(str(error), 200)
    raise UserError(f"{file} can't be read: {problem}", way_out="Check that the download is whole.")


def _sizes(shape: Any, dtype: str) -> tuple[int, int]:
    """Elements and bytes of a tensor; safetensors' names of types end in their bits."""
    count = math.prod(int(side) for side in shape)
    digits = "".join(character for character in dtype.partition("_")[0] if character.isdigit())
    return count, count * int(digits or 8) // 8


def _hub_tensors(source: str, revision: str | None) -> list[tuple[int, int]]:
    from huggingface_hub import get_safetensors_metadata

    with upstream_errors(source):
        files = get_safetensors_metadata(source, revision=revision).files_metadata.values()
    return [_sizes(tensor.shape, tensor.dtype) for file in files for tensor in file.tensors.values()]
