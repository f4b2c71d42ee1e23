"""How many tokens an adapter is for: it may be trained on a base whose vocabulary had been made larger or smaller."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from slimtune.base.vocabulary import fit_rows
from slimtune.errors import UserError

__all__ = ["base_rows", "fit_vocabulary", "is_copy"]

_COPY = re.compile(
    r"\.(modules_to_save|original_module|token_adapter)\.(weight|bias|base_layer\.\w+|trainable_tokens_\w+)$"
)
_SPARE = 4096
"""Rows that a vocabulary may have beyond its tokens."""
_PARTS = {"weight": 0, "base_layer.weight": 0, "lora_embedding_A": 1, "lora_B.weight": 0, "lora_magnitude_vector": 0}
"""For the tensors of an embedding or a head: the dimension that counts tokens. PEFT's names."""


def base_rows(base: Path) -> int | None:
    """The rows that a base's embedding has in its files, by its config; None if that doesn't say."""
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    rows = (config.get("text_config") or config).get("vocab_size")
    return None if rows is None else int(rows)


def is_copy(key: str, modules: Collection[str]) -> bool:
    """Whether PEFT saved a tensor of one of ``modules`` under this name beside its own: it does so where the vocabulary
    was resized."""
    found = _COPY.search(key)
    return found is not None and key[: found.start()].removeprefix("base_model.model.") in modules


def fit_vocabulary(model: Any, folder: Path, config: Mapping[str, Any], weights: Path) -> None:
    """Give a base that isn't wrapped yet as many rows as the adapter's own tensors have.

    Raises:
        UserError: The adapter's tensors have different numbers, or the model can't take theirs.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = int(embedding.weight.shape[0])
    names = {name: module for name, module in model.named_modules() if module is embedding or module is head}
    sizes: dict[int, str] = {}
    held: set[str] = set()
    with safe_open(weights, framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118 - safe_open is no mapping
            module, part = _split(key.removeprefix("base_model.model."), names)
            axis = _PARTS.get(part)
            if axis is not None and not (part == "lora_magnitude_vector" and names[module] is embedding):
                held.add(module.rsplit(".", 1)[-1])
                sizes.setdefault(int(handle.get_slice(key).get_shape()[axis]), f"{module}.{part}")
    if len(sizes) > 1:
        told = " and ".join(f"{name} of {size:,} rows" for size, name in sorted(sizes.items()))
        raise UserError(f"the adapter in {folder} holds {told}, and one model has one vocabulary")
    indices = config.get("trainable_token_indices") or {}
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    least = max((row + 1 for rows in lists for row in rows), default=0)
    rows = next(iter(sizes), max(before, least))
    if rows > before + sum(map(len, lists)) + _SPARE and not sizes:
        raise UserError(
            f"the adapter in {folder} trains row {least - 1:,} of a vocabulary, and its base has {before:,} rows",
            rule="New tokens follow the base's own, and each of them trains.",
        )
    if rows < least:
        raise UserError(f"the adapter in {folder} trains row {least - 1:,} of a vocabulary of {rows:,} rows")
    if rows == before:
        return
    tied = head is not None and head.weight is embedding.weight
    whole = {name.rsplit(".", 1)[-1] for name in config.get("modules_to_save") or ()}
    if tied and len(held) == 1 and held & whole and not config.get("ensure_weight_tying"):
        raise UserError(
            f"the adapter in {folder} holds {next(iter(sizes.values()))} of {rows:,} rows, and the base has {before:,}",
            rule="Its head was tied to the embedding before it was trained, and what its new rows were isn't saved.",
        )
    fit_rows(model, rows)


def _split(key: str, names: Mapping[str, Any]) -> tuple[str, str]:
    for name in names:
        if key.startswith(f"{name}."):
            return name, re.sub(r"^(modules_to_save|original_module|token_adapter)\.", "", key[len(name) + 1 :])
    return "", ""
