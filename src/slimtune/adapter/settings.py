"""What ``adapter_config.json`` may say: an adapter's folder is a stranger's, and PEFT believes what stands in it.

PEFT allocates whatever rank is named, leaves keys that it doesn't know out with a warning, and multiplies by any alpha.
So each field that PEFT reads is checked here first, and each size against the headers of the weights beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from slimtune.base.trust import check_adapter_folder
from slimtune.errors import UserError
from slimtune.values import must_be

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "adapter_config", "check_values"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

Rank = Annotated[int, Field(ge=1, le=65_536)]
Scale = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Names = Annotated[list[str], Field(max_length=65_536)]
Never = Literal[False] | None
"""Of a field that makes something else than LoRA of it."""


class _Settings(BaseModel):
    """PEFT 0.21's ``LoraConfig``, as far as it is LoRA, rsLoRA or DoRA on a model that continues text.

    How an adapter was begun (``eva_config``, ``loftq_config``, …) is nobody's business who opens it, and fields of
    another version are PEFT's to warn of.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool | None = None
    r: Rank = 8
    lora_alpha: Scale = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | Names | None = None
    exclude_modules: str | Names | None = None
    target_parameters: Names | None = None
    modules_to_save: Names | None = None
    layers_to_transform: Index | list[Index] | None = None
    layers_pattern: str | Names | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Scale] | None = None
    trainable_token_indices: list[Index] | dict[str, list[Index]] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = True
    fan_in_fan_out: bool | None = False
    use_rslora: bool | None = False
    use_dora: bool | None = False
    lora_bias: bool | None = False
    ensure_weight_tying: bool | None = False
    runtime_config: dict[str, bool] | None = None
    layer_replication: Never = None
    alora_invocation_tokens: Never = None
    arrow_config: Never = None
    kasa_config: Never = None
    monteclora_config: Never = None
    use_bdlora: Never = None
    use_qalora: Never = None
    velora_config: Never = None
    megatron_config: Never = None


def adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's config of the adapter in ``folder``, its fields and sizes checked; no tensor is read.

    Raises:
        UserError: It can't be read, isn't a LoRA adapter, doesn't fit its own weights, or could do more than hold one.
    """
    check_adapter_folder(folder)
    file = folder / ADAPTER_CONFIG
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}") from None
    if config.get("peft_type") != "LORA":
        told = str(config.get("peft_type"))[:40]
        raise UserError(f"{folder} holds a {told} adapter", rule="slimtune uses LoRA adapters.")
    try:
        settings = _Settings.model_validate(config)
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = found[0]
        field = ".".join(str(part) for part in first["loc"][:1])
        value = json.dumps(config.get(field), ensure_ascii=False)
        raise UserError(
            f"{file}: {field} can't be {value if len(value) < 80 else value[:80] + '…'}",
            rule=f"{must_be([first])} slimtune opens LoRA, rsLoRA and DoRA adapters of models that continue text.",
        ) from None
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"{folder} has no {ADAPTER_WEIGHTS}",
            rule="slimtune reads adapters from safetensors, never from a pickle.",
            way_out="Save the adapter with safe_serialization=True.",
        )
    _check_ranks(file, settings)
    return config


def check_values(folder: Path) -> None:
    """See that every number of an adapter's weights is one.

    Raises:
        UserError: A tensor holds a NaN or an infinity.
    """
    file = folder / ADAPTER_WEIGHTS
    with _opened(file) as handle:
        for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
            if not bool(torch.isfinite(handle.get_tensor(name)).all()):
                raise UserError(
                    f"{file}: {name} holds a NaN or an infinity",
                    rule="A model with it answers nothing that was learnt.",
                    way_out="Take an earlier checkpoint of that adapter.",
                )


def _check_ranks(file: Path, settings: _Settings) -> None:
    """PEFT makes room for what the config says before it looks at the weights: so they are compared here."""
    weights = file.with_name(ADAPTER_WEIGHTS)
    most = 0
    with _opened(weights) as handle:
        for name in handle.keys():  # noqa: SIM118
            part = handle.get_slice(name)
            if part.get_dtype() not in _FLOATS:
                raise UserError(f"{weights}: {name} is of type {part.get_dtype()}", rule="An adapter's are floats.")
            if ".lora_A." in name or ".lora_embedding_A" in name:
                most = max([most, *part.get_shape()[:1]])  # of an expert stack: all its ranks together
    for rank in (settings.r, *(settings.rank_pattern or {}).values()):
        if rank > most > 0:
            raise UserError(
                f"{file} names rank {rank:,}, and no tensor beside it has more than {most:,}",
                rule="The config and the weights of an adapter belong together.",
                way_out="Copy the adapter folder whole.",
            )


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} can't be read: {error}", way_out="Check that the copy or download is whole.") from None
