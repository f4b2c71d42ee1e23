"""What an adapter does to each parameter of its base, read by PEFT itself, and the sums that merge it.

LoRA (arXiv:2106.09685): W' = W + s B A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).
DoRA (arXiv:2402.09353, section 4): rows are scaled to the trained magnitudes m: W' = m / ||W + s B A|| (W + s B A).
An embedding's adapter, and that of a weight stored as [in, out], is added transposed. On a stack of experts each has an
A and a B of its own (PEFT's ``target_parameters``). Parameters that were trained whole replace the base's, and so do
single rows of tokens (PEFT's ``trainable_token_indices``). All sums are made in fp32 and rounded once, to the base's
own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from slimtune.adapter.files import attach_adapter
from slimtune.adapter.settings import ADAPTER_WEIGHTS
from slimtune.errors import UserError

__all__ = ["Change", "moves_base", "read_changes", "rows_made", "trains_rows", "why_not_mergeable"]

Change = Callable[[Tensor], Tensor]
"""Takes a parameter of the base, gives it changed, in the same dtype."""

_ROWS_BYTES = 64 * 2**20
_EXACT_INITS = (True, False, "gaussian", "orthogonal", "eva", None)
# Options of PEFT's LoraConfig whose adapters aren't W + s B A; each would need a formula of its own.
_OTHER_FORMULAS = (
    "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora",
    "use_bdlora", "kasa_config", "monteclora_config", "velora_config", "ensure_weight_tying",
)  # fmt: skip


def moves_base(init: bool | str | None) -> bool:
    """Whether an adapter that starts so (PEFT's ``init_lora_weights``) takes a part of the base's own weights."""
    return init not in _EXACT_INITS


def why_not_mergeable(config: Mapping[str, Any]) -> str:
    """Why an adapter with this PEFT config can't be merged exactly; empty if it can."""
    init = config.get("init_lora_weights", True)
    if moves_base(init):
        return (
            f"init_lora_weights: {init} changes the base's own weights when training starts, and the adapter fits those"
        )
    for key in _OTHER_FORMULAS:
        if config.get(key):
            return f"{key} is set, and such adapters aren't a low-rank sum"
    if config.get("lora_ga_config"):
        return "lora_ga_config changes the base's own weights when training starts"
    return ""


def read_changes(model: PreTrainedModel, folder: Path) -> dict[str, Change]:
    """The adapter in ``folder`` as one change for each parameter of ``model`` that it touches.

    Args:
        model: The base's modules on the meta device; PEFT wraps them, and what it fills is the adapter.
        folder: The adapter's folder.

    Raises:
        UserError: The adapter doesn't fit the model, or has a part that can't be merged exactly.
    """
    wrapped = attach_adapter(model, folder, on_meta=True)
    changes: dict[str, Change] = {}
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            changes |= _of_layer(_plain(name), module, folder)
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            changes |= _of_rows(_plain(name), module, changes, folder)
    for name, parameter in wrapped.named_parameters():
        if parameter.is_meta or ".lora_" in name or ".trainable_tokens_delta." in name:
            continue
        # Trained whole (modules_to_save, or biases), or saved beside what trained, as a resized embedding is.
        plain = _plain(name)
        before = changes.get(plain)
        changes[plain] = _Whole(parameter.data, before.then if isinstance(before, _Whole) else before)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as handle:
        for name in model.all_tied_weights_keys:  # on loading, what is tied becomes one parameter again
            key = f"base_model.model.{name}"
            if key in handle.keys() and name not in changes:  # noqa: SIM118 - safe_open is no mapping
                changes[name] = _Whole(handle.get_tensor(key), None)
    return changes


class _Rows:
    """Single rows of a matrix that were trained, of one that may have grown; what is new besides is the mean."""

    def __init__(self, rows: list[int], values: Tensor, size: int) -> None:
        self.rows, self.values, self.size = rows, values, size

    def __call__(self, weight: Tensor) -> Tensor:
        known = min(weight.shape[0], self.size)
        made = torch.empty(self.size, *weight.shape[1:], dtype=weight.dtype)
        made[:known] = weight[:known]
        if known < self.size:
            made[known:] = weight.mean(0, dtype=torch.float32).to(weight.dtype)
        made[self.rows] = self.values.to(weight.dtype)
        return made


class _Whole:
    """A parameter that was trained itself, or saved beside its adapter, as PEFT does with embeddings."""

    def __init__(self, saved: Tensor, then: Change | None) -> None:
        self.saved, self.then = saved, then

    def __call__(self, weight: Tensor) -> Tensor:
        saved = self.saved.to(weight.dtype)
        return saved if self.then is None else self.then(saved)


def trains_rows(change: Change) -> bool:
    """Whether single rows are what was trained."""
    return isinstance(change, _Rows) or (isinstance(change, _Whole) and isinstance(change.then, _Rows))


def rows_made(change: Change | None, rows: int) -> int:
    """How many rows a matrix has after a change, of ``rows`` before."""
    if isinstance(change, _Rows):
        return change.size
    return change.saved.shape[0] if isinstance(change, _Whole) else rows


class _Added:
    """A vector that is added to a bias."""

    def __init__(self, vector: Tensor, scaling: float) -> None:
        self.vector, self.scaling = vector, scaling

    def __call__(self, weight: Tensor) -> Tensor:
        return (weight.float() + self.scaling * self.vector.float()).to(weight.dtype)


class _LowRank:
    """s L R added to a matrix, or to each matrix of a stack: L [stack, rows, r], R [stack, r, columns]."""

    def __init__(self, left: Tensor, right: Tensor, scaling: float, magnitude: Tensor | None = None) -> None:
        self.left, self.right, self.scaling, self.magnitude = left, right, scaling, magnitude

    def transposed(self) -> _LowRank:
        """The same change to the transposed matrix."""
        return _LowRank(self.right.transpose(1, 2), self.left.transpose(1, 2), self.scaling)

    def __call__(self, weight: Tensor) -> Tensor:
        """Some rows at a time: fp32 copies stay small beside the tensor itself."""
        shape = (self.left.shape[0], self.left.shape[1], self.right.shape[2])
        stack = weight.reshape(shape)
        merged = torch.empty_like(stack)
        rows = max(1, _ROWS_BYTES // (4 * shape[2]))
        for at in range(shape[0]):
            right = self.right[at].float()
            for start in range(0, shape[1], rows):
                part = slice(start, start + rows)
                total = torch.addmm(stack[at, part].float(), self.left[at, part].float(), right, alpha=self.scaling)
                if self.magnitude is not None:
                    total *= (self.magnitude[part] / torch.linalg.vector_norm(total, dim=1)).unsqueeze(1)
                merged[at, part] = total.to(weight.dtype)
        return merged.view(weight.shape)


class _OfTransposed:
    """A change that is made to the transposed matrix."""

    def __init__(self, change: _LowRank) -> None:
        self.change = change

    def __call__(self, weight: Tensor) -> Tensor:
        return self.change(weight.T).T.contiguous()


def _of_layer(name: str, layer: LoraLayer, folder: Path) -> dict[str, Change]:
    """The changes of one layer that PEFT has wrapped."""
    scaling: float = layer.scaling["default"]
    if isinstance(layer, Embedding) and not layer.use_dora["default"]:
        a, b = layer.lora_embedding_A["default"].data, layer.lora_embedding_B["default"].data
        return {f"{name}.weight": _LowRank(b[None], a[None], scaling).transposed()}
    if isinstance(layer, ParamWrapper):
        return {f"{name}.{layer.parameter_name}": _of_experts(layer, scaling)}
    if type(layer) is not Linear:
        dora = "DoRA" if layer.use_dora["default"] else "an adapter"
        raise UserError(
            f"the adapter in {folder} has {dora} on {name} ({type(layer.get_base_layer()).__name__}): "
            "it can't be merged exactly",
            rule="slimtune merges adapters of linear layers, of embeddings and of stacks of experts.",
            way_out="Use it unmerged: chat, generate, eval and serve load it onto its base.",
        )
    low_rank = _LowRank(layer.lora_B["default"].weight.data[None], layer.lora_A["default"].weight.data[None], scaling)
    changes: dict[str, Change] = {}
    if (bias := layer.lora_B["default"].bias) is not None:
        if layer.use_dora["default"]:
            raise UserError(f"the adapter in {folder} has DoRA with a bias on {name}: it can't be merged exactly")
        if layer.get_base_layer().bias is None:
            raise UserError(f"the adapter in {folder} has a bias for {name}, and the base has none to add it to")
        changes[f"{name}.bias"] = _Added(bias.data, scaling)
    if layer.use_dora["default"]:
        low_rank.magnitude = layer.lora_magnitude_vector["default"].weight.data.float().flatten()
        changes[f"{name}.weight"] = _OfTransposed(low_rank) if layer.fan_in_fan_out else low_rank
    else:
        changes[f"{name}.weight"] = low_rank.transposed() if layer.fan_in_fan_out else low_rank
    return changes


def _of_rows(name: str, layer: TrainableTokensLayer, changes: Mapping[str, Change], folder: Path) -> dict[str, Change]:
    """The rows of one embedding or head."""
    plain = f"{name}.weight"
    if plain in changes:
        raise UserError(f"the adapter in {folder} trains rows of {plain}, and a low-rank sum beside them")
    rows, size = list(layer.token_indices["default"]), layer.get_base_layer().weight.shape[0]
    return {plain: _Rows(rows, layer.trainable_tokens_delta["default"].data, size)}


def _of_experts(layer: ParamWrapper, scaling: float) -> Change:
    """A stack's A is [experts · r, in], its B [out, r · experts] with the expert counting fastest (PEFT,
    ``ParamWrapper.get_delta_weight``); the parameter is [experts, out, in], or [experts, in, out] where its module says
    ``is_transposed``.
    """
    a, b, experts = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data, layer.num_experts
    right = a.reshape(experts, -1, a.shape[1])
    left = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    change = _LowRank(left, right, scaling)
    transposed = getattr(layer.get_base_layer(), "is_transposed", False) and layer.get_param().ndim == 3
    return change.transposed() if transposed else change


def _plain(name: str) -> str:
    """A name within PEFT's wrapping as the base has it."""
    plain = name.removeprefix("base_model.model.")
    for part in (".token_adapter", ".base_layer", ".original_module", ".modules_to_save.default"):
        plain = plain.replace(part, "")
    return plain
