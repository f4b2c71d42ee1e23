"""SFTTrainer whose loss weighs every supervised token of an accumulation window alike, whatever the model's class.

Transformers counts a window's tokens only for classes whose ``forward`` takes ``num_items_in_batch`` (Gemma 4's takes
none), and TRL computes logits by a head of its own, which doesn't know every model's way to them. Here the tokens are
counted for every class, and :attr:`PlainTrainer.own_head` puts the model's own head in the place of TRL's
(:mod:`slimtune.training.proof` decides).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from slimtune.batch import IGNORED

__all__ = ["PlainTrainer", "one_dtype", "own_loss"]


class PlainTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with a token-weighted loss, in training and in evaluation."""

    own_head = False
    """The loss comes from the model's own logits."""
    model_accepts_loss_kwargs: bool
    aux_loss_enabled: bool
    router_aux_loss_coef: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What the Trainer asks for two things: whether to count the window's supervised tokens, and whether the loss is
        # divided by them already. TRL's loss and ours are, for every class.
        self.model_accepts_loss_kwargs = True
        self._evaluated: list[tuple[Tensor, int]] = []

    @property
    def evaluated(self) -> tuple[list[float], list[int]]:
        """(nats, supervised tokens) of each micro-batch of the last evaluation."""
        if not self._evaluated:
            return [], []
        sums = torch.stack([total.double() for total, _ in self._evaluated]).tolist()
        return sums, [supervised for _, supervised in self._evaluated]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The negative log-likelihoods of a micro-batch's supervised tokens over the window's number of them."""
        if not self.own_head or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with_router = self.aux_loss_enabled and model.training
        loss, supervised, aux = own_loss(model, inputs, with_router=with_router)
        if aux is not None:
            # Weighed as its micro-batch is: the window's weights add up to one, in however many pieces it runs.
            loss = loss + self.router_aux_loss_coef * aux * supervised
        return loss / torch.as_tensor(supervised if num_items_in_batch is None else num_items_in_batch).clamp(min=1)

    def evaluation_sum(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum of an evaluation batch's negative log-likelihoods, and the number of its supervised tokens."""
        inputs = self._prepare_inputs(inputs)
        supervised = int((inputs["labels"][:, 1:] != IGNORED).sum())
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=max(1, supervised))
        return loss * supervised, supervised

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """The mean loss of an evaluation batch; its sum is remembered for the mean over all of them."""
        total, supervised = self.evaluation_sum(model, inputs)
        self._evaluated.append((total.detach(), supervised))
        return total / max(1, supervised), None, None

    def everyones(self, evaluated: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
        """What an evaluation came to, if others have computed parts of it (:mod:`slimtune.training.ranked`)."""
        return evaluated

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, but the loss is the mean over supervised tokens, not over batches."""
        self._evaluated = []
        output: EvalLoopOutput = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        self._evaluated = self.everyones(self._evaluated)
        tokens = sum(supervised for _, supervised in self._evaluated)
        if output.metrics is not None and tokens:
            total = torch.stack([total.double() for total, _ in self._evaluated]).sum()
            output.metrics[f"{metric_key_prefix}_loss"] = float(total) / tokens
        return output


def own_loss(
    model: nn.Module, inputs: dict[str, Any], *, with_router: bool = False
) -> tuple[Tensor, int | Tensor, Tensor | None]:
    """By the model's own logits: the loss, the number of supervised tokens, and the routers' auxiliary loss.

    Args:
        model: A causal language model; its ``forward`` gets no labels, so that no class's own idea of a loss counts.
        inputs: ``input_ids``, ``labels`` [B, S], and what else the model takes.
        with_router: Ask for the auxiliary loss, unweighted; None otherwise, or where the model tells none.

    Returns:
        (sum of the supervised tokens' negative log-likelihoods in fp32, their number, auxiliary loss).
    """
    asked = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
    if with_router:
        asked["output_router_logits"] = True
    with one_dtype(model):
        outputs = model(**asked)
    targets = inputs["labels"][:, 1:].to(outputs.logits.device)
    mask = targets != IGNORED
    loss = functional.cross_entropy(outputs.logits[:, :-1][mask].float(), targets[mask], reduction="sum")
    aux = outputs.aux_loss if with_router else None
    # A class whose routers weren't recorded says 0, no tensor (Granite MoE in Transformers 5.17): that is none.
    return loss, mask.sum(), aux if isinstance(aux, Tensor) else None


def one_dtype(model: Any) -> Any:
    """Autocast to a 16-bit base's dtype, if it isn't on: what trains is in fp32, a copy of the head too."""
    weight = model.get_input_embeddings().weight
    device = weight.device.type
    if weight.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, weight.dtype)
