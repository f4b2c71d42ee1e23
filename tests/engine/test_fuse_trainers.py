"""fuse() under each of TRL's trainers: the loss and the LoRA gradients of the trainer as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from slimtune.engine import Fusion, fuse
from tests.engine import models

PROMPTS = ["Where is the key?", "When do we meet, and what shall I bring?", "Why?", "Who has the spare key now?"]
BETTER = [" Under the blue pot.", " At noon; bring bread.", " Because it rains.", " Nobody has."]
WORSE = [" No.", " I don't know where or when that would be.", " Why not?", " It is under the blue pot."]


class Gradients(TrainerCallback):
    """Keeps what the optimizer gets."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = models.gradients(kwargs["model"])


def policy(tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return models.add_lora(LlamaForCausalLM(config))


def lengths_and_more(completions: list[str], **_: Any) -> list[float]:
    return [len(text) % 7 + 0.1 * index for index, text in enumerate(completions)]


def grpo(**options: Any) -> tuple[type, type, dict[str, Any]]:
    return GRPOTrainer, GRPOConfig, {"num_generations": 4, "max_completion_length": 6, **options}


TRAINERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, {"padding_free": True, "max_length": None}),
    "dpo": (DPOTrainer, DPOConfig, {"use_weighting": True}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "grpo": grpo(temperature=0.6, beta=0.1),
    "grpo-entropy": grpo(temperature=1.0, entropy_coef=0.1),
    "grpo-fp32": grpo(temperature=1.4, cast_lm_head_to_fp32=True),
    "rloo": (RLOOTrainer, RLOOConfig, {"num_generations": 4, "max_completion_length": 6, "temperature": 0.6}),
    "orpo": (ORPOTrainer, ORPOConfig, {}),
}


def data(name: str) -> Dataset:
    match name.partition("-")[0]:
        case "sft":
            return Dataset.from_dict({"prompt": PROMPTS, "completion": BETTER})
        case "kto":
            return Dataset.from_dict({"prompt": PROMPTS, "completion": BETTER, "label": [True, False, True, False]})
    return Dataset.from_dict({"prompt": PROMPTS, "chosen": BETTER, "rejected": WORSE})


def one_step(
    name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, fusing: Callable[[nn.Module], Fusion] | None
) -> tuple[dict[str, float], dict[str, Tensor], Fusion | None]:
    """What the trainer logs of its first step, its gradients, and what fuse() did."""
    made, settings, options = TRAINERS[name]
    args = settings(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=1, logging_steps=1, report_to=[], seed=1,
        save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, max_grad_norm=0.0, **options,
    )  # fmt: skip
    more = {"reward_funcs": lengths_and_more} if made in (GRPOTrainer, RLOOTrainer) else {}
    gradients = Gradients()
    trainer = made(
        model=policy(tokenizer), args=args, train_dataset=data(name), processing_class=tokenizer,
        callbacks=[gradients], **more,
    )  # fmt: skip
    fusion = None if fusing is None else fusing(trainer.model)
    torch.manual_seed(2)
    trainer.train()
    return trainer.state.log_history[0], gradients.found, fusion


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_is_that_of_the_unfused_model(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    logged, expected, _ = one_step(name, tmp_path, tokenizer, None)
    found, actual, fusion = one_step(name, tmp_path, tokenizer, fuse)
    assert fusion is not None
    assert fusion.computed > 0
    assert models.worst_error(actual, expected) < 1e-4
    assert found.keys() == logged.keys()
    for key in logged.keys() & {"loss", "entropy", "kl", "mean_token_accuracy", "logps/chosen", "nll_loss"}:
        assert found[key] == pytest.approx(logged[key], rel=1e-4, abs=1e-5), key


def test_a_model_fused_before_its_trainer_is_made(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The trainer's head lies over the fused layers, and stays when they are undone."""
    args = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)
    model = policy(tokenizer)
    ids = torch.arange(40, 60)[None]

    def log_probs() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs

    fusion = fuse(model)
    SFTTrainer(model=model, args=args, train_dataset=data("sft"), processing_class=tokenizer)
    model.train()
    fused, computed = log_probs(), fusion.computed
    assert computed > 0
    fusion.undo()
    torch.testing.assert_close(log_probs(), fused, rtol=1e-4, atol=1e-4)
    assert fusion.computed == computed
    again = fuse(model)
    torch.testing.assert_close(log_probs(), fused, rtol=1e-4, atol=1e-4)
    assert again.computed > 0
