"""Sizes that a model's config names beyond any real model's must be those of its files, before anything is made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from slimtune.errors import UserError

__all__ = ["check_sizes"]

_LAYERS = re.compile(r"(num_(hidden_|decoder_|encoder_)?|n_|encoder_|decoder_)layers?|depth")
_EXPERTS = re.compile(r".*experts.*")
_SIDES = re.compile(
    r"(hidden|vocab|intermediate|moe_intermediate|ffn)_(size|dim)|d_model|n_embd|n_inner|num_.*heads|head_dim"
)
_BEARABLE = {_LAYERS: 1_000, _EXPERTS: 10_000, _SIDES: 2**20}
"""What is made without a look at the files, as no more than a moment and some memory is lost by it."""


def check_sizes(folder: Path, config: Any) -> None:
    """See that ``folder``'s files hold as many layers and experts as its config names, and tensors as large.

    Transformers makes every module that the config names before it opens the first file.

    Raises:
        UserError: They don't.
    """
    large = [
        (name, value, pattern)
        for name, value in _numbers(config.to_dict())
        for pattern, most in _BEARABLE.items()
        if pattern.fullmatch(name) and value > most
    ]
    if not large:
        return
    files = sorted(folder.glob("*.safetensors"))
    count, side = _most(files) if files else (0, 0)
    for name, value, pattern in large:
        if value > (count if pattern is _LAYERS else max(count, side)):
            raise UserError(
                f"config.json of {folder} names {name} = {value:,}, and its files hold nothing so large",
                rule="A model is made of what its files hold.",
                way_out="Check that the download is whole.",
            )


def _numbers(value: Any, name: str = "") -> list[tuple[str, int]]:
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _numbers(item, str(key))]
    return [(name, value)] if type(value) is int else []


def _most(files: list[Path]) -> tuple[int, int]:
    """How far numbers in the tensors' names count, and the longest side of a tensor."""
    count = side = 0
    for file in files:
        try:
            with safe_open(file, framework="np") as handle:  # "pt" asks for memory of the file's size
                for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                    count = max([count, *(1 + int(number) for number in re.findall(r"(?:^|\.)(\d{1,9})(?=\.)", name))])
                    side = max([side, *handle.get_slice(name).get_shape()])
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} can't be read: {error}", way_out="Check that the download is whole.") from None
    return count, side
