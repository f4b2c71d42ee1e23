"""Weight files read and written one tensor at a time, and the adapter's folder as PEFT writes it.

Nothing here holds more than one tensor of a model in memory, so a base of any size is fingerprinted, merged and
exported in the room that its largest tensor takes. Safetensors has a reader for single tensors and none for writing
them (github.com/huggingface/safetensors, "Format"), so the writer stands here.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slimtune.adapter.patterns import check_patterns
from slimtune.adapter.settings import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config, check_values
from slimtune.adapter.vocabulary import fit_vocabulary, is_copy
from slimtune.base.packed import Mxfp4Tensor
from slimtune.errors import SlimtuneError, UserError

__all__ = [
    "TensorSpec",
    "UnpackedFiles",
    "WeightFiles",
    "attach_adapter",
    "find_adapter",
    "write_safetensors",
]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' names of torch's dtypes."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class WeightFiles:
    """The safetensors files of one folder, as a lazy mapping from tensor name to tensor."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of the folder's weight files.

        Raises:
            UserError: The folder has no safetensors weights, or a file is damaged.
        """
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self.specs: dict[str, TensorSpec] = {}
        files = sorted(folder.glob("*.safetensors"))
        whole = folder / "model.safetensors"
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                files = sorted({folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{index} can't be read: {error}") from None
        elif whole.is_file():
            files = [whole]
        if not files:
            raise UserError(
                f"{folder} has no .safetensors weights",
                rule="A base's identity is taken from them, and merging reads them.",
                way_out="Save the model once with Transformers' save_pretrained, which writes safetensors.",
            )
        for file in files:
            with _opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                    part = handle.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(
                            f"{file}: {name} is of type {part.get_dtype()}",
                            rule=f"Weights are read as {', '.join(DTYPES)}.",
                            way_out="Take the 16-bit original that it was made from.",
                        )
                    self.file_of[name] = file
                    self.specs[name] = TensorSpec(DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, on the CPU; its memory is free again when it is dropped."""
        with _opened(self.file_of[name]) as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def shards(self) -> dict[Path, list[str]]:
        """The tensors' names, file by file, in the order they lie in."""
        made: dict[Path, list[str]] = {}
        for name, file in self.file_of.items():
            made.setdefault(file, []).append(name)
        return made

    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and bytes; how they are spread over files doesn't count."""
        digest = hashlib.sha256()
        for name in sorted(self.specs):
            spec = self.specs[name]
            content = hashlib.sha256(_bytes(self[name])).hexdigest()
            digest.update(f"{name}|{_NAMES[spec.dtype]}|{spec.shape}|{content}\n".encode())
        return digest.hexdigest()


class UnpackedFiles(WeightFiles):
    """The files of a base as if the expert stacks that they hold in MXFP4, as gpt-oss is published, were in bf16.

    That is exact: each weight is one of 16 values times a power of two.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._packed: dict[str, tuple[str, str]] = {}
        for blocks in [name for name in self.specs if name.endswith("_blocks")]:
            stack = blocks.removesuffix("_blocks")
            experts, rows, groups, half = self.specs.pop(blocks).shape
            self._packed[stack] = blocks, f"{stack}_scales"
            self.specs.pop(f"{stack}_scales")
            self.specs[stack] = TensorSpec(torch.bfloat16, (experts, groups * half * 2, rows))

    def __getitem__(self, name: str) -> Tensor:
        """One tensor; a stack is unpacked expert by expert."""
        if name not in self._packed:
            return super().__getitem__(name)
        blocks, scales = (super(UnpackedFiles, self).__getitem__(part) for part in self._packed[name])
        unpacked = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        for at, numbers in enumerate(unpacked):
            numbers.copy_(Mxfp4Tensor.of_files(blocks[at : at + 1], scales[at : at + 1], unpacked.dtype).unpack()[0])
        return unpacked


def write_safetensors(
    file: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file tensor by tensor.

    Args:
        file: What is written; it appears whole, by a rename, when the last tensor is in.
        specs: Each tensor's dtype and shape, in the order of ``tensors``.
        tensors: The tensors, made one at a time.
        metadata: Text entries of the header.

    Raises:
        UserError: There is no room for the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = file.with_name(f".{file.name}.tmp")
    order = iter(specs.items())
    try:
        with temporary.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, tensor in tensors:
                expected, spec = next(order)
                if name != expected or tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                    raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} where {expected} {spec} belongs")
                out.write(_bytes(tensor))
        if missing := [name for name, _ in order]:
            raise ValueError(f"tensors that were announced did not come: {missing}")
        temporary.replace(file)
    except OSError as error:
        raise UserError(
            f"{file} can't be written: {error.strerror}", way_out="Make room, or choose another disk."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def find_adapter(path: Path) -> Path | None:
    """The adapter's folder in a run folder, ``path`` itself if it is one, or None."""
    for folder in (path / "adapter", path):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    return None


def attach_adapter(model: nn.Module, folder: Path, *, on_meta: bool = False) -> PeftModel:
    """Wrap ``model`` with the adapter in ``folder``, as plain PEFT does; its vocabulary becomes the adapter's.

    Args:
        model: The base; or, ``on_meta``, its modules without weights, of which only the adapter's get some, on the CPU.
        folder: The adapter's folder.
        on_meta: The model lies on the meta device.

    Raises:
        UserError: The adapter doesn't fit the model, its file is damaged, or it could do more than hold an adapter.
    """
    settings = adapter_config(folder)
    check_values(folder)
    check_patterns(str(folder / ADAPTER_CONFIG), settings, _names(model))
    device = {"torch_device": "cpu"} if on_meta else {}
    try:
        # PeftModel.from_pretrained, in its two steps, for it keeps the second one's result to itself: of names that
        # don't fit it warns, and the model answers as its base.
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = not on_meta
        fit_vocabulary(model, folder, settings, folder / ADAPTER_WEIGHTS)
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        wrapped: PeftModel = kind(model, config, "default", low_cpu_mem_usage=on_meta)
        if on_meta:
            _make_room(wrapped, folder)
        loaded = wrapped.load_adapter(folder, "default", is_trainable=False, **device)
        if loaded.missing_keys and _copied(wrapped, folder):
            return wrapped
    except SlimtuneError:
        raise
    except Exception as error:  # PEFT takes the config at its word: it fails anywhere, with anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _unfit(folder, " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])) from error
    modules = {name.removeprefix("base_model.model.") for name, _ in wrapped.named_modules()}
    unknown = [name for name in loaded.unexpected_keys if not is_copy(name, modules)]
    missing = loaded.missing_keys or _missing_biases(wrapped, folder, settings)
    for problem, names in (("lacks", missing), ("holds the unknown", unknown)):
        if names:
            raise _unfit(folder, f"it {problem} {names[0].removeprefix('base_model.model.')}")
    return wrapped


def _copied(wrapped: nn.Module, folder: Path) -> bool:
    """Whether the file's names are the adapter's, which gets its values then.

    PEFT takes names that look like those of an older Transformers for such, and what it has renamed for missing: of its
    own files too (Laguna's shared experts, ``findings/peft-renames-what-it-saved.sh``). No run of slimtune's adapts
    what PEFT reads so (:mod:`slimtune.adapter.targets`), but other tools' do.
    """
    own: dict[str, torch.Tensor] = get_peft_model_state_dict(
        wrapped, state_dict=dict(wrapped.named_parameters()), save_embedding_layers=False
    )
    with _opened(folder / ADAPTER_WEIGHTS) as handle, torch.no_grad():
        if own.keys() != set(handle.keys()):
            return False
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in own}
        if any(tensor.is_meta or tuple(tensor.shape) != shapes[name] for name, tensor in own.items()):
            return False
        for name, tensor in own.items():
            tensor.copy_(handle.get_tensor(name))
    return True


def _names(model: nn.Module) -> list[str]:
    """All names that PEFT looks for an adapter's among."""
    return [*(name for name, _ in model.named_modules()), *(name for name, _ in model.named_parameters())]


def _missing_biases(wrapped: nn.Module, folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The biases that trained with the adapter, and aren't in its file; PEFT doesn't miss them."""
    if settings.get("bias") not in ("all", "lora_only"):
        return []
    expected = get_peft_model_state_dict(
        wrapped, state_dict=dict(wrapped.named_parameters()), save_embedding_layers=False
    )
    with _opened(folder / ADAPTER_WEIGHTS) as handle:
        return sorted(expected.keys() - set(handle.keys()))


def _make_room(wrapped: nn.Module, folder: Path) -> None:
    """Take what the adapter's file will fill off the meta device: all that trained, and what was saved beside it."""
    with _opened(folder / ADAPTER_WEIGHTS) as handle:
        saved = set(handle.keys())
    for name, parameter in list(wrapped.named_parameters()):
        if parameter.requires_grad or name in saved:
            module, _, attribute = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            setattr(wrapped.get_submodule(module), attribute, empty)


def _unfit(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the adapter in {folder} does not fit its base: {reason}",
        rule="An adapter belongs to one base, and to the class that it was trained on.",
        way_out="Give the base it was trained on: --base PATH.",
    )


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} can't be read: {error}", way_out="Check that the copy or download is whole.") from None


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's values, without a copy where it is contiguous."""
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
