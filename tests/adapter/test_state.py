"""The trained tensors of a wrapped model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimtune.adapter.files import attach_adapter
from slimtune.adapter.state import adapter_tensors, own_storage_, restore_adapter
from tests.families import tiny


def test_a_part_of_something_large_gets_its_own_memory() -> None:
    large = torch.arange(4096.0)
    part, transposed = nn.Parameter(large[8:16]), nn.Parameter(large[100:108].view(2, 4).T)
    flat = torch.zeros(64)
    views = [nn.Parameter(flat[:32]), nn.Parameter(flat[32:])]
    own_storage_([part, transposed, *views])
    assert part.untyped_storage().nbytes() == transposed.untyped_storage().nbytes() == 32
    assert torch.equal(part, large[8:16])
    assert torch.equal(transposed, large[100:108].view(2, 4).T)
    # What is used whole stays where it is.
    assert {view.untyped_storage().data_ptr() for view in views} == {flat.untyped_storage().data_ptr()}


@pytest.mark.parametrize("family", ["laguna", "inkling2_text"])
def test_what_peft_renames_on_reading_is_there_all_the_same(family: str, tmp_path: Path) -> None:
    """Their names look like those of an older Transformers: plain PEFT reads what it has saved without them."""
    if family not in CONFIG_MAPPING:
        pytest.skip("this Transformers hasn't got it")
    model = tiny.made(family).eval()
    others: list[Any] = [copy.deepcopy(model) for _ in range(3)]

    def wrapped(base: Any) -> Any:
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(base, config).eval()

    trained, again = wrapped(model), wrapped(others[0])
    restore_adapter(again, {name: tensor.detach().clone() for name, tensor in adapter_tensors(trained).items()})
    trained.save_pretrained(tmp_path, save_embedding_layers=False)
    attached = attach_adapter(others[1], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = PeftModel.from_pretrained(others[2], tmp_path).eval()

    def logits(of: Any) -> Tensor:
        with torch.no_grad():
            made: Tensor = of(input_ids=torch.arange(4, 20)[None], use_cache=False).logits
        return made

    expected = logits(trained)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(attached.eval()), expected)
    assert not torch.equal(logits(plain), expected), "PEFT reads it: nothing of this is needed any more"
