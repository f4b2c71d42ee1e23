"""slimtune's trainer: TRL's SFTTrainer, extended through its public hooks.

SFTTrainer gets the plain quantised model and the adapter's configuration, and wraps the one in the other by itself.
What slimtune adds: packs in an order that is a pure function of (seed, epoch), adapters in fp32, and a record of what
the wrapping did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from slimtune.data import TrainingData

__all__ = ["SlimTrainer", "Wrapping"]


@dataclass(frozen=True)
class Wrapping:
    """What SFTTrainer's wrapping did, counted on the model before and after."""

    class_before: str
    class_after: str
    modules: dict[str, int]
    """How many modules of each name (q_proj, …) carry an adapter."""
    trainable_parameters: int
    total_parameters: int
    """Base and adapter."""


class SlimTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on slimtune's proven data.

    Args:
        model: The plain base, quantised or not; it must not be wrapped yet.
        args: From :func:`slimtune.training.arguments.sft_arguments`.
        data: Proven documents as micro-batches.
        tokenizer: The base's.
        lora: PEFT's ``LoraConfig``; SFTTrainer wraps the model with it.
        evaluation: Held-out data as micro-batches, or none.
        callbacks: The Trainer's callbacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        data: TrainingData,
        tokenizer: PreTrainedTokenizerBase,
        lora: Any,
        evaluation: TrainingData | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.data = data
        class_before = type(model).__name__
        base_parameters = _count(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=data.dataset,
            eval_dataset=None if evaluation is None else evaluation.dataset,
            data_collator=data.collate,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=callbacks,
        )
        # TRL casts the adapters of a quantised base to bf16, whose 8 bits of mantissa lose small updates, and which a
        # T4's fp16 can't train. They are about 0.2 % of the model: fp32 costs nothing that counts.
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        self.wrapping = Wrapping(
            class_before=class_before,
            class_after=type(self.model).__name__,
            modules=_adapted_modules(self.model),
            trainable_parameters=trainable,
            total_parameters=base_parameters + trainable,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return _EpochOrder(self.data)


class _EpochOrder(Sampler[int]):
    """The data's own order: a pure function of (seed, epoch), so a resumed run finds its place."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.data.order(self.epoch))

    def __len__(self) -> int:
        return len(self.data)


def _count(model: torch.nn.Module) -> int:
    """Parameters of the base; a 4-bit weight counts the weights it stands for, not its bytes."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else int(torch.Size(state.shape).numel())
    return total


def _adapted_modules(model: torch.nn.Module) -> dict[str, int]:
    return dict(
        Counter(name.rsplit(".", 1)[-1] for name, module in model.named_modules() if getattr(module, "lora_A", None))
    )
