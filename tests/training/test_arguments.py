"""What a run's config becomes for SFTTrainer, and what is refused before it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.hardware import Hardware, detect
from slimtune.training.arguments import check_model, sft_arguments
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


def test_a_logger_is_told_the_runs_name_and_uploads_nothing_unasked(tmp_path: Path) -> None:
    config = resolved(output=tmp_path / "my-run", report_to="trackio")
    made = sft_arguments(config, detect(), tmp_path, steps=3, fused=False)
    assert (made.report_to, made.run_name, made.trackio_space_id) == (["trackio"], "my-run", None)


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


def test_each_rank_takes_its_share_of_a_step(tmp_path: Path) -> None:
    config = resolved(gradient_accumulation=6)
    for ranks, own in ((1, 6), (2, 3), (3, 2)):
        made = sft_arguments(config, detect(), tmp_path, steps=3, fused=False, ranks=ranks)
        assert made.gradient_accumulation_steps == own
