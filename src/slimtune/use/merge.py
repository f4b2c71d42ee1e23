"""Merge an adapter into its 16-bit base: a model folder in Transformers' layout that needs no PEFT any more."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers.utils import FEATURE_EXTRACTOR_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

from slimtune.adapter.files import TensorSpec, write_safetensors
from slimtune.adapter.merged import MergedWeights
from slimtune.base.tokenizer import save_tokenizer
from slimtune.data.stops import save_stops
from slimtune.errors import UserError
from slimtune.run.durable import check_new
from slimtune.use.load import Found, turn_ends
from slimtune.use.parity import Certificate

__all__ = ["SHARD_BYTES", "free_room", "merge", "new_folder"]

SHARD_BYTES = 5 * 10**9
"""Most bytes of one weight file."""


def merge(
    found: Found,
    output: Path,
    *,
    prove: Callable[[Found, Path], Certificate] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Certificate | None:
    """Write the merged model: weights in the base's own 16-bit dtype, names and form, config, tokenizer, chat template.

    Memory is bounded by the largest tensor, or by the largest layer's experts where the files store them one by one
    (twice, while they are merged), not by the model.

    Args:
        found: The run or adapter, as :func:`slimtune.use.load.find` gives it.
        output: The new folder; it appears whole or not at all.
        prove: Makes the certificate that the written folder says the same; it lies there as ``parity.json``.
        shard_bytes: Most bytes of one weight file.

    Raises:
        UserError: There is nothing to merge, it can't be merged exactly, or there is no room.
        GuardStop: What was written doesn't say the same; nothing is left of it.
    """
    if found.adapter is None:
        raise UserError(f"{found.name} is a bare model: there is nothing to merge", way_out="Give a run or an adapter.")
    weights = MergedWeights(found.base, found.adapter, trust_remote_code=found.trust_remote_code)
    tokenizer = found.tokenizer()
    with new_folder(output) as folder:
        free_room(folder, weights.nbytes)
        write_weights(weights, folder, shard_bytes)
        _copy_companions(found, folder)
        config = {**weights.config, "_name_or_path": output.name}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_stops(folder, found.base, turn_ends(tokenizer, found.manner))
        save_tokenizer(tokenizer, folder)
        if prove is None:
            return None
        certificate = prove(found, folder)
        certificate.write(folder / "parity.json")
        certificate.require()
    return certificate


def write_weights(weights: MergedWeights, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write all tensors as safetensors, in files of at most ``shard_bytes`` (a larger tensor has one of its own)."""
    shards = _shards(weights.specs, shard_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{at:05}-of-{len(shards):05}.safetensors"
        for at in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, {key: weights.specs[key] for key in shard}, _each(weights, shard))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": weights.nbytes},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, beside ``output``; at the end it becomes ``output``, after an error nothing is left of it.

    Raises:
        UserError: ``output`` exists and is not empty, or can't be made.
    """
    check_new(output)
    try:
        temporary = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
        temporary.mkdir(parents=True)  # as the umask says; tempfile's are the owner's alone
    except OSError as error:
        raise UserError(
            f"output folder {output} can't be made: {error.strerror}", way_out="Choose another folder (-o)."
        ) from None
    try:
        yield temporary
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def free_room(folder: Path, nbytes: int) -> None:
    """Make sure that ``nbytes`` more fit on the disk of ``folder``, before hours are spent.

    Raises:
        UserError: They don't.
    """
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise UserError(
            f"the disk of {folder.parent} has {free / 2**30:.1f} GiB free, and {nbytes / 2**30:.1f} GiB are needed",
            way_out="Make room, or choose another disk (-o).",
        )


def _each(weights: MergedWeights, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    return ((name, weights[name]) for name in names)


def _shards(specs: dict[str, TensorSpec], most: int) -> list[list[str]]:
    shards: list[list[str]] = []
    size = most + 1
    for name, spec in specs.items():
        if size + spec.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _copy_companions(found: Found, folder: Path) -> None:
    """What else makes a base whole goes along: how its images become input, and Python code of its own."""
    processors = {PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME}
    for file in (*found.base.glob("*.py"), *(found.base / name for name in sorted(processors))):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
