"""What a run's config becomes for SFTTrainer, and what is refused before it is asked."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.hardware import Hardware, detect
from slimtune.training.arguments import check_alone, check_model, sft_arguments
from tests.training.tiny import tiny


def resolved(**settings: Any) -> Config:
    chosen: dict[str, Any] = {"model": "m", "data": "d", "compute_dtype": "fp32", "optim": "adamw_torch"}
    return Config.make(**{**chosen, "save_steps": 1, "eval_steps": 1, **settings})


@pytest.mark.parametrize(("recompute", "fused"), [(True, False), (False, False), (True, True)])
def test_activations_are_computed_again_on_a_gpu_by_classes_that_can(
    tmp_path: Path, recompute: bool, fused: bool
) -> None:
    cpu = detect()
    gpu = Hardware(**{**vars(cpu), "device": "cuda"})
    made = sft_arguments(resolved(), gpu, tmp_path, steps=3, fused=fused, recompute=recompute)
    assert made.gradient_checkpointing == (recompute and not fused)
    assert not sft_arguments(
        resolved(), Hardware(**{**vars(cpu), "device": "cpu"}), tmp_path, steps=3, fused=fused
    ).gradient_checkpointing


def test_no_auxiliary_loss_unless_asked_for(tmp_path: Path) -> None:
    assert sft_arguments(resolved(), detect(), tmp_path, steps=3, fused=False).router_aux_loss_coef == 0.0
    asked = resolved(router_aux_loss=0.1)
    assert sft_arguments(asked, detect(), tmp_path, steps=3, fused=False).router_aux_loss_coef == 0.1
    check_model(asked, tiny("qwen3_moe"))
    with pytest.raises(UserError, match="no auxiliary loss"):
        check_model(asked, tiny("llama"))


def test_the_head_takes_no_adapter() -> None:
    check_model(resolved(targets=("q_proj", "embed_tokens")), tiny("llama"))
    with pytest.raises(UserError, match="lm_head"):
        check_model(resolved(targets="lm_head"), tiny("llama", tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("environment", "is_refused"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"WORLD_SIZE": "many"}, True),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "-1", "WORLD_SIZE": ""}, False),
        ({}, False),
    ],
)
def test_one_of_several_processes_is_refused_at_once(
    environment: dict[str, str], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="one of several") if is_refused else nullcontext():
        check_alone()
