"""A base's 4-bit bytes, kept from one start to the next in the user's cache.

To read 16-bit weights and pack them takes most of a large base's loading, and gives the same bytes each time. So they
are written down once, with whatever else the model holds, and read from there as long as its files, the libraries that
packed them and what was asked for are the same. What is read back is held to the sum of what was written: a base that
differs is thrown away, and loaded from its own files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimtune.base.embedded import cache_folder
from slimtune.base.packed import Nf4Tensor, misreads_partial_blocks
from slimtune.base.quantize import fingerprint
from slimtune.base.shelves import layer_of
from slimtune.code import code_sum

__all__ = ["Kept", "KeptWeights", "clear", "kept_bases"]

LEAST_BYTES = 1 << 30
"""Of a base's files: smaller ones are packed in a second."""
_SHARE = 0.25
"""Of the disk, as far as it isn't others': what all bases may take."""
_ABOUT = "about.json"
_INDEX, _ONE, _CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_DECIDE = ("base", "families")
_LIBRARIES = ("torch", "transformers", "bitsandbytes")
_SAMPLES, _SAMPLE = 32, 4096
_DAY = 86400.0


class KeptWeights:
    """One packed weight, which moves to where the model is to have it when it is asked to."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], packed: Mapping[str, Any] | None) -> None:
        self.name, self._tensors, self._packed = name, tensors, packed

    def __getitem__(self, _: Any) -> KeptWeights:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter as it was packed; its numbers have had their dtype since."""
        if self._packed is None:
            stats = {key: tensor for key, tensor in self._tensors.items() if key}
            device = "cpu" if device is None else device  # the first GPU is 0
            made: Tensor = Params4bit.from_prequantized(self._tensors[""], stats, device=device)
            return made
        parts = {part: tensor.to(device) for part, tensor in self._tensors.items()}
        dtype = getattr(torch, self._packed["dtype"])
        return Nf4Tensor(parts, self._packed["shape"], dtype, turned=self._packed["turned"])


@dataclass(frozen=True)
class Kept:
    """Where one base's bytes are kept, if they are.

    Attributes:
        folder: Theirs.
        about: What they follow from: the base's files, the code and libraries, what was asked for.
    """

    folder: Path
    about: dict[str, Any]

    @classmethod
    def of(cls, source: str, revision: str | None, asked: Mapping[str, Any]) -> Kept | None:
        """The place for a base's bytes; None where its files aren't here, or are small.

        Args:
            source: A local folder or hub id.
            revision: Of the hub id.
            asked: What else decides on the bytes.
        """
        files = _files(source, revision)
        if sum(file.stat().st_size for file in files) < LEAST_BYTES:
            return None
        about = {
            "code": code_sum(_DECIDE, _LIBRARIES),
            "files": [_identity(file) for file in files],
            "asked": dict(asked),
            "partial_blocks": misreads_partial_blocks(),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return cls(_root() / digest[:32], about)

    @cached_property
    def said(self) -> dict[str, Any] | None:
        """What was written beside the bytes; None if there are none, or they are another base's."""
        try:
            said: dict[str, Any] = json.loads((self.folder / _ABOUT).read_text(encoding="utf-8"))
            return said if said["about"] == self.about else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def state(self, stack: ExitStack) -> dict[str, Any]:
        """Everything that the model holds, by its names: slices of files, and packed weights; read when asked for.

        Args:
            stack: Closes the files.

        Raises:
            OSError: A file is missing.
            SafetensorError: A file isn't whole.
            ValueError: A tensor is missing, or nothing is kept.
        """
        if self.said is None:
            raise ValueError("nothing is kept")
        of: dict[str, Any] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            handle = stack.enter_context(safe_open(file, framework="pt"))
            of |= dict.fromkeys(handle.keys(), handle)
        missing = set(self.said["tensors"]) - set(of)
        if missing:
            raise ValueError(f"{min(missing)} is missing")
        state: dict[str, Any] = {}
        for name, kind in self.said["weights"].items():
            if kind is None:
                state[name] = of[name].get_slice(name)
                continue
            tensors = {key[len(name) + 1 :]: of[key].get_tensor(key) for key in kind["tensors"]}
            state[name] = KeptWeights(name, tensors, kind["packed"])
        return state

    def agrees(self, model: nn.Module) -> bool:
        """Whether a model holds what was written, to the bit."""
        return self.said is not None and bool(self.said["sum"] == _sum(model))

    def write(self, model: nn.Module) -> int:
        """Keep a model's bytes, a layer at a time; how many they are, 0 if there is no room for them.

        Raises:
            OSError: The cache can't be written.
        """
        groups: dict[str, dict[str, Any]] = {}
        for name, held in _held(model):
            groups.setdefault(layer_of(name), {})[name] = held
        size = sum(
            tensor.nbytes
            for group in groups.values()
            for held in group.values()
            for tensor in _stored(held)[0].values()
        )
        if not _make_room(size, self.folder):
            return 0
        weights: dict[str, Any] = {}
        tensors: list[str] = []
        temporary = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent))
        try:
            for number, group in enumerate(groups.values()):
                written: dict[str, Tensor] = {}
                for name, held in group.items():
                    parts, packed = _stored(held)
                    keys = {key: f"{name}:{key}" if parts.keys() != {""} else name for key in parts}
                    weights[name] = None if parts.keys() == {""} else {"tensors": list(keys.values()), "packed": packed}
                    written |= {keys[key]: _on_host(tensor) for key, tensor in parts.items()}
                save_file(written, temporary / f"{number:05}.safetensors")
                tensors += written
            about = {"about": self.about, "sum": _sum(model), "class": type(model).__name__, "weights": weights}
            text = json.dumps(about | {"tensors": tensors, "bytes": size})
            (temporary / _ABOUT).write_text(text, encoding="utf-8")
            if self.said is None:
                self.throw_away()  # what lies there is nobody's
            # Whoever looks sees all of it or none. If another process was first, its bytes are these.
            try:
                temporary.rename(self.folder)
            except OSError:
                if not self.folder.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return size

    def used(self) -> None:
        """Remember that it was used today: what wasn't for the longest time makes room for others."""
        with suppress(OSError):  # a cache that is shared and can't be written
            os.utime(self.folder / _ABOUT)

    def throw_away(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def kept_bases() -> list[tuple[Path, int]]:
    """All that are kept, as (folder, bytes), the one that wasn't used for the longest time first."""
    folders = [folder for folder in _root().glob("[0-9a-f]*") if (folder / _ABOUT).is_file()]
    folders.sort(key=lambda folder: (folder / _ABOUT).stat().st_mtime)
    return [(folder, sum(file.stat().st_size for file in folder.iterdir())) for folder in folders]


def clear() -> int:
    """Remove all that is kept; how many bytes that were."""
    freed = sum(size for _, size in kept_bases())
    shutil.rmtree(_root(), ignore_errors=True)
    return freed


def _root() -> Path:
    return cache_folder() / "bases"


def _make_room(size: int, folder: Path) -> bool:
    """Let go of bases that weren't used for long, if so many bytes fit then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".*"):
        if left.stat().st_mtime < time.time() - _DAY:  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    others = kept_bases()
    taken = sum(each for _, each in others)
    most = _SHARE * (shutil.disk_usage(folder.parent).free + taken)
    if size > most:
        return False
    for other, each in others:
        if taken + size <= most:
            break
        shutil.rmtree(other, ignore_errors=True)
        taken -= each
    return True


def _files(source: str, revision: str | None) -> list[Path]:
    """A base's config and weights, where they lie here; none if one is missing."""

    def find(name: str) -> Path | None:
        if Path(source).is_dir():
            return Path(source) / name if (Path(source) / name).is_file() else None
        found = try_to_load_from_cache(source, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    index = find(_INDEX)
    names = [_CONFIG, _ONE]
    if index is not None:
        try:
            names = [
                _CONFIG,
                _INDEX,
                *sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())),
            ]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return []
    found = [find(name) for name in names]
    return [] if None in found else [file for file in found if file is not None]


def _identity(file: Path) -> list[Any]:
    """What tells a file from another: size, time of its last change, and samples of its bytes."""
    stat, digest = file.stat(), hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(1 << 16))
        for number in range(1, _SAMPLES + 1):
            stream.seek(max(0, (stat.st_size - _SAMPLE) * number // _SAMPLES))
            digest.update(stream.read(_SAMPLE))
    return [file.name, stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, tied ones once, and every buffer that files hold."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _stored(held: Any) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of one, by names; of slimtune's packing also what makes it again."""
    if isinstance(held, Nf4Tensor):
        about = {
            "shape": list(held.packed_shape),
            "turned": held.turned,
            "dtype": str(held.dtype).removeprefix("torch."),
        }
        return dict(held.parts), about
    state = getattr(held, "quant_state", None)
    # bitsandbytes' own way to write them, and to read them again.
    return {"": held.data, **({} if state is None else state.as_dict(packed=True))}, None


def _on_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _sum(model: nn.Module) -> str:
    """Of everything that it holds."""
    digest = hashlib.sha256(fingerprint(model).encode())
    parameters = {name for name, _ in model.named_parameters()}
    for name, buffer in _held(model):
        if name not in parameters:
            raw = _on_host(buffer).reshape(-1).view(torch.uint8).numpy().tobytes()
            digest.update(f"{name}|{buffer.dtype}|{tuple(buffer.shape)}|".encode() + raw)
    return digest.hexdigest()
