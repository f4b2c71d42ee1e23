"""A model that can't compute a text as it is loaded is refused when it is opened, by every verb."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtune.errors import UserError
from slimtune.use.load import open_model
from tests.families.tiny import save


def test_what_computes_in_32_bits_alone_is_refused_in_16(tmp_path: Path) -> None:
    """xLSTM keeps its states in float32, whatever is multiplied with them."""
    folder = save("xlstm", tmp_path / "model")
    with pytest.raises(UserError, match=r"xLSTMForCausalLM can't compute a document: RuntimeError") as refusal:
        open_model(str(folder), dtype="bf16", quantization="none")
    assert refusal.value.way_out == "In other numbers it may: --compute-dtype fp32."
    open_model(str(folder), dtype="fp32", quantization="none")
