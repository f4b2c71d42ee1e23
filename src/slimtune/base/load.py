"""Load the base and its tokenizer, in 4 bits by default."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slimtune.base.embedded import embedded_model_folder, is_embedded
from slimtune.base.quantize import keep_trainable_layout, misread_weight, quantization_config
from slimtune.base.trust import check_attention, check_model_folder
from slimtune.errors import UserError
from slimtune.hardware import Hardware

__all__ = ["Base", "load_base", "load_tokenizer", "model_source", "torch_dtype"]

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


def model_source(model: str) -> str:
    """What Transformers is to load for the name that a person gave: a local folder's path, or a hub id.

    Raises:
        UserError: A local path that is no model folder: missing, a file, a run, an adapter, or without config.json.
    """
    if is_embedded(model):
        return str(embedded_model_folder())
    path = Path(model).expanduser()
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not path.exists():
        if looks_local:
            raise UserError(f"model folder {model} does not exist", way_out="Give a local folder or a hub id.")
        if "/" not in model:
            raise UserError(
                f"unknown model {model!r}",
                rule="A model is a hub id (owner/name), a local folder, or smollm2-135m.",
                way_out="Check the name.",
            )
        return model
    if path.is_file():
        raise UserError(
            f"model {model} is a file",
            rule="A base is a folder with config.json and safetensors weights.",
            way_out="Give the folder that holds it.",
        )
    if (path / "config.json").is_file():
        return str(path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"model {model} is an adapter, not a base",
            rule="An adapter holds only the trained part; the base is loaded first.",
            way_out=f"Give its base{_base_of_adapter(path)}, or go on from it by `slimtune train --from RUN`.",
        )
    if (path / "adapter" / "adapter_config.json").is_file():
        raise UserError(
            f"model {model} is a run of slimtune, not a base",
            rule="A run holds an adapter; the base is loaded first.",
            way_out=f"Give its base{_base_of_adapter(path / 'adapter')}, or start anew from the run: "
            "`slimtune train --from RUN`.",
        )
    raise UserError(
        f"model folder {model} has no config.json",
        rule="A base is a folder with config.json and safetensors weights.",
        way_out="Check the path.",
    )


def _base_of_adapter(folder: Path) -> str:
    try:
        name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError):
        return ""
    return f" ({name})" if name else ""


def load_tokenizer(
    model: str, *, revision: str | None = None, template: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model``, with its own chat template or the one in ``template``.

    Raises:
        UserError: It can't be loaded, has no chat template, or the template file can't be read.
    """
    source = model_source(model)
    _check_folder(source, trust_remote_code)
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(
        AutoTokenizer, source, revision=_revision(source, revision), trust_remote_code=trust_remote_code
    )
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat template {template} can't be read: {error}") from None
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {model} has no chat template",
            rule="slimtune trains chat models: a template says how turns become tokens.",
            way_out="Give one: --template FILE.jinja",
        )
    if tokenizer.pad_token is None:
        # Padding is never supervised and never attended to, so any token that exists serves; the turn's end stays
        # supervised because labels come from the data's own mask, not from token ids.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


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
    already = _from_pretrained(
        AutoConfig, source, revision=_revision(source, revision), trust_remote_code=trust_remote_code
    )
    if not trust_remote_code:
        check_attention(source, getattr(already, "_attn_implementation", None))
    prequantized = getattr(already, "quantization_config", None) is not None
    if quantization == "nf4" and not prequantized:
        options["quantization_config"] = quantization_config(double_quant=double_quant, compute_dtype=dtype)
    loaded: PreTrainedModel = _from_pretrained(
        AutoModelForCausalLM,
        source,
        revision=_revision(source, revision),
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


def _check_folder(source: str, trust_remote_code: bool) -> None:
    """A local folder is looked at before any library reads it; a hub id's files are Transformers' to check."""
    if Path(source).is_dir():
        check_model_folder(Path(source), trust_remote_code=trust_remote_code)


def _revision(source: str, revision: str | None) -> dict[str, str] | str | None:
    return None if Path(source).exists() else revision


def _from_pretrained(loader: Any, source: str, **options: Any) -> Any:
    """Call an Auto class; what a person can mend becomes a UserError."""
    if options.get("revision") is None:
        options.pop("revision", None)
    try:
        return loader.from_pretrained(source, **options)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{source} does not fit this GPU's memory",
            way_out="Take a smaller model, or free memory that other programs hold (nvidia-smi shows them).",
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _load_error(source, error) from error


def _load_error(source: str, error: BaseException) -> UserError:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if "trust_remote_code" in text or "custom code" in text:
        return UserError(
            f"{source} needs Python code of its own to load",
            rule="slimtune runs no code that comes with a model unless told to.",
            way_out="Read that code, then pass --trust-remote-code.",
        )
    if not Path(source).exists():
        return UserError(
            f"model {source} can't be loaded: {first}",
            rule="A hub id needs the network once, or the hub's cache from an earlier download.",
            way_out="Check the name and the network, or give a local folder.",
        )
    return UserError(
        f"model folder {source} can't be loaded: {first}",
        rule="It must hold a causal language model that Transformers knows: config.json, weights, tokenizer.",
        way_out="Check that the download is whole.",
    )
