"""The training step as slimtune's trainer runs it: no autograd, no host synchronisation, CUDA graphs on CUDA.

One micro-batch is: one copy to the device, one graph (embedding and layers forward), the head and loss in chunks
(their number is known on the host), one graph (layers backward, gradients added to the flat gradient).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.batch import MicroBatch
from slimtune.engine.attention import LONG, ROUND, Way, compared
from slimtune.engine.decoder import (
    Keep,
    LayerComputation,
    Pass,
    Saved,
    computations,
    lowest_trained,
    per_layer_inputs,
    rotary_tables,
)
from slimtune.engine.fp8 import Fp8, pays
from slimtune.engine.fp8_head import Fp8Head
from slimtune.engine.fp8_products import InBoth, head_in_both, in_both
from slimtune.engine.genuine import a_hook
from slimtune.engine.inputs import Inputs, ShapeKey
from slimtune.engine.loss import head_loss, head_loss_and_grad
from slimtune.engine.memory import MemoryPlan, plan_memory
from slimtune.engine.optimizer import FlatParameters, adapter_bytes, state_bytes
from slimtune.engine.per_layer import keep_in_ram
from slimtune.engine.placed import carry_out, most_ram
from slimtune.engine.read import check_values, read_decoder
from slimtune.engine.stacks import Stack
from slimtune.engine.stored import unpack_for_training
from slimtune.engine.streamed import embedding_places, in_ram
from slimtune.engine.structure import CannotFuse, Decoder
from slimtune.engine.weights import Gradients, Site
from slimtune.ranks.host import here

__all__ = ["WORKSPACE", "Engine"]

WORKSPACE = 32 << 20
"""Bytes that cuBLAS takes on each stream that multiplies: there are two where graphs are recorded."""
_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that the seeds of 2**64 micro-batches differ


@dataclass(frozen=True)
class _Recorded:
    """One key's graphs, and where they leave the last layer's result and find its gradient."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    x: Tensor
    residual: Tensor
    g: Tensor


class Engine:
    """Forward and backward passes of one PEFT-wrapped model instance, at full speed.

    The model stays what it is: its modules, names and files. Its LoRA parameters become views of one flat float32
    tensor (:attr:`flat`), and their ``grad`` views of another, which :meth:`forward_backward` adds to.

    Args:
        model: PEFT-wrapped causal language model of a family that it knows; NF4, 16- or 32-bit base.
        dtype: What is computed in: bfloat16, float16 or float32 (float64 to check against).
        tokens: Tokens in the largest micro-batch (T); the memory plan is made for it.
        longest: Tokens in the longest document, if that is less; a tight memory is met by taking fewer documents at
            once.
        memory: Most bytes that may be allocated on the device, the model included; None: no limit.
        seed: Seed of the dropout masks.
        graphs: Record CUDA graphs; only on CUDA.
        fp8: Multiply frozen weights of NF4, and the head's gradient, in FP8 where that is faster; evaluation stays in
            ``dtype``, which is bfloat16.
        ram: Most bytes of RAM that layers' inputs and weights may take where they don't fit the device; of several
            ranks each one's part; None: by what is free beside a GPU, 0 on a CPU.

    Attributes:
        flat: The LoRA parameters and their gradients.
        plan: How the memory is used.
        least_memory: The bytes that it will take if ``memory`` is too little for any plan; None if it is kept.
        parts: Bytes on the device of weights, adapter (gradients and optimizer too), activations and workspace, as
            planned; empty on a CPU.
        fp8_share: Of the layers' products the share that is taken in FP8.
        in_ram: Bytes of the model's per-layer inputs' table, which was moved to RAM; 0 without one, and on a CPU.

    Raises:
        CannotFuse: The model, or one of its layers, is none that the engine computes.
        UserError: The system doesn't give the RAM that the plan counts on.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        tokens: int,
        longest: int | None = None,
        memory: int | None = None,
        seed: int = 0,
        graphs: bool = True,
        fp8: bool = False,
        ram: int | None = None,
    ) -> None:
        check_values(model)
        self.decoder: Decoder = read_decoder(model)
        if self.decoder.unfused:
            name, reason = next(iter(self.decoder.unfused.items()))
            raise CannotFuse(f"{name} can't be fused: {reason}", way_out="It trains unfused: engine: plain.")
        self._check_called()
        self.dtype, self.seed, self.draws, self.in_ram = dtype, seed, 0, 0
        self.device: torch.device = self.decoder.head.device
        for linear in self.decoder.linears():
            unpack_for_training(linear)
        self.layers: list[LayerComputation] = [x for x in computations(self.decoder, dtype, self.device) if x]
        self._fp8 = Fp8()
        self.fp8_share = self._use_fp8(tokens) if fp8 else 0.0
        self._per_layer = per_layer_inputs(self.decoder, dtype, self.device)
        beside = () if self._per_layer is None else self._per_layer.trained
        self._trained: tuple[Site | Stack, ...] = *(part for layer in self.layers for part in layer.trained), *beside
        self.flat = FlatParameters(self._check_trainable(model))
        self._sums = torch.zeros_like(self.flat.grad)
        self._stacked: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._sinks = {part: self._bind(part) for part in self._trained}
        self._through = bool(beside)
        self._lowest = lowest_trained(self.layers, self._per_layer)
        self._head = self.decoder.head.detach()
        if self._head.dtype != dtype:
            self._head = self._head.to(dtype)
        self._inputs = Inputs(tokens, self.decoder.scores, dtype, self.device, self._table_in_ram())
        self._tables = rotary_tables(self.decoder, tokens, self.device, dtype)
        self.graphs = graphs and self.device.type == "cuda"
        used, to_come = self._used(), self._to_come()
        budget = math.inf if memory is None else memory - used - to_come
        planned = partial(
            plan_memory,
            self.layers,
            tokens,
            self._head.shape[0],
            budget,
            longest=longest,
            ways=self._inputs.packs_ways,
            per_layer=self._per_layer,
            ram=most_ram(self.device) if ram is None else ram,
            stored=[layer.stored_bytes for layer in self.layers],
            embedding=sum(place.tensor.nbytes for place in embedding_places(self.decoder)),
            sharing=here().sharing,
            lowest=self._lowest,
            turned_head=Fp8Head.bytes_of(pays, tokens, *self._head.shape) if self.fp8_share else 0,
        )
        self.plan: MemoryPlan
        self.plan, self._streamed, self._away = carry_out(planned, self.decoder, self.layers, self.device)
        self._inputs.padded_room = self.plan.padded_room
        self.least_memory: int | None = None if self.plan.nbytes <= budget else used + to_come + self.plan.nbytes
        self._inverse = torch.ones((), dtype=self.flat.grad.dtype, device=self.device)
        # A copy's layer takes longer than its launches, so a graph would save nothing.
        self._recording = self.graphs and self._away is None and self._streamed is None
        self.parts = self._planned_parts(used + to_come * self._recording)
        self._recorded: dict[ShapeKey, _Recorded] = {}
        self._warm: set[tuple[Way, ...]] = set()
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self._top_gradient: Tensor | None = None
        for index, layer in enumerate(self.layers[: self.plan.kept_weights]):
            for block in layer.blocks:
                block.keep_weights(turned=index < self.plan.kept_turned)
        self._head_in_fp8 = Fp8Head(self._head, self._fp8) if self.plan.turned_head else None

    def _use_fp8(self, tokens: int) -> float:
        """Let what gains by it multiply in FP8; its share of all layers' products."""
        blocks = [block for layer in self.layers for block in layer.blocks]
        for block in blocks:
            block.use_fp8(pays, tokens, self._fp8)
        return sum(block.fp8_products for block in blocks) / sum(block.products for block in blocks)

    @property
    def experts_in_16_bits(self) -> str:
        """Why experts stay there where FP8 was asked for, in words; empty: none do."""
        blocks = (block for layer in self.layers for block in layer.blocks)
        return next((block.in_16_bits for block in blocks if block.in_16_bits), "")

    def choose_channels(self, batch: Mapping[str, Any]) -> None:
        """Choose what products in FP8 take in of what rounding lost: the channels that weigh most in a batch.

        Args:
            batch: As :meth:`evaluate` takes it; several ranks choose the same channels by the same batch.
        """
        if self.fp8_share:
            with self._fp8.choosing():
                self.evaluate(batch)

    def in_16_bits(self) -> AbstractContextManager[None]:
        """While the body runs, nothing is multiplied in FP8. No graph may be recorded or replayed meanwhile."""
        return self._fp8.off()

    def counting_lost(self) -> AbstractContextManager[Fp8]:
        """While the body runs, what gradients lose in FP8 is counted; no graph may be recorded or replayed."""
        return self._fp8.counting()

    @torch.no_grad()
    def products_in_both(self, rows: int = 64) -> Iterator[InBoth]:
        """Of each projection and stack that is multiplied in FP8: its products both ways, in FP8 and in 16 bits.

        Args:
            rows: Of random numbers from a generator of their own, of each expert a sixteenth of them; the chosen
                channels weigh most in them.
        """
        draw = torch.Generator(self.device).manual_seed(0)
        for index, layer in enumerate(self.layers):
            if self._streamed is not None:
                self._streamed.take(index, step=1)
            for part in (part for block in layer.blocks for part in block.parts if part.in_fp8 is not None):
                yield in_both(part, draw, rows)

    @torch.no_grad()
    def head_in_both(self, rows: int = 64) -> tuple[Tensor, Tensor] | None:
        """The gradient of so many random rows through the head in FP8 and in 16 bits; None: it is in 16 bits."""
        if self._head_in_fp8 is None:
            return None
        return head_in_both(self._head, self._head_in_fp8, torch.Generator(self.device).manual_seed(0), rows)

    def leave_head_in_16_bits(self) -> None:
        """Its way back is multiplied so from now on, and its transpose given back."""
        self._head_in_fp8, self.plan = None, replace(self.plan, turned_head=0)

    def _check_called(self) -> None:
        """Nothing may happen in a module's call but what its class does: the engine calls none."""
        embedding, head = self.decoder.model.get_input_embeddings(), self.decoder.model.get_output_embeddings()
        hooked = a_hook((*self.decoder.backbone.modules(), embedding, head))
        if hooked is not None:
            raise CannotFuse(f"a {hooked} has a hook, which the engine wouldn't call")
        if hasattr(embedding, "base_layer"):
            raise CannotFuse("the embedding has an adapter, which the engine doesn't compute")

    def _check_trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """The adapters' parameters in the engine's order; nothing else may train."""
        mine = [parameter for part in self._trained for parameter in part.parameters]
        known = {id(parameter) for parameter in mine}
        reason = None if len(known) == len(mine) else "a LoRA matrix that several layers share"
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                reason = f"{name} trains, and it is no LoRA matrix that the engine computes"
            if id(parameter) in known and not parameter.requires_grad:
                reason = f"{name} is frozen, and the engine trains every LoRA matrix"
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                reason = f"{name} has a hook, which the engine wouldn't call"
        if reason is not None:
            raise CannotFuse(reason, way_out="It trains unfused: engine: plain.")
        return mine

    def _bind(self, site: Site | Stack) -> Gradients:
        """Let a site read its A from the flat tensor; where its gradients are summed up."""
        sums = dict(zip(map(id, self.flat.parameters), self.flat.views(self._sums), strict=True))
        if isinstance(site, Stack):
            a, b = (sums[id(parameter)] for parameter in site.parameters)
            return site.sink(a, b)
        adapters = site.projection.adapters
        first = adapters[0].a
        start = first.storage_offset()
        sizes = [adapter.a.numel() for adapter in adapters]
        lined_up = all(
            adapter.rank == site.rank and adapter.a.storage_offset() == start + index * sizes[0]
            for index, adapter in enumerate(adapters)
        )
        b_sums = [sums[id(adapter.b)] for adapter in adapters]
        shape, end = (site.groups * site.rank, site.inputs), start + sum(sizes)
        if lined_up:
            site.a = self.flat.data[start:end].view(shape)
            return Gradients(self._sums[start:end].view(shape), b_sums, self._whole_b(site, b_sums))
        # Different ranks, or sizes that are no multiple of the optimizer's block: a stack of its own, copied both ways.
        stack, gradients = torch.zeros(shape, dtype=self.flat.data.dtype, device=self.device), site.fresh_sink()
        site.a = stack
        for index, adapter in enumerate(adapters):
            rows = slice(index * site.rank, index * site.rank + adapter.rank)
            self._stacked.append((adapter.a, stack[rows], gradients.a[rows], sums[id(adapter.a)]))
        return Gradients(gradients.a, b_sums)

    def _whole_b(self, site: Site, b: list[Tensor]) -> Tensor | None:
        """All of a site's B gradients as one matrix, if they lie side by side and every layer has an adapter."""
        adapters = site.projection.adapters
        alike = len({(adapter.rank, adapter.scaling) for adapter in adapters}) == 1
        start, size = b[0].storage_offset(), sum(x.numel() for x in b)
        lined_up = all(x.storage_offset() == start + sum(y.numel() for y in b[:index]) for index, x in enumerate(b))
        if not (alike and lined_up and len(adapters) == len(site.projection.linears)):
            return None
        return self._sums[start : start + size].view(site.outputs, site.rank)

    def _planned_parts(self, used: int) -> dict[str, int]:
        if self.device.type != "cuda":
            return {}
        adapter = adapter_bytes([parameter.numel() for parameter in self.flat.parameters])
        workspace = WORKSPACE * (1 + self._recording) + Inputs.nbytes_of(self._inputs.room)
        return {
            "weights": used - adapter - workspace - self.plan.spared_bytes,
            "adapter": adapter,
            "activations": self.plan.kept_bytes,
            "workspace": workspace + self.plan.nbytes + self.plan.spared_bytes - self.plan.kept_bytes,
        }

    def _used(self) -> int:
        """Bytes on the device besides the plan's, if all weights lay there; the optimizer's state, to come, too."""
        if self.device.type != "cuda":
            return 0
        one = torch.ones(1, 1, dtype=self.dtype, device=self.device)
        torch.mm(one, one)  # cuBLAS takes its memory, unless it has
        allocated = torch.cuda.memory_allocated(self.device) + sum(in_ram(layer.places) for layer in self.layers)
        allocated += in_ram(embedding_places(self.decoder))
        return allocated + state_bytes(self.flat.data.numel())

    def _to_come(self) -> int:
        """Bytes that cuBLAS takes once the first graph of this process is recorded, on the stream that all are."""
        return WORKSPACE if self.graphs and torch.cuda.graph.default_capture_stream is None else 0

    # -- a micro-batch ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward_backward(self, batch: Mapping[str, Any], num_supervised: int | Tensor) -> Tensor:
        """The loss of a micro-batch; its gradients are added to the LoRA parameters' ``grad``.

        Args:
            batch: What :meth:`slimtune.batch.MicroBatch.of` reads, on the host: a batch on the GPU works, but has to
                be waited for.
            num_supervised: Supervised tokens in the whole gradient accumulation window (the Trainer's
                ``num_items_in_batch``), on the host or the device.

        Returns:
            Sum of the supervised tokens' negative log-likelihoods / num_supervised: float32 scalar on the device.
        """
        self._set_inverse(num_supervised)
        losses = [self._step(part) for part in self._parts(self._micro_batch(batch))]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def attention_compared(self, batch: Mapping[str, Any]) -> dict[str, bool]:
        """Attention's kernels for a micro-batch like this one: whether each computes what plain products do."""
        packs = {part.lengths for part in self._parts(self._micro_batch(batch))}
        return compared(self.device, self.dtype, self.decoder.scores, packs)

    def _micro_batch(self, batch: Mapping[str, Any]) -> MicroBatch:
        micro = MicroBatch.of(batch)
        # Rows of one round length have the fastest attention, and a graph of their own; a CPU needs neither.
        level = micro.padded and self.graphs and max(micro.lengths) < LONG
        return micro.levelled(ROUND, self._inputs.room) if level else micro

    def _parts(self, micro: MicroBatch) -> list[MicroBatch]:
        """Parts that the memory plan has room for, all of one size; but each long document by itself.

        A row of a round length has the fastest attention, and what fills a pack up beside it isn't computed.
        """
        longest = max(micro.lengths)
        if longest >= LONG and (len(set(micro.lengths)) > 1 or longest % ROUND):
            parts = [part for each in micro.apart(LONG) for part in each.split(self.plan.part_tokens)]
            parts = [part for part in parts if part.supervised] or parts[:1]
            return [part.levelled(ROUND, self._inputs.room) if max(part.lengths) >= LONG else part for part in parts]
        parts = micro.split(self.plan.part_tokens)
        return [part.filled(self.plan.part_tokens) for part in parts] if len(parts) > 1 else parts

    def _step(self, micro: MicroBatch) -> Tensor:
        self.draws += 1
        key = self._inputs.load(micro, (self.seed + self.draws * _SEED_STRIDE) % 2**63)
        recorded = self._recorded.get(key)
        if not key.recordable:
            self._record_no_more()
        if recorded is None and self._recording and key.ways in self._warm:
            recorded = self._recorded[key] = self._record(micro, key)
        if recorded is not None:
            recorded.forward.replay()
            loss = self._head_and_loss(micro, recorded.x, recorded.residual, recorded.g)
            recorded.backward.replay()
        else:
            # The first micro-batch of a kind runs as it is: it compiles the kernels and makes the libraries' plans.
            self._warm.add(key.ways)
            on = self._pass(micro, key, training=True)
            x, residual, saved = self._forward(key, on, self.plan.keep)
            g = torch.empty_like(x)
            loss = self._head_and_loss(micro, x, residual, g)
            del x, residual
            self._backward(g, saved, on)
            self._add()
        return loss * self._inverse

    @torch.no_grad()
    def upper_gradients(self, batch: Mapping[str, Any]) -> list[tuple[nn.Parameter, Tensor]]:
        """The last layers' LoRA parameters, each with its gradient of the sum of a micro-batch's losses.

        Of the fewest layers that have one of each adapted kind among them, and one more; without dropout, without
        graphs, and in FP8 what trains so. They are added to nothing, and the next micro-batch draws what it would have
        drawn.
        """
        first, total = self._upper, torch.zeros_like(self._sums)
        for micro in self._parts(self._micro_batch(batch)):
            key = self._inputs.load(micro, 0)
            on = self._pass(micro, key, training=False)
            x, residual, saved = self._forward(key, on, self.plan.keep, first)
            g = torch.empty_like(x)
            self._head_and_loss(micro, x, residual, g)
            del x, residual
            self._backward(g, saved, on, first)
            total += self._sums
        parts = self._trained if first is None else [part for layer in self.layers[first:] for part in layer.trained]
        mine = {id(each) for part in parts for each in part.parameters}
        pairs = zip(self.flat.parameters, self.flat.views(total), strict=True)
        return [(parameter, gradient) for parameter, gradient in pairs if id(parameter) in mine]

    @property
    def _upper(self) -> int | None:
        """The first of these layers; None if no layer has an adapter in it."""
        adapted = [index for index, layer in enumerate(self.layers) if layer.trained]
        last = {self.layers[index].kind: index for index in adapted}
        return adapted[max(0, adapted.index(min(last.values())) - 1)] if adapted else None

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        """Sum of the supervised tokens' negative log-likelihoods (scalar on the device), and their number.

        No dropout, no gradient, and nothing in FP8; takes the same batches as :meth:`forward_backward`.
        """
        with self.in_16_bits():
            return self._evaluated(self._micro_batch(batch))

    def _evaluated(self, whole: MicroBatch) -> tuple[Tensor, int]:
        losses = []
        for micro in self._parts(whole):
            key = self._inputs.load(micro, 0)
            x, residual, _ = self._forward(key, self._pass(micro, key, training=False), None)
            rows, targets = self._inputs.supervised(micro)
            losses.append(
                head_loss(
                    x, residual, self.decoder.norm, self._head, rows, targets, self.plan.head_tokens,
                    softcap=self.decoder.softcap,
                )
            )  # fmt: skip
        return torch.stack(losses).sum(), whole.supervised

    def _set_inverse(self, num_supervised: int | Tensor) -> None:
        if isinstance(num_supervised, Tensor):
            self._inverse.copy_(num_supervised.clamp(min=1).to(self._inverse.dtype).reciprocal(), non_blocking=True)
        else:
            self._inverse.fill_(1.0 / max(1, num_supervised))

    def _pass(self, micro: MicroBatch, key: ShapeKey, *, training: bool) -> Pass:
        return Pass(
            documents=self._inputs.documents(micro, key),
            ways=self._inputs.ways(key),
            position_ids=self._inputs.position_ids(key),
            tables=self._tables,
            seed=self._inputs.seed if training else None,
            mlp_tokens=self.plan.mlp_tokens,
            sparing=self.plan.sparing,
        )

    def _forward(
        self, key: ShapeKey, on: Pass, keep: tuple[Keep, ...] | None, lowest: int | None = None
    ) -> tuple[Tensor, Tensor, list[Saved]]:
        """The last layer's result as a pair to be added, and what each layer kept.

        Args:
            key: Of the micro-batch that was loaded.
            on: The pass.
            keep: What each layer keeps; None: there will be no backward.
            lowest: The layer where the backward ends, if not where the adapters do.
        """
        lowest = self._lowest if lowest is None else lowest
        for part in self._trained:
            part.refresh()
        for matrix, stacked, _, _ in self._stacked:
            stacked.copy_(matrix)
        x = torch.nn.functional.embedding(self._inputs.input_ids(key), self._embedding).to(self.dtype)
        if self.decoder.embedding_scale != 1.0:
            x *= self.decoder.embedding_scale
        if self._per_layer is not None:
            self._per_layer.forward(x, self._table_rows(key), on)
        stream, saved = [x], []
        del x  # a layer holds what it needs of the stream, and no more
        if self._away is not None:
            self._away.begin()
        for index, layer in enumerate(self.layers):
            # Nothing below the lowest adapter has a backward.
            wanted = None if keep is None or index < lowest else keep[index]
            if self._streamed is not None:
                self._streamed.take(index, step=1)
            stream, kept = layer.forward(stream, on, wanted, own=index > 0)
            if self._away is not None and wanted is not None and index in self._away:
                kept = self._away.put(index, kept)
            saved.append(kept)
        if self._away is not None:
            self._away.settle()
        x, residual = stream
        return x, residual, saved

    def _head_and_loss(self, micro: MicroBatch, x: Tensor, residual: Tensor, g: Tensor) -> Tensor:
        rows, targets = self._inputs.supervised(micro)
        return head_loss_and_grad(
            x, residual, self.decoder.norm, self._head, rows, targets, self.plan.head_tokens, g,
            softcap=self.decoder.softcap, in_fp8=self._head_in_fp8, weights=self._inputs.weights(micro),
        )  # fmt: skip

    def _backward(self, g: Tensor | None, saved: list[Saved], on: Pass, lowest: int | None = None) -> None:
        """All layers' backward; what the adapters got is in the flat sums.

        The gradient that runs through the layers is that of the sum, not divided by the number of supervised tokens:
        in fp16 the division would push it under the smallest number that fp16 has.
        """
        self._sums.zero_()
        for _, _, stacked_sum, _ in self._stacked:
            stacked_sum.zero_()
        through, lowest = self._through and lowest is None, self._lowest if lowest is None else lowest
        for index in range(len(self.layers) - 1, lowest - 1, -1):
            assert g is not None
            if self._streamed is not None:
                self._streamed.take(index, step=-1)
            if self._away is not None:
                self._away.take(index, saved, lowest)
            need_dx = index > lowest or through
            g = self.layers[index].backward(g, saved.pop(), on, self._sinks, need_dx=need_dx, own_g=True)
        if self._per_layer is not None and through:
            self._per_layer.backward(on, self._sinks)
        for _, _, stacked_sum, total in self._stacked:
            total.copy_(stacked_sum)

    def _add(self) -> None:
        """Scale the sums, and add them to the flat gradient.

        Rounded before they are added, which one operation for both may not do: so two ranks' sum is to the bit what one
        process adds up.
        """
        self._sums.mul_(self._inverse)
        self.flat.grad.add_(self._sums)

    def _record(self, micro: MicroBatch, key: ShapeKey) -> _Recorded:
        """Two graphs for micro-batches of this key. Recording computes nothing."""
        torch.cuda.empty_cache()  # what the unrecorded pass left goes to the graphs' own pool
        on = self._pass(micro, key, training=True)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Of this thread: others may wait for the device meanwhile, as a save does.
        with torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
            x, residual, saved = self._forward(key, on, self.plan.keep)
        g = self._g(x)
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
            self._backward(g, saved, on)
            self._add()
        return _Recorded(forward, backward, x, residual, g)

    def _record_no_more(self) -> None:
        """A micro-batch that no graph can take: graphs beside passes as they are would take the plan's memory twice."""
        self._recording = False
        self._recorded.clear()

    def _g(self, like: Tensor) -> Tensor:
        """The buffer for the gradient of the last layer's result, at an address that stays."""
        if self._top_gradient is None or self._top_gradient.shape != like.shape:
            self._top_gradient = torch.empty_like(like)
        return self._top_gradient

    @property
    def _embedding(self) -> Tensor:
        weight: Tensor = self.decoder.model.get_input_embeddings().weight
        return weight.detach()

    def _table_in_ram(self) -> Tensor | None:
        """The per-layer inputs' table, where it is to live in RAM."""
        if self._per_layer is None or self.device.type != "cuda":
            return None
        keep_in_ram(self._per_layer.part.embedding)
        self.in_ram = self._per_layer.table.nbytes
        return self._per_layer.table

    def _table_rows(self, key: ShapeKey) -> Tensor:
        """The tokens' rows of the per-layer inputs' table."""
        assert self._per_layer is not None
        rows = self._inputs.table_rows(key)
        return (
            torch.nn.functional.embedding(self._inputs.input_ids(key), self._per_layer.table) if rows is None else rows
        )

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the dropout masks of the next micro-batch depend on, and the channels that were chosen in FP8."""
        return {"seed": self.seed, "draws": self.draws, "channels": self._fp8.chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on drawing the masks that would have come next, with those channels."""
        self.seed, self.draws = state["seed"], state["draws"]
        self._fp8.take(state.get("channels", {}))
