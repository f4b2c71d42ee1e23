"""The 4-bit policy: how a base is quantised, what it weighs, and the fingerprint that proves it stayed frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

__all__ = [
    "PartBytes", "bytes_by_part", "fingerprint", "keep_trainable_layout", "misread_weight", "quantization_config",
]  # fmt: skip

NF4_BLOCK = 64
"""Weights to one scale (QLoRA, arXiv:2305.14314, section 3)."""


def quantization_config(*, double_quant: bool, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 as QLoRA has it (arXiv:2305.14314): 4-bit NormalFloat, scales quantised again if ``double_quant``."""
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


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
            return name if _misreads_partial_blocks() else None
    return None


def _misreads_partial_blocks() -> bool:
    """Whether the same codes and scales mean other numbers in rows of one and a half blocks than in rows of one."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    ramp = torch.linspace(-1.0, 1.0, 3 * NF4_BLOCK).view(3, NF4_BLOCK)
    packed, state = quantize_4bit(ramp, blocksize=NF4_BLOCK, quant_type="nf4")
    whole = dequantize_4bit(packed, state).flatten()
    state.shape = torch.Size([2, 3 * NF4_BLOCK // 2])
    return not torch.equal(dequantize_4bit(packed, state).flatten(), whole)


@dataclass(frozen=True)
class PartBytes:
    """Bytes of one part of the base: as it was in 16 bits, and as it lies in memory now."""

    part: str
    parameters: int
    bytes_16bit: int
    bytes_now: int


def bytes_by_part(model: nn.Module) -> list[PartBytes]:
    """What the base weighs, measured from its tensors: attention, MLP, norms, embedding, head; largest first.

    A tied head is no tensor of its own and so counts once, with the embedding.
    """
    sums: dict[str, list[int]] = {}
    for name, tensors, parameters in _base_tensors(model):
        now = sum(tensor.nbytes for tensor in tensors)
        entry = sums.setdefault(_part_of(name), [0, 0, 0])
        entry[0] += parameters
        entry[1] += 2 * parameters
        entry[2] += now
    parts = [PartBytes(part, *numbers) for part, numbers in sums.items()]
    return sorted(parts, key=lambda part: -part.bytes_now)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the frozen base: every base tensor's name, dtype, shape and a checksum of its bytes.

    The checksum is a weighted sum of the tensor's 64-bit words modulo 2**64 with odd weights, so any single changed
    word changes it; it is computed where the tensor lies, which keeps a 7B model's fingerprint under a second on a GPU.
    Adapter tensors don't count: the fingerprint is the same before and after wrapping.
    """
    digest = hashlib.sha256()
    for name, tensors, _ in sorted(_base_tensors(model), key=lambda item: item[0]):
        for tensor in tensors:
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


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, list[Tensor], int]]:
    """(name, its tensors, number of parameters) of every base parameter; names without PEFT's wrapping."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        state = getattr(parameter, "quant_state", None)
        if state is None:
            yield plain, [parameter.data], parameter.numel()
        else:
            tensors = [parameter.data, state.absmax]
            if state.nested:
                tensors += [state.offset, state.state2.absmax]
            yield plain, tensors, int(torch.Size(state.shape).numel())


def _part_of(name: str) -> str:
    for part, marks in {
        "attention": ("self_attn", "attention"),
        "MLP": ("mlp", "feed_forward"),
        "embedding": ("embed_tokens", "wte"),
        "head": ("lm_head",),
        "norms": ("norm", "ln_"),
    }.items():
        if any(mark in name for mark in marks) and not (part == "attention" and "norm" in name.rsplit(".", 2)[-2]):
            return part
    return "other"
