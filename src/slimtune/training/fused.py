"""SFTTrainer whose steps run on slimtune's engine: no autograd, no host synchronisation inside a step.

Everything else stays SFTTrainer's: its loop, schedule, logging and callbacks. Without an engine it is
:class:`slimtune.training.plain.PlainTrainer`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from slimtune.base.load import torch_dtype
from slimtune.batch import IGNORED
from slimtune.config import Config
from slimtune.engine import Engine, FusedAdamW8bit
from slimtune.engine.read import EIGHT_BIT_ADAMW, fits
from slimtune.errors import UserError
from slimtune.plan import memory_budget
from slimtune.ranks.host import here
from slimtune.run.lines import embedding_line, in_ram_line, memory_line, streamed_line
from slimtune.run.screen import Screen
from slimtune.training.plain import PlainTrainer

__all__ = ["FusedTrainer", "make_engine", "tell_memory", "too_little", "why_unfused", "without_engine"]

_SURE = 1.05
"""Of a budget, what the least plan has to take for a run to be refused. A plan is at most 4.2 % off what is allocated
(decision 139): of one that takes less more than the budget nobody can be sure."""


class FusedTrainer(PlainTrainer):
    """Call :meth:`use_engine` between construction and training."""

    engine: Engine | None = None
    fp8_pack: dict[str, Any] | None = None
    """A small pack whose gradients are looked at after every evaluation, or without any at every checkpoint, where
    products are in FP8."""
    optimizer: Any

    def use_engine(self, engine: Engine) -> None:
        """Train on ``engine``, which was made from this trainer's model."""
        self.engine = engine
        # The Trainer's zero_grad walks over all of the model's modules at every step; the engine's is one launch.
        self.model.zero_grad = lambda set_to_none=True: engine.flat.grad.zero_()

    @property
    def engine_told(self) -> str:
        """fused, and how much of its products is in FP8 if any is."""
        share = 0.0 if self.engine is None else self.engine.fp8_share
        if self.engine is not None and self.engine.plan.turned_head:
            return f"fused, {share:.0%} of the layers' products and the head's gradient in FP8"
        return f"fused, {share:.0%} of the layers' products in FP8" if share else "fused"

    @property
    def attention(self) -> dict[str, bool]:
        """The engine's kernels for attention that were compared with plain products on this device, and whether each
        is right."""
        if self.engine is None:
            return {}
        return self.engine.attention_compared(self.data.batch(0))

    @property
    def in_ram(self) -> tuple[int, int]:
        """Layers of which what they keep waits in RAM for their backward, and the bytes of it that are locked."""
        return (0, 0) if self.engine is None else (len(self.engine.plan.in_ram), self.engine.plan.ram_bytes)

    @property
    def streamed(self) -> tuple[int, int]:
        """Layers whose weights are in RAM, and the bytes of it that are locked."""
        return (0, 0) if self.engine is None else (len(self.engine.plan.streamed), self.engine.plan.streamed_bytes)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """8-bit AdamW over the engine's flat parameters; any other optimizer as SFTTrainer makes it."""
        if self.engine is None or self.optimizer is not None or self.args.optim not in EIGHT_BIT_ADAMW:
            made: torch.optim.Optimizer = super().create_optimizer(model)
            return made
        self.optimizer = FusedAdamW8bit(
            self.engine.flat,
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
        )
        fused: torch.optim.Optimizer = self.optimizer
        return fused

    def get_train_dataloader(self) -> Any:
        """Micro-batches stay on the host: the engine copies them into its own buffers."""
        if self.engine is None:
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset, batch_size=1, sampler=self._get_train_sampler(), collate_fn=self.data_collator
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch, forward and backward; the loss stays on the device."""
        if self.engine is None:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        if not model.training:
            model.train()
        flat = self.engine.flat
        if flat.parameters[0].grad is None:
            # The Trainer's zero_grad takes the gradients away; the engine adds to views of one flat tensor.
            flat.grad.zero_()
            for parameter, view in zip(flat.parameters, flat.views(flat.grad), strict=True):
                parameter.grad = view
        return self.engine.forward_backward(inputs, _supervised(inputs, num_items_in_batch))

    def evaluation_sum(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum of an evaluation batch's negative log-likelihoods, and the number of its supervised tokens."""
        if self.engine is None:
            return super().evaluation_sum(model, inputs)
        return self.engine.evaluate(inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's; in FP8 with the share of what flows back that is too small for it by now."""
        output = super().evaluation_loop(*args, **kwargs)
        if output.metrics:
            output.metrics.update(self._lost_in_fp8())
        return output

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; where nothing is evaluated, with that share at every checkpoint."""
        saves = self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if saves and self.eval_dataset is None and (lost := self._lost_in_fp8()):
            self.log(lost)

    def _lost_in_fp8(self) -> dict[str, float]:
        """What flows back and is too small for FP8 by now, as a metric; none where nothing is in FP8."""
        if self.engine is None or not self.engine.fp8_share or self.fp8_pack is None:
            return {}
        with self.engine.counting_lost() as fp8:
            self.engine.upper_gradients(self.fp8_pack)
            return {"eval_fp8_lost": fp8.lost().share}

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, FusedAdamW8bit):
            return optimizer.clip_(self.args.max_grad_norm)
        norm: Tensor = super()._clip_grad_norm(model)
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Counted by slimtune itself: the Trainer's estimate walks over all parameters at every micro-batch."""
        return 0 if self.engine is not None else int(super().floating_point_ops(inputs))


def _supervised(inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor | int:
    if num_items_in_batch is not None:
        return num_items_in_batch
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


def why_unfused(config: Config, model: nn.Module, adapted: Collection[str] | None = None) -> str | None:
    """Why this run trains on the plain stack; None if the engine takes it.

    Args:
        config: The run's.
        model: The base, not wrapped yet; on the meta device to ask before anything heavy is loaded.
        adapted: Names of its modules that get an adapter, once that is known.

    Raises:
        UserError: The engine was asked for and doesn't take it.
    """
    if config.engine == "plain":
        return "asked for"
    reason = fits(config, model, adapted)
    if reason is not None and config.precision == "fp8":
        raise without_engine(reason)
    if reason is not None and config.engine == "fused":
        raise UserError(f"engine: fused can't be had: {reason}", way_out="Leave engine at auto: it trains unfused.")
    return reason


def without_engine(reason: str) -> UserError:
    """FP8 was asked for, and the engine doesn't take the run."""
    return UserError(f"precision: fp8 can't be had: {reason}", way_out="Leave precision at auto: it trains unfused.")


def make_engine(config: Config, model: nn.Module) -> Engine:
    """The engine of a wrapped model, for micro-batches of ``config``.

    Raises:
        UserError: The memory that training may take, or the GPU, hasn't the room that the largest of them takes.
    """
    engine = Engine(
        model,
        dtype=torch_dtype(config.compute_dtype),
        tokens=config.batch_tokens,
        longest=min(config.max_length, config.batch_tokens),
        memory=memory_budget(config),
        seed=config.seed,
        fp8=config.precision == "fp8",
    )
    if engine.device.type == "cuda" and (refusal := too_little(config, engine.least_memory)) is not None:
        raise refusal
    _take_room(engine)
    return engine


def too_little(config: Config, least: int | None, longest: int = 0) -> UserError | None:
    """Why a run isn't begun that surely takes more than its memory.

    Args:
        config: The run's, its memory decided.
        least: Bytes that the plan takes which takes the least; None: a plan fits.
        longest: Tokens of the longest document that fits, if that is known.
    """
    budget = memory_budget(config)
    if budget is None or least is None or least <= _SURE * budget:
        return None
    return UserError(
        f"memory: {config.memory} is too little: documents of {config.max_length:,} tokens take {least / 2**30:.2f}GiB "
        "at least",
        rule="The smallest plan of the run has to fit: with as much computed again, and as much in RAM, as can be.",
        way_out=f"Documents of up to {longest:,} tokens fit: --max-length {longest}. Or allow more: --memory"
        if longest
        else "Allow that much (--memory), or take a smaller --max-length.",
    )


def _take_room(engine: Engine) -> None:
    """Take what a micro-batch of full length with the longest document will take, for a moment: a run that has no room
    for it ends before its first step, and not in the one that the longest document comes in."""
    if engine.device.type != "cuda":
        return
    torch.cuda.empty_cache()
    missing = max(0, sum(engine.parts.values()) - torch.cuda.memory_allocated(engine.device))
    try:
        torch.empty(missing, dtype=torch.uint8, device=engine.device)
    except torch.OutOfMemoryError:
        free, _ = torch.cuda.mem_get_info(engine.device)
        raise UserError(
            f"a micro-batch of full length takes {missing / 2**30:.2f}GiB more of the GPU, and {free / 2**30:.2f} "
            "are free",
            rule="What the longest document takes is taken once before the first step.",
            way_out="End what else computes on this GPU, allow less (--memory), or take a smaller --max-length.",
        ) from None
    torch.cuda.empty_cache()


def tell_memory(trainer: FusedTrainer, config: Config, screen: Screen) -> None:
    """Say what the plan takes of the GPU and of RAM, and whether that is more than it may; without the engine, whether
    layers keep all of theirs."""
    engine: Engine | None = trainer.engine
    if engine is None:
        if not trainer.args.gradient_checkpointing:
            screen.say("memory", "every layer's activations are kept: this class can't compute them again")
        return
    screen.say("memory", memory_line(engine.parts, config.memory))
    if engine.in_ram:
        gib = engine.in_ram / 2**30
        screen.say("memory", f"per-layer embeddings live in RAM ({gib:.2f}GiB): a row a token is copied")
    plan = engine.plan
    if plan.in_ram:
        line = in_ram_line(len(plan.in_ram), plan.attended_in_ram, len(engine.layers), plan.ram_bytes)
        screen.say("memory", line)
    if engine.plan.embedding_bytes:
        screen.say("memory", embedding_line(engine.plan.embedding_bytes))
    if engine.plan.streamed:
        screen.say("memory", streamed_line(len(engine.plan.streamed), len(engine.layers), engine.plan.streamed_bytes))
    if here().sharing > 1 and engine.plan.streamed_bytes + engine.plan.embedding_bytes:
        screen.say("memory", f"the {here().count} ranks of this host have weights in RAM once for all of them")
    if engine.least_memory is not None:
        screen.warn(
            f"memory: {config.memory} is too little: documents of {config.max_length:,} tokens take about "
            f"{engine.least_memory / 2**30:.2f}GiB; a smaller --max-length takes less"
        )
