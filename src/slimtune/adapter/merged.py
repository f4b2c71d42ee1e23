"""Base plus adapter as one set of plain weights, made one tensor at a time.

LoRA (arXiv:2106.09685): W' = W + s B A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).
DoRA (arXiv:2402.09353, section 4): rows are scaled to the trained magnitudes m: W' = m / ||W + s B A|| (W + s B A).
An embedding's adapter is added transposed. Modules that were trained whole replace the base's.
All sums are made in fp32 and rounded once, to the base's own dtype.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from slimtune.adapter.files import ADAPTER_WEIGHTS, TensorSpec, WeightFiles, adapter_config
from slimtune.errors import UserError

__all__ = ["MergedWeights", "why_not_mergeable"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_BYTES = 64 * 2**20
_EXACT_INITS = (True, False, "gaussian", "orthogonal", "eva", None)
# Options of PEFT's LoraConfig whose adapters aren't W + s B A; each would need a formula of its own.
_OTHER_FORMULAS = (
    "fan_in_fan_out", "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
    "arrow_config", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\b")


@dataclass
class _Adapter:
    """What the adapter holds for one module."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None
    scaling: float = 1.0


def why_not_mergeable(config: Mapping[str, Any]) -> str:
    """Why an adapter with this PEFT config can't be merged exactly; empty if it can."""
    init = config.get("init_lora_weights", True)
    if init not in _EXACT_INITS:
        return (
            f"init_lora_weights: {init} changes the base's own weights when training starts, and the adapter fits those"
        )
    for key in _OTHER_FORMULAS:
        if config.get(key):
            return f"{key} is set, and such adapters aren't a low-rank sum"
    if config.get("lora_ga_config"):
        return "lora_ga_config changes the base's own weights when training starts"
    return ""


class MergedWeights:
    """A lazy mapping from tensor name to merged tensor.

    Args:
        base: The base's folder; its 16-bit (or 32-bit) weights.
        adapter: The adapter's folder, or None for the base alone.

    Raises:
        UserError: The base is quantised, the adapter is of a kind that can't be merged, or it doesn't fit the base.
    """

    def __init__(self, base: Path, adapter: Path | None) -> None:
        self.files = WeightFiles(base)
        self.config = read_model_config(base)
        self.specs: dict[str, TensorSpec] = dict(self.files.specs)
        self._replaced: dict[str, Tensor] = {}
        self._adapters: dict[str, _Adapter] = {}
        if adapter is not None:
            self._read_adapter(adapter)
        self._untie()

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the base's dtype; at most it and its base lie in memory."""
        source = EMBEDDING if name == HEAD and HEAD not in self.files else name
        spec = self.specs[name]
        tensor = self._replaced[name].to(spec.dtype) if name in self._replaced else self.files[source]
        module, _, kind = name.rpartition(".")
        adapter = self._adapters.get(module)
        if adapter is None:
            return tensor
        if kind == "bias":
            return tensor if adapter.bias is None else (tensor.float() + adapter.scaling * adapter.bias).to(spec.dtype)
        return _merged(tensor, adapter)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    @property
    def nbytes(self) -> int:
        """Bytes of all merged tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    def _read_adapter(self, folder: Path) -> None:
        config = adapter_config(folder)
        if reason := why_not_mergeable(config):
            raise UserError(
                f"the adapter in {folder} can't be merged: {reason}",
                rule="slimtune merges what can be merged exactly: LoRA, rsLoRA, DoRA, modules_to_save, biases.",
                way_out="Use it unmerged: chat, generate, eval and serve load it onto its base.",
            )
        for key, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
            name = key.removeprefix("base_model.model.")
            found = _KEY.match(name)
            if found is None:
                # Trained whole: modules_to_save, biases, or an embedding that PEFT saved beside its adapter.
                self._replace(name.replace(".base_layer.", "."), tensor, folder)
                continue
            adapter = self._adapters.setdefault(found["module"], _Adapter())
            if name.endswith("lora_B.bias"):
                adapter.bias = tensor.float()
            else:
                adapter.parts[found["part"].removeprefix("lora_").removeprefix("embedding_")] = tensor.float()
            if "embedding" in found["part"]:
                adapter.parts["transposed"] = torch.empty(0)
        for module, adapter in self._adapters.items():
            adapter.scaling = _scaling(config, module, adapter.parts["A"].shape[0])
            self._check(module, adapter, folder)

    def _replace(self, name: str, tensor: Tensor, folder: Path) -> None:
        known = self.specs.get(name) or (self.specs.get(EMBEDDING) if name == HEAD else None)
        if known is None or known.shape != tuple(tensor.shape):
            shape = "none of that name" if known is None else f"{known.shape}"
            raise UserError(
                f"the adapter in {folder} holds {name} {tuple(tensor.shape)}, and the base has {shape}",
                rule="Merging changes the base's own tensors; it adds none.",
            )
        self._replaced[name] = tensor
        self.specs.setdefault(name, known)

    def _check(self, module: str, adapter: _Adapter, folder: Path) -> None:
        name = f"{module}.weight"
        spec = self.specs.get(name) or (self.specs.get(EMBEDDING) if name == HEAD else None)
        a, b = adapter.parts["A"], adapter.parts["B"]
        made = (b.shape[0], a.shape[1])
        expected = made[::-1] if "transposed" in adapter.parts else made
        if spec is None or spec.shape != expected:
            there = "none of that name" if spec is None else f"{spec.shape}"
            raise UserError(
                f"the adapter in {folder} is for {name} of shape {expected}, and the base's files hold {there}",
                rule="The weights must lie in the base's files under the modules' own names.",
            )
        if "magnitude_vector" in adapter.parts and ("transposed" in adapter.parts or adapter.bias is not None):
            raise UserError(
                f"the adapter in {folder} has DoRA on an embedding or with a bias: it can't be merged exactly"
            )
        if adapter.bias is not None and f"{module}.bias" not in self.specs:
            raise UserError(f"the adapter in {folder} has a bias for {module}, and the base has none to add it to")
        self.specs.setdefault(name, spec)

    def _untie(self) -> None:
        """A head that was tied to the embedding is a tensor of its own once either of them has changed."""
        changed = {f"{module}.weight" for module in self._adapters} | set(self._replaced)
        if self.config.get("tie_word_embeddings") and changed & {EMBEDDING, HEAD}:
            self.specs.setdefault(HEAD, self.specs[EMBEDDING])
            self.config["tie_word_embeddings"] = False


def read_model_config(folder: Path) -> dict[str, Any]:
    """The base's ``config.json``.

    Raises:
        UserError: It can't be read, or says that the weights are quantised.
    """
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}") from None
    if config.get("quantization_config"):
        raise UserError(
            f"the base {folder} is quantised",
            rule="An adapter is merged into 16-bit weights: merging into 4-bit ones rounds the training away.",
            way_out="Give the base's 16-bit original: --base PATH.",
        )
    return config


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r as PEFT resolves it for one module (``tuners/lora/layer.py``, ``update_layer``)."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(config["lora_alpha"] if key is None else patterns[key])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _merged(weight: Tensor, adapter: _Adapter) -> Tensor:
    """The weight with its adapter, some rows at a time: fp32 copies stay small beside the tensor itself."""
    a, b = adapter.parts["A"], adapter.parts["B"]
    if "transposed" in adapter.parts:
        a, b = b.T, a.T
    magnitude = adapter.parts.get("magnitude_vector")
    merged = torch.empty_like(weight)
    rows = max(1, _ROWS_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        total = torch.addmm(weight[part].float(), b[part], a, alpha=adapter.scaling)
        if magnitude is not None:
            total *= (magnitude[part] / torch.linalg.vector_norm(total, dim=1)).unsqueeze(1)
        merged[part] = total.to(weight.dtype)
    return merged
