"""Load the base and its tokenizer, in 4 bits by default."""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimtune.base.classes import check_whole, language_class
from slimtune.base.finite import check_finite
from slimtune.base.kept import Kept
from slimtune.base.named import model_source
from slimtune.base.quantize import four_bit_formats, keep_trainable_layout, misread_weight, misshapen_weight
from slimtune.base.quantizer import four_bit_config, policy_of
from slimtune.base.rotation import forget_lengths
from slimtune.base.sizes import check_sizes
from slimtune.base.source import from_pretrained, local_revision, upstream_errors
from slimtune.base.stored import stored_format
from slimtune.base.tokenizer import load_tokenizer
from slimtune.base.trust import check_attention
from slimtune.base.vocabulary import NewTokens
from slimtune.errors import UserError
from slimtune.hardware import Hardware
from slimtune.ranks.host import here

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
    """Weights lie in 4 bits."""
    format: str
    """What they lie in: nf4, fp4, mxfp4, mxfp4+nf4; none if they are plain."""
    new_tokens: NewTokens | None = None
    """The tokens that a run adds; tokenizer and model have them."""
    kept: str = ""
    """What is to be said of its bytes in slimtune's cache."""


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
    in_ram: Collection[str] = (),
) -> Base:
    """Load the base, quantised while it is read, so that its 16-bit weights never lie in memory whole.

    Parameters of the names ``in_ram`` go to locked RAM, each as it is read and quantised, where there is anything to
    quantise: the GPU never holds more than one of them.

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
    if Path(source).is_dir():
        check_sizes(Path(source), already)
    auto = language_class(already, source)
    if getattr(already.get_text_config(), "attn_logit_softcapping", None):
        # Transformers before 5.23 takes torch's attention for Gemma 2 by default, which leaves the soft cap out.
        options["attn_implementation"] = "eager"
    stored = stored_format(model, already)
    if stored == "mxfp4":
        _forget_stored_format(already)
        options["config"] = already
    elif stored == "bitsandbytes":
        _check_stored_experts(model, already, auto)
    kept: Kept | None = None
    four_bit: dict[str, Any] = {"double_quant": double_quant, "compute_dtype": dtype, "in_ram": in_ram}
    if stored == "mxfp4" or (quantization == "nf4" and stored == "plain"):
        options["quantization_config"] = four_bit_config(
            mxfp4=stored == "mxfp4", linears=quantization == "nf4", **four_bit
        )
        if in_ram and hardware.device == "cuda":
            options["device_map"] = {"": 0}  # of what is on no device it would take layers for too large for this one
        if stored == "plain" and not trust_remote_code:
            asked = {"double_quant": double_quant, "dtype": compute_dtype, "device": hardware.device}
            kept = Kept.of(source, local_revision(source, revision), asked)
    # All ranks read the same: their layers go to RAM that they have in common, one after the other.
    was_there = bool(here().least("what is kept of the base", kept is not None and kept.said is not None))
    loaded = _of_kept(kept, source, revision, already, four_bit, options) if kept is not None and was_there else None
    was_kept = bool(here().least("what was read of it", loaded is not None))
    loaded = loaded if was_kept else None
    if loaded is None:
        loaded, loading = from_pretrained(
            auto,
            source,
            revision=local_revision(source, revision),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        check_whole(model, loaded, loading["missing_keys"])
    if hardware.device == "cuda":
        torch.cuda.empty_cache()  # what the weights passed through in 16 bits
    _check_read(model, loaded)
    forget_lengths(loaded)
    loaded.config.use_cache = False
    formats = four_bit_formats(loaded)
    base = Base(loaded, tokenizer, source, quantized=bool(formats), format="+".join(formats) or "none")
    if was_kept:
        base.kept = "its 4-bit bytes were kept from an earlier start"
    elif kept is not None and here().first and (kept.said is None or not kept.folder.is_dir()):
        damaged = ["what was kept of it wasn't what was written, and is thrown away"] if was_there else []
        base.kept = "; ".join([*damaged, _keep(kept, loaded)])
    return base


def _check_read(model: str, loaded: PreTrainedModel) -> None:
    """See that the weights are what the files and this machine's kernels should make of them.

    Raises:
        UserError: One has another shape, isn't finite, or is misread.
    """
    misshapen = misshapen_weight(loaded)
    if misshapen is not None:
        raise UserError(f"the files of {model} hold {misshapen}", way_out="Check that the download is whole.")
    check_finite(model, loaded)
    keep_trainable_layout(loaded)
    misread = misread_weight(loaded)
    if misread is not None:
        raise UserError(
            f"bitsandbytes misreads {misread} of {model} in 4 bits on this CPU",
            rule="Its rows aren't whole blocks of weights, and the kernel for this CPU takes them for such.",
            way_out="Leave the base as it is (--quantization none), or take a GPU.",
        )


def _of_kept(
    kept: Kept, source: str, revision: str | None, config: Any, four_bit: dict[str, Any], options: dict[str, Any]
) -> PreTrainedModel | None:
    """The model of what was kept of it; None if that is nothing, or not what was written: it is thrown away then."""
    if kept.said is None:
        return None
    options = options | {"quantization_config": four_bit_config(kept=True, **four_bit), "config": config}
    try:
        with ExitStack() as stack, upstream_errors(source):
            # Transformers reads a model of tensors that it is given by its class alone.
            loader = getattr(transformers, kept.said["class"])
            loaded: PreTrainedModel
            loaded, loading = loader.from_pretrained(
                None, state_dict=kept.state(stack), output_loading_info=True, **options
            )
        loaded.name_or_path = loaded.config.name_or_path = source
        if not loading["missing_keys"] and kept.agrees(loaded):
            if loaded.can_generate():
                loaded.generation_config = _generation_config(source, local_revision(source, revision))
            kept.used()
            return loaded
    except (UserError, OSError, SafetensorError, ValueError):
        pass  # not whole
    kept.throw_away()
    return None


def _generation_config(source: str, revision: str | None) -> GenerationConfig:
    """How a model answers by default: its file's, or what its config says, as Transformers has it."""
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return GenerationConfig.from_pretrained(source, **options)
    except OSError:  # it has no such file
        return GenerationConfig.from_pretrained(
            source, config_file_name="config.json", _from_model_config=True, **options
        )


def _keep(kept: Kept, model: PreTrainedModel) -> str:
    """Keep a base's bytes for the next start; what is to be said of it."""
    try:
        size = kept.write(model)
    except (OSError, SafetensorError) as error:  # a disk that is full while safetensors writes is its own error
        return f"its 4-bit bytes aren't kept for the next start: {getattr(error, 'strerror', None) or error}"
    if not size:
        return "its 4-bit bytes aren't kept for the next start: they would take too much of the disk"
    return f"its 4-bit bytes are kept for the next start: {size / 2**30:.1f}GiB in {kept.folder}"


def _check_stored_experts(model: str, config: Any, auto: Any) -> None:
    """bitsandbytes' files hold linear layers in 4 bits, and experts in 16.

    Raises:
        UserError: The model has experts.
    """
    with torch.device("meta"):
        skeleton = auto.from_config(copy.deepcopy(config))
    if policy_of(skeleton).packed:
        raise UserError(
            f"{model} is stored in bitsandbytes' 4 bits, which leave its experts in 16",
            rule="slimtune packs the experts of a mixture too, from the 16-bit original.",
            way_out="Give the 16-bit original that it was made from.",
        )


def _forget_stored_format(config: Any) -> None:
    """Transformers would unpack MXFP4 to 16 bits, or ask for a kernel that can't train; slimtune reads it itself."""
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
