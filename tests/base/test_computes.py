"""A model that can't compute a text as it is loaded is refused when it is opened, by every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimtune.base.computes import check_computes
from slimtune.errors import UserError
from slimtune.use.load import open_model
from tests.families.tiny import made, save


def test_what_computes_in_32_bits_alone_is_refused_in_16(tmp_path: Path) -> None:
    """xLSTM keeps its states in float32, whatever is multiplied with them."""
    folder = save("xlstm", tmp_path / "model")
    with pytest.raises(UserError, match=r"xLSTMForCausalLM can't compute a document: RuntimeError") as refusal:
        open_model(str(folder), dtype="bf16", quantization="none")
    assert refusal.value.way_out == "In other numbers it may: --compute-dtype fp32."
    open_model(str(folder), dtype="fp32", quantization="none")


@pytest.mark.parametrize("family", ["xlnet", "cpmant"])
def test_what_sees_the_tokens_behind_is_no_causal_language_model(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path / "model")
    with pytest.raises(UserError, match="is no causal language model: a token's logits change with those behind"):
        open_model(str(folder), dtype="fp32", quantization="none")


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_text", "deepseek_v4", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_sees_those_before_alone_is_one(family: str, dtype: torch.dtype) -> None:
    model = made(family).eval().to(dtype)
    check_computes(model, torch.arange(4, 68)[None], dtype)
    causal = model.forward

    def ahead(input_ids: Tensor, **options: Any) -> Any:
        output = causal(input_ids=input_ids, **options)
        output.logits = output.logits + 0.5 * output.logits.mean(1, keepdim=True)
        return output

    model.forward = ahead
    with pytest.raises(UserError, match="no causal language model"):
        check_computes(model, torch.arange(4, 68)[None], dtype)
