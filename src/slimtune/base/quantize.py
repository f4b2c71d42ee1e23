"""What a base weighs in 4 bits, how it is kept trainable there, and the fingerprint that proves it stayed frozen."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimtune.base.packed import PackedTensor, misreads_partial_blocks
from slimtune.base.quantizer import policy_of

__all__ = [
    "PartBytes",
    "bytes_by_part",
    "fingerprint",
    "four_bit_formats",
    "four_bit_share",
    "keep_trainable_layout",
    "misread_weight",
    "misshapen_weight",
    "packed_format",
]


def keep_trainable_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking this model's 4-bit weights for its inference kernel on a CPU.

    On a CPU with AVX512-BF16, bitsandbytes' first ``Linear4bit`` forward without gradients rewrites the weight into a
    layout whose kernel has no backward; a training step after that trains to nonsense without an error
    (bitsandbytes 0.50, ``nn/modules.py``, ``Linear4bit.forward``). The switch is an attribute of each module, so no
    other model is touched.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not an attribute that nn.Module declares


def misread_weight(model: nn.Module) -> str | None:
    """The name of a 4-bit weight that bitsandbytes unpacks wrongly on this machine; None if it reads all of them right.

    Scales belong to blocks of weights, mostly :data:`NF4_BLOCK`, counted through the whole matrix. bitsandbytes' kernel
    for CPUs with AVX512 begins a new block at each row (0.50, ``cdequantize_blockwise_cpu_nf4``): a matrix whose rows
    aren't whole blocks gets scales of other weights, without an error. Models in use have whole blocks.
    """
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and parameter.device.type == "cpu" and state.shape[-1] % state.blocksize:
            return name if misreads_partial_blocks() else None
    return None


def misshapen_weight(model: nn.Module) -> str | None:
    """The first 4-bit weight whose shape in the files isn't its layer's, in words; None if all fit.

    Transformers compares shapes with the config's, but not of what a quantizer packs.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if isinstance(module, nn.Linear) and state is not None:
            stored, wanted = tuple(state.shape), (module.out_features, module.in_features)
            if stored != wanted:
                return f"{name}.weight of {_by(stored)}, where config.json says {_by(wanted)}"
    return None


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


@dataclass(frozen=True)
class PartBytes:
    """Bytes of one part of the base: as it was in 16 bits, and as it lies in memory now."""

    part: str
    parameters: int
    bytes_16bit: int
    bytes_now: int
    format: str
    """What most of its bytes are in: nf4, fp4, mxfp4, bf16, …"""


def bytes_by_part(model: nn.Module) -> list[PartBytes]:
    """What the base weighs, measured from its tensors: experts, attention, MLP, embedding, …; largest first.

    A tied head is no tensor of its own and so counts once, with the embedding.
    """
    sums: dict[str, list[int]] = {}
    formats: dict[str, Counter[str]] = {}
    for name, parameter in _base_parameters(model):
        tensors, weights = _tensors_of(parameter)
        now = sum(tensor.nbytes for tensor in tensors)
        entry = sums.setdefault(_part_of(name), [0, 0, 0])
        entry[0] += weights
        entry[1] += 2 * weights
        entry[2] += now
        formats.setdefault(_part_of(name), Counter())[_format_of(parameter)] += now
    parts = [
        PartBytes(part, weights, wide, now, formats[part].most_common(1)[0][0])
        for part, (weights, wide, now) in sums.items()
    ]
    return sorted(parts, key=lambda part: -part.bytes_now)


def four_bit_formats(model: nn.Module) -> list[str]:
    """The formats that the base's 4-bit weights lie in, in alphabetical order: nf4, fp4, mxfp4."""
    formats = {_format_of(parameter) for _, parameter in _base_parameters(model)}
    return sorted(formats & {"nf4", "fp4", "mxfp4"})


def packed_format(model: nn.Module) -> str | None:
    """The format of what slimtune packed itself, experts above all, matrix by matrix; None if there is no such."""
    packed = [parameter for _, parameter in _base_parameters(model) if isinstance(parameter, PackedTensor)]
    return packed[0].format if packed else None


def four_bit_share(model: nn.Module) -> float:
    """The share of a plain model's weights, besides embeddings and head, that the policy puts into 4 bits.

    Args:
        model: As Transformers makes it; the meta device will do.
    """
    return policy_of(model).share


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the frozen base: every base tensor's name, dtype, shape and a checksum of its bytes.

    The checksum is a weighted sum of the tensor's 64-bit words modulo 2**64 with odd weights, so any single changed
    word changes it; it is computed where the tensor lies, which keeps a 7B model's fingerprint under a second on a GPU.
    Adapter tensors don't count: the fingerprint is the same before and after wrapping.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(model), key=lambda item: item[0]):
        for tensor in _tensors_of(parameter)[0]:
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{_checksum(tensor)}\n".encode())
    return digest.hexdigest()


_WORDS_AT_ONCE = 1 << 24


def _checksum(tensor: Tensor) -> int:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words = raw[:whole].view(torch.int64)
    total = 0
    for start in range(0, words.numel(), _WORDS_AT_ONCE):
        chunk = words[start : start + _WORDS_AT_ONCE]
        weights = torch.arange(start, start + chunk.numel(), device=chunk.device, dtype=torch.int64) * 2 + 1
        total += int((chunk * weights).sum().item())
    tail = bytes(raw[whole:].cpu().tolist())
    return (total + int.from_bytes(tail, "little")) % 2**64


def is_adapters(name: str) -> bool:
    """Whether a parameter of a wrapped model, by its name, is the adapter's."""
    return any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_delta."))


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every base parameter, by its name without PEFT's wrapping."""
    for name, parameter in model.named_parameters():
        if is_adapters(name):
            continue
        plain = name.removeprefix("base_model.model.")
        while ".base_layer." in plain:  # PEFT wraps a module with two adapted parameters twice
            plain = plain.replace(".base_layer.", ".")
        yield plain.replace(".original_module.", "."), parameter


def _tensors_of(parameter: Tensor) -> tuple[list[Tensor], int]:
    """The tensors that hold a parameter, scales included, and how many weights it stands for."""
    if isinstance(parameter, PackedTensor):
        return list(parameter.parts.values()), parameter.numel()
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return [parameter.data], parameter.numel()
    tensors = [parameter.data, state.absmax]
    if state.nested:
        tensors += [state.offset, state.state2.absmax]
    return tensors, int(torch.Size(state.shape).numel())


def _format_of(parameter: Tensor) -> str:
    if isinstance(parameter, PackedTensor):
        return parameter.format
    state = getattr(parameter, "quant_state", None)
    return state.quant_type if state is not None else _SHORT.get(parameter.dtype, str(parameter.dtype)[6:])


_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


_PARTS = {
    "vision": ("vision", "visual", "image_", "audio", "multi_modal_projector"),
    "router": (".router", "mlp.gate.", "moe.gate."),
    "experts": (".experts.", "moe."),
    "attention": ("self_attn", "attention", ".attn.", "linear_attn", "mamba", "mixer"),
    "MLP": ("mlp", "feed_forward"),
    "embedding": ("embed_tokens", "wte", "word_embeddings"),
    "head": ("lm_head",),
    "norms": ("norm", "ln_"),
}
"""Parts of a base by marks in the names of their parameters; the first that fits."""


def _part_of(name: str) -> str:
    if "norm" in name.rsplit(".", 2)[-2]:
        return "norms"
    return next((part for part, marks in _PARTS.items() if any(mark in name for mark in marks)), "other")
