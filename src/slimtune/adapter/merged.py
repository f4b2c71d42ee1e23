"""Base plus adapter as plain weights, in the names and forms of the base's own files, made a few tensors at a time.

What an adapter changes is a module's parameter (``change.py``); what a file holds can be a part of one, or several
(``layout.py``). A tensor that no change reaches is the base's, as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from slimtune.adapter.change import Change, read_changes, rows_made, trains_rows, why_not_mergeable
from slimtune.adapter.files import TensorSpec, UnpackedFiles
from slimtune.adapter.layout import Layout, Unit
from slimtune.adapter.settings import adapter_config
from slimtune.base.classes import skeleton
from slimtune.errors import UserError

__all__ = ["MergedWeights", "read_model_config"]


class MergedWeights:
    """A lazy mapping from tensor name to merged tensor.

    Args:
        base: The base's folder; its 16-bit (or 32-bit) weights, or experts in MXFP4, which become bf16.
        adapter: The adapter's folder, or None for the base alone.
        trust_remote_code: Run code that comes with the base, to know its modules.

    Raises:
        UserError: The base is quantised, the adapter is of a kind that can't be merged, or it doesn't fit the base.
    """

    def __init__(self, base: Path, adapter: Path | None, *, trust_remote_code: bool = False) -> None:
        self.config = read_model_config(base)
        self.files = UnpackedFiles(base)
        self.specs: dict[str, TensorSpec] = dict(self.files.specs)
        """In the order in which they are best asked for: the tensors of one unit side by side."""
        self._changes: dict[str, Change] = {}
        self._units: dict[str, Unit] = {}  # of the changed tensors
        self._sources: dict[str, str] = {}  # a tensor that the files lack → the one it begins as
        self._made: dict[str, Tensor] = {}  # of the unit at hand, those not yet asked for
        if adapter is not None:
            self._read_adapter(base, adapter, trust_remote_code)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the base's dtype; at most its unit and what it is made from lie in memory."""
        unit = self._units.get(name)
        if unit is None:
            return self._read(name)
        if name not in self._made:
            self._made = self._merge(unit)
        return self._made.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    @property
    def nbytes(self) -> int:
        """Bytes of all merged tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    def _read(self, name: str) -> Tensor:
        return self.files[self._sources.get(name, name)]

    def _merge(self, unit: Unit) -> dict[str, Tensor]:
        parameters = self._layout.load(unit, (self._read(name) for name in unit.names))
        for parameter in list(parameters):
            if parameter in self._changes:
                parameters[parameter] = self._changes[parameter](parameters[parameter])
        made = self._layout.store(unit, parameters)
        return {name: tensor.to(self.specs[name].dtype) for name, tensor in made.items()}

    def _read_adapter(self, base: Path, adapter: Path, trust_remote_code: bool) -> None:
        if reason := why_not_mergeable(adapter_config(adapter)):
            raise UserError(
                f"the adapter in {adapter} can't be merged: {reason}",
                rule="slimtune merges what can be merged exactly: LoRA, rsLoRA, DoRA, modules_to_save, tokens, biases.",
                way_out="Use it unmerged: chat, generate, eval and serve load it onto its base.",
            )
        model: Any = skeleton(base, trust_remote_code=trust_remote_code)
        self._layout = Layout(model, self.files)
        tied: dict[str, str] = dict(model.all_tied_weights_keys)
        ends = [_weight_name(model, end) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
        self._changes = read_changes(deepcopy(model), adapter)  # PEFT's wrapping hides parameters from the layout
        self._untie(tied, ends)
        self._fit_vocabulary(adapter, ends)
        tried: list[Any] = []
        for parameter in self._changes:
            unit = self._layout.units.get(parameter)
            if unit is None:
                raise UserError(
                    f"the adapter in {adapter} changes {parameter}, and the base's files hold nothing for it",
                    rule="Merging changes the base's own tensors; it adds none.",
                )
            self._units |= dict.fromkeys(unit.names, unit)
            if unit.converter is not None and unit.converter not in tried:
                tried.append(unit.converter)
                self._layout.check_reversible(unit, [self.files[name] for name in unit.names])
        self._side_by_side()

    def _untie(self, tied: Mapping[str, str], ends: list[str]) -> None:
        """A head that was tied to the embedding is a tensor of its own once either of them has changed.

        Rows that train are the embedding's and the head's at once, and leave them tied.
        """
        for target, source in tied.items():
            if not {target, source} & set(self._changes):
                continue
            if target not in self._changes and trains_rows(self._changes[source]):
                if target in self._layout.units:  # the files hold it twice
                    self._changes[target] = self._changes[source]
                continue
            if {target, source} != set(ends):
                raise UserError(
                    f"the adapter changes {target} or {source}, which are one tensor in the base: it can't be merged"
                )
            if target not in self._layout.units:
                embedding = self._layout.units[source].names[0]
                name = self._layout.new_name(target)
                self._sources[name], self.specs[name] = embedding, self.specs[embedding]
                self._layout.units[target] = Unit([name], [target], first=target)
            for config in (self.config, self.config.get("text_config", {})):
                if config is self.config or "tie_word_embeddings" in config:
                    config["tie_word_embeddings"] = False

    def _fit_vocabulary(self, adapter: Path, ends: list[str]) -> None:
        """Embedding, head and config have the adapter's number of rows, where it has another one than the base.

        In the base itself the two may differ: Llama 3.2's with images embeds eight tokens that it never says.

        Raises:
            UserError: The adapter makes the two differ.
        """
        before: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for end in dict.fromkeys(ends):
            unit = self._layout.units.get(end)
            if unit is None:
                continue  # tied, and once in the files
            [name] = unit.names
            spec = self.specs[name]
            before[end] = spec.shape[0]
            sizes[end] = rows_made(self._changes.get(end), spec.shape[0])
            self.specs[name] = replace(spec, shape=(sizes[end], *spec.shape[1:]))
        if sizes == before:
            return
        if len(set(sizes.values())) > 1:
            told = " and ".join(f"{end} of {size:,} rows" for end, size in sizes.items())
            raise UserError(
                f"the adapter in {adapter} makes {told}",
                rule="A model has one vocabulary, and the adapter doesn't hold what the other was.",
            )
        for part in (self.config, self.config.get("text_config") or {}):
            if "vocab_size" in part:
                part["vocab_size"] = next(iter(sizes.values()))

    def _side_by_side(self) -> None:
        """Order the tensors so that those of one unit follow each other: then each unit is made once."""
        specs: dict[str, TensorSpec] = {}
        for name in self.specs:
            for other in self._units[name].names if name in self._units else [name]:
                specs.setdefault(other, self.specs[other])
        self.specs = specs


def read_model_config(folder: Path) -> dict[str, Any]:
    """The base's ``config.json``, as it is once experts in MXFP4 are unpacked.

    Raises:
        UserError: It can't be read, or says that the weights are quantised in another way.
    """
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}") from None
    stored = config.get("quantization_config") or {}
    if stored.get("quant_method") == "mxfp4":
        del config["quantization_config"]
    elif stored:
        raise UserError(
            f"the base {folder} is quantised",
            rule="An adapter is merged into 16-bit weights: merging into 4-bit ones rounds the training away.",
            way_out="Give the base's 16-bit original: --base PATH.",
        )
    return config


def _weight_name(model: Any, module: Any) -> str:
    return next((f"{name}.weight" for name, other in model.named_modules() if other is module), "")
