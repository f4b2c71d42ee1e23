"""A base with a value that is no number is refused, whichever weight holds it and however it is packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from slimtune.base.finite import is_finite
from slimtune.base.load import load_base
from slimtune.errors import UserError
from slimtune.hardware import detect
from tests.training.tiny import saved


@pytest.mark.parametrize(
    ("part", "quantization", "value"),
    [
        *((part, "nf4", float("nan")) for part in ("q_proj", "embed_tokens", "input_layernorm", "router", "experts")),
        ("q_proj", "nf4", float("-inf")),
        ("experts", "none", float("inf")),
    ],
)
def test_a_value_that_is_no_number_is_named(
    part: str, quantization: str, value: float, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "mlp_only_layers": [0]}
    folder = saved(tmp_path / "model", "qwen3_moe", tokenizer, num_hidden_layers=2, **sizes)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if (part if part != "router" else "mlp.gate.") in name)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="holds a NaN or an infinity"):
        load_base(str(folder), detect(), compute_dtype="fp32", quantization=quantization)


def test_a_sum_that_overflows_is_no_infinity() -> None:
    assert is_finite(torch.full((4,), torch.finfo(torch.float32).max))
    assert not is_finite(torch.tensor([1.0, float("inf"), float("-inf")]))
    assert is_finite(torch.zeros(0))
