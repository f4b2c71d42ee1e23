"""A run small enough to stop, break and resume dozens of times: a random two-layer Llama with LoRA, dropout on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

from slimtune.adapter.state import adapter_tensors
from slimtune.config import Config
from slimtune.run.identity import Identity
from slimtune.training.checkpoint import Checkpoints
from slimtune.training.resumable import ResumableTrainer, Safety
from slimtune.training.stop import StopSignals, Watchdog


class SmallRun(ResumableTrainer, Trainer):
    """What the tests look at, beside the trainer."""

    events: list[dict[str, Any]]
    warnings: list[str]

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(adapter_tensors(self.model).items()):
            digest.update(name.encode() + tensor.detach().numpy().tobytes())
        return digest.hexdigest()

    def steps(self) -> list[tuple[int, float, float]]:
        """(step, loss, gradient norm) of what this process logged."""
        return [(log["step"], log["loss"], log["grad_norm"]) for log in self.state.log_history if "loss" in log]


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, rows: int) -> None:
        self.ids = torch.randint(0, 64, (rows, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index], "attention_mask": torch.ones(16).long()}


def small_run(run: Path, *, evaluate: bool = False, optim: str = "adamw_torch", **config: Any) -> SmallRun:
    """A run of 12 steps: 22 rows, 2 to a micro-batch, 4 micro-batches to a step (3 at an epoch's end), 4 epochs.

    A second call with the same folder goes on with the first one's run.
    """
    run.mkdir(exist_ok=True)
    chosen = Config(**{"save_steps": 3, "eval_share": 0.1 if evaluate else 0.0, **config})
    set_seed(7)
    architecture = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=str(run / "checkpoints"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=4,
        learning_rate=1e-2,
        optim=optim,
        logging_steps=chosen.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=chosen.save_steps,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=2 if evaluate else None,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=7,
        data_seed=7,
    )
    trainer = SmallRun(
        model=get_peft_model(LlamaForCausalLM(architecture), lora),
        args=arguments,
        train_dataset=Tokens(22),
        eval_dataset=Tokens(5) if evaluate else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.events, trainer.warnings = [], []
    watchdog = Watchdog(chosen.watchdog, run / "stacks.txt", run=run)
    trainer.safety = Safety(
        chosen,
        Checkpoints(
            run / "checkpoints",
            chosen.keep_checkpoints,
            tell=trainer.warnings.append,
            beat=watchdog.beat,
            rest=watchdog.rest,
        ),
        Identity(chosen.model_dump(mode="json"), "base", {}, "tokenizer", "template", "3", {}),
        StopSignals(run),
        watchdog,
        record=trainer.events.append,
        warn=trainer.warnings.append,
        rows=lambda position: [f"data.jsonl:{position + 1}"],
        patience=1.0,
    )
    return trainer
