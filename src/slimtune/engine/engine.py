"""The training step as slimtune's trainer runs it: no autograd, no host synchronisation, CUDA graphs on CUDA.

One micro-batch is: one copy to the device, one graph (embedding and layers forward), the head and loss in chunks
(their number is known on the host), one graph (layers backward, gradients added to the flat gradient).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.engine.attention import Documents, choose
from slimtune.engine.decoder import Keep, LayerComputation, LayerGradients, Pass, RotaryTable, Saved, computations
from slimtune.engine.loss import head_loss, head_loss_and_grad
from slimtune.engine.memory import MemoryPlan, plan_memory
from slimtune.engine.microbatch import MicroBatch
from slimtune.engine.optimizer import FlatParameters
from slimtune.engine.structure import CannotFuse, Decoder, read_decoder
from slimtune.engine.weights import Gradients, Site, unpack_for_training

__all__ = ["Engine"]

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that the seeds of 2**64 micro-batches differ


class Engine:
    """Forward and backward passes of one PEFT-wrapped model instance, at full speed.

    The model stays what it is: its modules, names and files. Its LoRA parameters become views of one flat float32
    tensor (:attr:`flat`), and their ``grad`` views of another, which :meth:`forward_backward` adds to.

    Args:
        model: PEFT-wrapped causal language model of the Llama family; NF4, 16- or 32-bit base.
        dtype: What is computed in: bfloat16, float16 or float32 (float64 to check against).
        tokens: Tokens in the largest micro-batch (T); the memory plan is made for it.
        memory: Most bytes that may be allocated on the device, the model included; None: no limit.
        seed: Seed of the dropout masks.
        graphs: Record CUDA graphs; only on CUDA.

    Raises:
        CannotFuse: The model, or one of its layers, is none that the engine computes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        tokens: int,
        memory: int | None = None,
        seed: int = 0,
        graphs: bool = True,
    ) -> None:
        self.decoder: Decoder = read_decoder(model)
        if self.decoder.unfused:
            name, reason = next(iter(self.decoder.unfused.items()))
            raise CannotFuse(f"{name} can't be fused: {reason}", way_out="It trains unfused: engine: plain.")
        self.dtype, self.seed, self.draws = dtype, seed, 0
        self.device: torch.device = self.decoder.head.device
        for linear in self.decoder.linears():
            unpack_for_training(linear)
        self.layers: list[LayerComputation] = [x for x in computations(self.decoder, dtype, self.device) if x]
        self.flat = FlatParameters(self._check_trainable(model))
        self._gradients = [self._bind(layer) for layer in self.layers]
        self._lowest = next(index for index, layer in enumerate(self.layers) if layer.adapted)
        self._head = self.decoder.head.detach()
        if self._head.dtype != dtype:
            self._head = self._head.to(dtype)
        self._rotary = RotaryTable.of(self.decoder, self._positions(tokens), self.device, dtype)
        self.plan: MemoryPlan = plan_memory(self.layers, tokens, self._head.shape[0], self._budget(memory))
        for layer in self.layers[: self.plan.kept_weights]:
            for site in layer.sites:
                site.keep()

    def _check_trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """The adapters' parameters in the engine's order; nothing else may train."""
        mine = [p for layer in self.layers for site in layer.sites for p in _parameters(site)]
        known = {id(parameter) for parameter in mine}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise CannotFuse(
                    f"{name} trains, and it is no LoRA matrix of a decoder layer",
                    way_out="It trains unfused: engine: plain.",
                )
        return mine

    def _bind(self, layer: LayerComputation) -> LayerGradients:
        """Let each site read its A from the flat tensor, and add its gradients to the flat gradient."""
        return LayerGradients(*(self._bind_site(site) for site in layer.sites))

    def _bind_site(self, site: Site) -> Gradients | None:
        if not site.groups:
            return None
        adapters = site.projection.adapters
        first = adapters[0].a
        start = first.storage_offset()
        sizes = [adapter.a.numel() for adapter in adapters]
        lined_up = all(
            adapter.rank == site.rank and adapter.a.storage_offset() == start + index * sizes[0]
            for index, adapter in enumerate(adapters)
        )
        if not lined_up:
            raise CannotFuse("adapters of different ranks share an input", way_out="It trains unfused: engine: plain.")
        shape, end = (site.groups * site.rank, site.inputs), start + sum(sizes)
        site.a = self.flat.data[start:end].view(shape)
        grads = [adapter.b.grad for adapter in adapters]
        return Gradients(self.flat.grad[start:end].view(shape), [grad for grad in grads if grad is not None])

    def _positions(self, tokens: int) -> int:
        limit = getattr(self.decoder.model.config, "max_position_embeddings", tokens)
        return max(tokens, min(int(limit), tokens)) if isinstance(limit, int) else tokens

    def _budget(self, memory: int | None) -> float:
        if memory is None:
            return math.inf
        used = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        return memory - used

    # -- a micro-batch ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward_backward(self, batch: Mapping[str, Tensor], num_supervised: int | Tensor) -> Tensor:
        """The loss of a micro-batch; its gradients are added to the LoRA parameters' ``grad``.

        Args:
            batch: ``input_ids`` and ``labels`` int64 [B, S] with ``position_ids`` (packed) or ``attention_mask``
                (padded), on the host: a batch on the GPU works, but has to be waited for.
            num_supervised: Supervised tokens in the whole gradient accumulation window (the Trainer's
                ``num_items_in_batch``), on the host or the device.

        Returns:
            Sum of the supervised tokens' negative log-likelihoods / num_supervised: float32 scalar on the device.
        """
        micro = MicroBatch.of(batch)
        on = self._pass(micro, training=True)
        for layer in self.layers:
            for site in layer.sites:
                site.refresh()
        inverse = self._inverse(num_supervised)
        x, residual, saved = self._forward(micro, on, self.plan.keep)
        g = torch.empty_like(x)
        loss = head_loss_and_grad(x, residual, *self._head_arguments(micro), self.plan.head_tokens, g)
        before = self.flat.grad.clone()
        self.flat.grad.zero_()
        self._backward(g, saved, on)
        self.flat.grad.mul_(inverse).add_(before)
        return loss * inverse

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Sum of the supervised tokens' negative log-likelihoods (scalar on the device), and their number.

        No dropout, no gradient; takes the same batches as :meth:`forward_backward`.
        """
        micro = MicroBatch.of(batch)
        for layer in self.layers:
            for site in layer.sites:
                site.refresh()
        x, residual, _ = self._forward(micro, self._pass(micro, training=False), None)
        return head_loss(x, residual, *self._head_arguments(micro), self.plan.head_tokens), micro.supervised

    def _inverse(self, num_supervised: int | Tensor) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        if isinstance(num_supervised, Tensor):
            return num_supervised.to(self.device, wide).clamp(min=1).reciprocal()
        return torch.full((), 1.0 / max(1, num_supervised), dtype=wide, device=self.device)

    def _pass(self, micro: MicroBatch, *, training: bool) -> Pass:
        ends = torch.tensor([0, *_running_sums(micro.lengths)], dtype=torch.int32)
        documents = Documents(micro.lengths, ends.to(self.device), max(micro.lengths))
        seed = None
        if training:
            self.draws += 1
            value = (self.seed + self.draws * _SEED_STRIDE) % 2**63
            seed = torch.tensor(value, dtype=torch.int64, device=self.device)
        return Pass(
            documents=documents,
            way=choose(self.device, self.dtype, self.decoder.head_dim, documents),
            position_ids=torch.from_numpy(micro.position_ids).to(self.device),
            rotary=self._rotary,
            seed=seed,
            mlp_tokens=self.plan.mlp_tokens,
        )

    def _forward(
        self, micro: MicroBatch, on: Pass, keep: tuple[Keep, ...] | None
    ) -> tuple[Tensor, Tensor, list[Saved]]:
        ids = torch.from_numpy(micro.input_ids).to(self.device)
        x = torch.nn.functional.embedding(ids, self._embedding).to(self.dtype)
        residual: Tensor | None = None
        saved = []
        for index, layer in enumerate(self.layers):
            x, residual, kept = layer.forward(x, residual, on, None if keep is None else keep[index])
            saved.append(kept)
        assert residual is not None
        return x, residual, saved

    def _backward(self, g: Tensor | None, saved: list[Saved], on: Pass) -> None:
        for index in range(len(self.layers) - 1, self._lowest - 1, -1):
            assert g is not None
            g = self.layers[index].backward(g, saved.pop(), on, self._gradients[index], need_dx=index > self._lowest)

    @property
    def _embedding(self) -> Tensor:
        weight: Tensor = self.decoder.model.get_input_embeddings().weight
        return weight.detach()

    def _head_arguments(self, micro: MicroBatch) -> tuple[Any, Tensor, Tensor, Tensor]:
        rows = torch.from_numpy(micro.rows).to(self.device)
        targets = torch.from_numpy(micro.targets).to(self.device)
        return self.decoder.backbone.norm, self._head, rows, targets

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """What the dropout masks of the next micro-batch depend on."""
        return {"seed": self.seed, "draws": self.draws}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on drawing the masks that would have come next."""
        self.seed, self.draws = state["seed"], state["draws"]


def _parameters(site: Site) -> list[nn.Parameter]:
    """A site's parameters as they lie in the flat tensor: the A side by side, so that they stack without a copy."""
    adapters = site.projection.adapters
    return [adapter.a for adapter in adapters] + [adapter.b for adapter in adapters]


def _running_sums(lengths: tuple[int, ...]) -> list[int]:
    total, ends = 0, []
    for length in lengths:
        total += length
        ends.append(total)
    return ends
