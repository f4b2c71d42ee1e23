"""Load the base and its tokenizer, in 4 bits by default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimtune.base.classes import language_class
from slimtune.base.quantize import keep_trainable_layout, misread_weight, quantization_config
from slimtune.base.source import from_pretrained, local_revision, model_source
from slimtune.base.tokenizer import load_tokenizer
from slimtune.base.trust import check_attention
from slimtune.errors import UserError
from slimtune.hardware import Hardware

__all__ = ["Base", "load_base", "torch_dtype"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Base:
    """A loaded base: the model (quantised or not), its tokenizer, and where both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """The local folder or hub id that was loaded."""
    quantized: bool


def torch_dtype(name: str) -> torch.dtype:
    """bf16, fp16 or fp32 as torch has it."""
    return _DTYPES[name]


def load_base(
    model: str,
    hardware: Hardware,
    *,
    compute_dtype: str,
    quantization: str = "nf4",
    double_quant: bool = True,
    revision: str | None = None,
    template: Path | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Load the base, quantised while it is read, so that its 16-bit weights never lie in memory whole.

    Raises:
        UserError: The model is unknown, can't be reached, isn't a causal language model, or can't be read right in 4
            bits by this machine.
    """
    source = model_source(model)
    dtype = torch_dtype(compute_dtype)
    tokenizer = load_tokenizer(model, revision=revision, template=template, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype, "device_map": "auto" if hardware.device == "cuda" else {"": "cpu"}}
    already = from_pretrained(
        AutoConfig, source, revision=local_revision(source, revision), trust_remote_code=trust_remote_code
    )
    if not trust_remote_code:
        check_attention(source, getattr(already, "_attn_implementation", None))
    prequantized = getattr(already, "quantization_config", None) is not None
    if quantization == "nf4" and not prequantized:
        options["quantization_config"] = quantization_config(double_quant=double_quant, compute_dtype=dtype)
    loaded: PreTrainedModel = from_pretrained(
        language_class(already, source),
        source,
        revision=local_revision(source, revision),
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        **options,
    )
    keep_trainable_layout(loaded)
    misread = misread_weight(loaded)
    if misread is not None:
        raise UserError(
            f"bitsandbytes misreads {misread} of {model} in 4 bits on this CPU",
            rule="Its rows aren't whole blocks of weights, and the kernel for this CPU takes them for such.",
            way_out="Leave the base as it is (--quantization none), or take a GPU.",
        )
    loaded.config.use_cache = False
    return Base(loaded, tokenizer, source, quantized=quantization == "nf4" or prequantized)
