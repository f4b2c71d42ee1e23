"""slimtune's trainer: TRL's SFTTrainer, extended through its public hooks.

SFTTrainer gets the plain quantised model and the adapter's configuration, and wraps the one in the other by itself.
What slimtune adds: micro-batches in an order that is a pure function of (seed, epoch), adapters in fp32, a record of
what the wrapping did, and a save that holds the adapter alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from slimtune.adapter.lora import Coverage
from slimtune.base.tokenizer import save_tokenizer
from slimtune.config import Config
from slimtune.data.packing import MicroBatches
from slimtune.ranks.group import ALONE, Ranks
from slimtune.ranks.share import Share
from slimtune.run.facts import AdapterFacts
from slimtune.training.fused import FusedTrainer
from slimtune.training.layout import LayoutTrainer
from slimtune.training.resumable import ResumableTrainer
from slimtune.training.sampling import SamplesCallback

__all__ = ["SlimTrainer", "Wrapping", "adapter_facts"]


@dataclass(frozen=True)
class Wrapping:
    """What SFTTrainer's wrapping did, counted on the model before and after."""

    class_before: str
    """Class of the model that SFTTrainer was given."""
    class_after: str
    """Class of the model that SFTTrainer made of it."""
    wrapped_by: str
    """The class whose constructor did it."""
    modules: dict[str, int]
    """How many modules of each name (q_proj, …) carry an adapter."""
    trainable_parameters: int
    total_parameters: int
    """Base and adapter."""


class SlimTrainer(ResumableTrainer, FusedTrainer, LayoutTrainer):
    """SFTTrainer on slimtune's proven data.

    Args:
        model: The plain base, quantised or not; it must not be wrapped yet.
        args: From :func:`slimtune.training.arguments.sft_arguments`.
        data: Proven documents as micro-batches.
        micro_batches: Micro-batches of the whole run, over all its epochs.
        tokenizer: The base's.
        lora: PEFT's ``LoraConfig``; SFTTrainer wraps the model with it.
        evaluation: Held-out data as micro-batches, or none.
        callbacks: The Trainer's callbacks.
        ranks: This process among those that train together; ``args`` are this rank's.
    """

    _samples: SamplesCallback | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        data: MicroBatches,
        micro_batches: int,
        tokenizer: PreTrainedTokenizerBase,
        lora: Any,
        evaluation: MicroBatches | None = None,
        callbacks: list[TrainerCallback] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.data, self.evaluation, self.ranks = data, evaluation, ranks
        step = ranks.count * args.gradient_accumulation_steps
        self.share = Share(ranks.rank, ranks.count, step, micro_batches)
        self.data_collator: Any
        class_before = type(model).__name__
        base_parameters = _count(model)
        super().__init__(  # type: ignore[call-arg] # SFTTrainer's, which is untyped
            model=model,
            args=args,
            train_dataset=data.dataset(self.share.positions()),
            eval_dataset=None if evaluation is None else evaluation.dataset(self.share.of(evaluation.per_epoch)),
            data_collator=data.collate,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=callbacks,
        )
        head = self.model.get_output_embeddings()
        if hasattr(head, "token_adapter"):
            # TRL's loss asks the head for weight and bias, and PEFT's wrapper of trained rows hands only the weight on.
            # A head that has a bias was refused (base/vocabulary.py).
            head.bias = None
        # The Trainer prints its logs as dicts where it has no bar; slimtune's callbacks take them instead.
        self.remove_callback(PrinterCallback)
        # TRL casts the adapters of a quantised base to bf16, whose 8 bits of mantissa lose small updates, and which a
        # T4's fp16 can't train. They are about 0.2 % of the model: fp32 costs nothing that counts.
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        self.wrapping = Wrapping(
            class_before=class_before,
            class_after=type(self.model).__name__,
            wrapped_by=f"{SFTTrainer.__module__.split('.')[0]}.{SFTTrainer.__name__}",
            modules=_adapted_modules(self.model),
            trainable_parameters=trainable,
            total_parameters=base_parameters + trainable,
        )

    def sample_by(self, callback: SamplesCallback) -> None:
        """Have held-out prompts answered at evaluations."""
        self._samples = callback
        self.add_callback(callback)

    @property
    def samples_told(self) -> str:
        """What these answers came to, in a line; empty if there are none."""
        return "" if self._samples is None else self._samples.told

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained, and nothing else: adapter, tokenizer, chat template; never the base, no pickle."""
        folder = Path(output_dir or str(self.args.output_dir))
        self.model.save_pretrained(folder, save_embedding_layers=False)
        # PEFT's card is an empty form; slimtune writes a filled one when the adapter is published.
        (folder / "README.md").unlink(missing_ok=True)
        save_tokenizer(self.processing_class, folder)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # A position is the micro-batch's place in the whole run; the data's own order is in there already.
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the Trainer's, with the held-out data's own collator."""
        if self.evaluation is None:
            return super().get_eval_dataloader(eval_dataset)
        collator, self.data_collator = self.data_collator, self.evaluation.collate
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator


def adapter_facts(config: Config, wrapping: Wrapping, covered: Coverage) -> AdapterFacts:
    """What trains now, and what the base is that doesn't."""
    return AdapterFacts(
        r=config.lora_r,
        alpha=config.alpha,
        dropout=config.lora_dropout,
        targets=[config.targets] if isinstance(config.targets, str) else list(config.targets),
        **asdict(wrapping),
        **asdict(covered),
    )


def _count(model: torch.nn.Module) -> int:
    """Parameters of the base; a 4-bit weight counts the weights it stands for, not its bytes."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else int(torch.Size(state.shape).numel())
    return total


def _adapted_modules(model: torch.nn.Module) -> dict[str, int]:
    return dict(Counter(_own_name(name, module) for name, module in model.named_modules() if _is_adapted(module)))


def _is_adapted(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "lora_A", None) or getattr(module, "lora_embedding_A", None))


def _own_name(path: str, module: torch.nn.Module) -> str:
    """q_proj of a layer; experts.gate_up_proj of a parameter, around which PEFT's wrappers are nested."""
    name = path.replace(".base_layer", "").rsplit(".", 1)[-1]
    parameter = getattr(module, "parameter_name", "weight")
    return name if parameter == "weight" else f"{name}.{parameter}"
