"""What a run will take on a card, before a weight is there: the engine's own memory plan, on the meta device; and how
long.

The plan that the engine makes of the loaded model is made here of its skeleton, by the same code. What lies beside it
is counted: the base as it is loaded, the adapter with gradients and optimizer, the micro-batch's own tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from transformers import PreTrainedModel

from slimtune.adapter.lora import lora_config, wrapped
from slimtune.adapter.matched import adapted_names
from slimtune.adapter.targets import default_targets, find_targets
from slimtune.base.load import torch_dtype
from slimtune.base.named import model_source
from slimtune.base.unloaded import Unloaded, unloaded_base
from slimtune.config import Config
from slimtune.engine.attention import Way, expected_way
from slimtune.engine.blocks import Memory, MlpBlock
from slimtune.engine.decoder import LayerComputation, computations, lowest_trained, per_layer_inputs
from slimtune.engine.engine import WORKSPACE
from slimtune.engine.fp8 import pays
from slimtune.engine.fp8_head import Fp8Head
from slimtune.engine.inputs import Inputs
from slimtune.engine.memory import MemoryPlan, plan_memory
from slimtune.engine.optimizer import adapter_bytes
from slimtune.engine.ram import ram_to_lock
from slimtune.engine.read import read_decoder
from slimtune.engine.stored import whole_bytes
from slimtune.engine.streamed import embedding_places
from slimtune.engine.structure import ScoresKind
from slimtune.errors import UserError
from slimtune.hardware import Card, Hardware
from slimtune.plan import MEMORY_SHARE, memory_budget, resolve_ranks
from slimtune.ranks.host import here
from slimtune.training.fused import too_little, why_unfused
from slimtune.training.pace import HOST_CARDS, Step, sum_seconds

__all__ = ["Forecast", "Forecaster", "gib", "names_in_ram"]

_STEP = 1024
"""Tokens to which the longest document is told."""
_CONTEXT = int(0.74 * 2**30)
"""Bytes of CUDA's own context and of the kernels' code, on an H200: 0.72 to 0.76 GiB."""
_PAGE, _ENTRY = 4096, 8
"""Bytes of a page of locked RAM, and of what the device holds to find it."""
_IN_PIECES = 1.06
"""What the allocator takes for what is allocated at once, where no graph is recorded: 1.03 to 1.08 on an H200."""
_LONG = 8192
"""Tokens of a document from which a run is looked at before its base is loaded, whatever the base: shorter ones send
nothing to RAM that is worth it."""
_MOST_ELEMENTS = 3 << 30
"""Of one tensor: longer documents, whose tensors have more, nothing was tried with. Offsets have 64 bits; at so many
elements, of q, k and v, gradients were those of the same documents one at a time."""


@dataclass(frozen=True)
class Forecast:
    """What one run takes on one card."""

    card: str
    budget: int
    """Bytes that training may take on it."""
    trains: bool
    parts: dict[str, int]
    """Bytes on the card: weights, adapter (its gradients and the optimizer's state too), activations (what layers keep,
    and weights kept in 16 bits), workspace."""
    ram_bytes: int
    """Of RAM that are locked for what layers keep."""
    ram_layers: int
    attended_layers: int
    """Of these, layers of which what attention gave is there too."""
    streamed_bytes: int
    """Of RAM that are locked for layers' weights."""
    streamed_layers: int
    embedding_bytes: int
    """Of RAM that are locked for the embedding."""
    layers: int
    shown_bytes: int = 0
    """All of it on the card as nvidia-smi shows it: with CUDA's context, and what the allocator has taken and can give
    to nothing."""
    step_seconds: float = 0.0
    """Of an optimizer step; 0 where nobody knows the card's speed."""
    sum_seconds: float = 0.0
    """Of these: to add up the gradients of several cards."""
    launched: bool = False
    """The time is what a host takes to launch the work: hosts differ by half and more."""
    longest: int = 0
    """Tokens of the longest document that can be trained on; 0: none, or not asked."""
    longest_ram: int = 0
    """What that takes of a host's RAM."""
    sharing: int = 1
    """Ranks of a host, who have weights in RAM in common."""

    @property
    def locked_bytes(self) -> int:
        """All of it in a host's RAM."""
        return self.sharing * self.ram_bytes + self.streamed_bytes + self.embedding_bytes

    @property
    def nbytes(self) -> int:
        """All of it on the card."""
        return sum(self.parts.values())


class Forecaster:
    """Forecasts of one config.

    Args:
        config: The run's; its model is looked at, by headers alone.
        lengths: Tokens of the documents of a micro-batch, for its time; None: each as long as may be.
        cards: How many share each step.
        sharing: How many of them have weights in RAM in common; None: those of a host.
        headers: As :func:`slimtune.base.unloaded.unloaded_base` has it.

    Raises:
        UserError: As :func:`slimtune.base.unloaded.unloaded_base`; or the config names what the model hasn't.

    Attributes:
        unfused: Why the engine doesn't take the run; its memory is nobody's plan then.
        targets: Names of what gets an adapter.
        weights: Bytes of the base as it is loaded.
        parameters: The base's.
    """

    def __init__(
        self,
        config: Config,
        lengths: Sequence[int] | None = None,
        cards: int = 1,
        *,
        sharing: int | None = None,
        headers: bool = True,
    ) -> None:
        config, _ = resolve_ranks(config, cards)
        self.cards, self.sharing = cards, min(cards, HOST_CARDS) if sharing is None else sharing
        self._dtype = torch_dtype("bf16" if config.compute_dtype == "auto" else config.compute_dtype)
        self.base: Unloaded = unloaded_base(
            config.model,
            dtype=self._dtype,
            quantization=config.quantization,
            double_quant=config.double_quant,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            headers=headers,
        )
        model = self.base.model
        if config.targets == "auto":
            config = config.model_copy(update={"targets": default_targets(model)[0]})
        self.config = config
        targets = find_targets(config, model)
        self.targets = (*targets.modules, *targets.parameters)
        # Of its size whatever its values: some are made of the base's, which has none here.
        lora = lora_config(config.model_copy(update={"lora_init": "default"}), targets)
        self.weights, self.parameters = self.base.nbytes, model.num_parameters()
        self._names = {id(each): name for name, each in model.named_parameters()}
        self._bulk = {id(each): self.base.bulk_of(name, each) for name, each in model.named_parameters()}
        self.unfused = why_unfused(config, model, adapted_names(lora, model))
        self.lengths = lengths or [config.max_length] * max(1, config.batch_tokens // config.max_length)
        self._wrapped = None if self.unfused is not None else wrapped(self._as_loaded(), lora)

    def _as_loaded(self) -> PreTrainedModel:
        """Weights in 4 bits are made anew to compute with them, as those of a dtype are that nothing computes in."""
        torch.nn.Module.to(self.base.model, torch.float64 if self.base.four_bit else self._dtype)
        return self.base.model

    @cached_property
    def _decoder(self) -> Any:
        return read_decoder(self._wrapped)  # type: ignore[arg-type]

    @cached_property
    def _layers(self) -> list[LayerComputation]:
        layers = [x for x in computations(self._decoder, self._dtype, torch.device("meta")) if x is not None]
        if self.config.precision == "fp8":
            for block in (block for layer in layers for block in layer.blocks):
                block.use_fp8(pays, self.config.batch_tokens, None)
        return layers

    @cached_property
    def _embedding(self) -> int:
        """Bytes of the embedding, where it may go to RAM."""
        return sum(self._bulk[id(place.owner)][0] for place in embedding_places(self._decoder))

    @cached_property
    def _stored(self) -> list[int]:
        """Bytes of each layer's frozen weights, as they are loaded."""
        return [sum(whole_bytes(size) for each in x.weights for size in self._bulk[id(each)]) for x in self._layers]

    @cached_property
    def _per_layer(self) -> Any:
        return per_layer_inputs(self._decoder, self._dtype, torch.device("meta"))

    @cached_property
    def adapter_parameters(self) -> int:
        """Parameters that train; 0 where the engine doesn't, and nothing was wrapped."""
        return sum(parameter.numel() for parameter in self._trained)

    @cached_property
    def _trained(self) -> list[torch.nn.Parameter]:
        return [] if self._wrapped is None else [p for p in self._wrapped.parameters() if p.requires_grad]

    def forecast(self, card: Card, budget: int | None = None, ram: int | None = None) -> Forecast:
        """What the config takes on ``card``.

        Args:
            card: Where it is to train.
            budget: Bytes that training may take; None: what a run takes of it by default.
            ram: Bytes of RAM that layers' inputs and weights may take, each card's part, what only spares time among
                them; None: as much as they need.
        """
        config = self.config
        budget = int(MEMORY_SHARE * card.memory_bytes) if budget is None else budget
        plan = self._plan(card, config.batch_tokens, config.max_length, budget, ram)
        beside, recorded = self._beside(config.batch_tokens), not (plan.in_ram or plan.streamed)
        workspace = plan.nbytes + plan.spared_bytes - plan.kept_bytes + beside["workspace"]
        workspace -= 0 if recorded else WORKSPACE
        weights = beside["weights"] - plan.spared_bytes
        parts = {**beside, "weights": weights, "activations": plan.kept_bytes, "workspace": workspace}
        return Forecast(
            card.name, budget, sum(parts.values()) <= budget, parts,
            plan.ram_bytes, len(plan.in_ram), plan.attended_in_ram, plan.streamed_bytes, len(plan.streamed),
            plan.embedding_bytes, len(self._layers), _shown(plan, sum(parts.values()), recorded=recorded),
            *self._seconds(plan, card), sharing=self.sharing,
        )  # fmt: skip

    def _seconds(self, plan: MemoryPlan, card: Card) -> tuple[float, float, bool]:
        """Of a step, and of it to add up gradients; whether that is for a host's launches."""
        memory = Memory(plan.part_tokens, plan.mlp_tokens, self._ways(card), plan.padded_room, plan.sparing)
        head, lowest = self._decoder.head.numel(), lowest_trained(self._layers, self._per_layer)
        step = Step(self._layers, head, plan, memory, self.adapter_parameters, lowest, self._in_fp8(card))
        once = step.seconds(self.lengths, card)
        computed = self.config.accumulation // self.cards * once
        summed = sum_seconds(self.adapter_parameters, self.cards, card) if computed else 0.0
        return computed + summed, summed, 0 < once == step.launching(sum(self.lengths))

    def _in_fp8(self, card: Card) -> float:
        """:attr:`fp8_share`, where this card has it."""
        return 0.0 if card.capability < (8, 9) else self.fp8_share

    @cached_property
    def fp8_share(self) -> float:
        """Of the layers' products the share that the run asks to have in FP8."""
        if self.config.precision != "fp8":
            return 0.0
        blocks = [block for layer in self._layers for block in layer.blocks]
        return sum(block.fp8_products for block in blocks) / sum(block.products for block in blocks)

    @property
    def fp8_told(self) -> str:
        """That share in words; empty: none was asked for."""
        if self.config.precision != "fp8":
            return ""
        if not self.fp8_share:
            return "no product of this run is large enough for FP8: all are in bf16"
        return f"fused, {self.fp8_share:.0%} of the layers' products in FP8"

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step, over all cards."""
        return self.config.accumulation * sum(self.lengths)

    def names_in_ram(self, card: Card, budget: int, ram: int) -> frozenset[str]:
        """Names of the parameters whose bytes are in RAM in what :meth:`forecast` says."""
        plan = self._plan(card, self.config.batch_tokens, self.config.max_length, budget, ram)
        weights = [weight for index in plan.streamed for weight in self._layers[index].weights]
        if plan.embedding_bytes:
            weights += [place.owner for place in embedding_places(self._decoder)]
        if self._per_layer is not None:  # the engine reads it there in any case
            weights.append(self._per_layer.part.embedding.weight)
        return frozenset(self._names[id(weight)] for weight in weights)

    def with_longest(self, card: Card, budget: int | None = None, ram: int | None = None) -> Forecast:
        """As :meth:`forecast`, with the longest document too."""
        told = self.forecast(card, budget, ram)
        longest, longest_ram = self._longest(card, told.budget, ram)
        return replace(told, longest=longest, longest_ram=longest_ram)

    def _beside(self, tokens: int) -> dict[str, int]:
        """Bytes beside the plan."""
        table = None if self._per_layer is None else self._per_layer.table
        in_ram = 0 if table is None else table.numel() * self._dtype.itemsize
        rotary = {part.rotary: part.head_dim for part in self._decoder.attentions if part.rotary is not None}
        rows = 0 if table is None else tokens * table.shape[1] * self._dtype.itemsize
        return {
            "weights": self.weights - in_ram,
            "adapter": adapter_bytes([parameter.numel() for parameter in self._trained]),
            "workspace": 2 * WORKSPACE + Inputs.nbytes_of(tokens) + rows + 4 * tokens * sum(rotary.values()),
        }

    def _plan(self, card: Card, tokens: int, longest: int, budget: float, ram: int | None) -> MemoryPlan:
        room = budget - sum(self._beside(tokens).values())
        return plan_memory(
            self._layers,
            tokens,
            self._decoder.head.shape[0],
            room,
            longest=longest,
            ways=self._ways(card),
            per_layer=self._per_layer,
            ram=1 << 62 if ram is None else ram,
            lavish=ram is not None,
            stored=self._stored,
            embedding=self._embedding,
            sharing=self.sharing,
            lowest=lowest_trained(self._layers, self._per_layer),
            turned_head=Fp8Head.bytes_of(pays, tokens, *self._decoder.head.shape) if self.fp8_share else 0,
        )

    def _ways(self, card: Card) -> Mapping[ScoresKind, Way]:
        auto = self.config.compute_dtype == "auto"
        dtype = torch_dtype(card.compute_dtype if auto else self.config.compute_dtype)
        return {
            kind: expected_way(card.capability, dtype, kind.head_dim, softcap=kind.softcap, sinks=kind.sinks)
            for kind in self._decoder.scores
        }

    @cached_property
    def _widest(self) -> int:
        """Columns of the widest tensor that has a row for every token: feed-forwards go by chunks."""
        blocks = [block for layer in self._layers for block in layer.blocks]
        mixers = [site.outputs for block in blocks if not isinstance(block, MlpBlock) for site in block.sites]
        return max(*mixers, *(block.columns for block in blocks))

    def _longest(self, card: Card, budget: int, ram: int | None) -> tuple[int, int]:
        def least(tokens: int) -> MemoryPlan | None:
            plan = self._plan(card, tokens, tokens, 0.0, ram)
            return plan if plan.nbytes + sum(self._beside(tokens).values()) <= budget else None

        low, high = 0, _MOST_ELEMENTS // (_STEP * self._widest)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if least(middle * _STEP) else (low, middle - 1)
        plan = least(low * _STEP) if low else None
        return low * _STEP, 0 if plan is None else plan.locked_bytes + (self.sharing - 1) * plan.ram_bytes


def _shown(plan: MemoryPlan, nbytes: int, *, recorded: bool) -> int:
    """What nvidia-smi shows of so many bytes that are allocated at once."""
    own = _CONTEXT + plan.locked_bytes // _PAGE * _ENTRY
    return own + (nbytes + plan.apart_bytes if recorded else int(_IN_PIECES * nbytes))


def names_in_ram(config: Config, hardware: Hardware) -> frozenset[str]:
    """Which of the base's parameters go to RAM, known before any is loaded; and that there is room for all that must.

    Raises:
        UserError: The run fits the GPU with more RAM than there is, and not without; or in no way.
    """
    budget = memory_budget(config)
    if hardware.device != "cuda" or budget is None:
        return frozenset()
    # One host may have the files, and another fetch them first: what all do, all have seen.
    if here().least("size of the base", config.max_length < _LONG and _fits_in_16_bits(config, budget)):
        return frozenset()
    forecaster = Forecaster(config, sharing=here().sharing, headers=False)
    card, ram = hardware.card, ram_to_lock()
    if forecaster.unfused is not None:
        return frozenset()
    needed = forecaster.forecast(card, budget)
    if not needed.trains:
        longest = forecaster.with_longest(card, budget).longest
        refusal = too_little(config, needed.nbytes, longest if longest < config.max_length else 0)
        if refusal is not None:
            raise refusal
    if needed.trains and not forecaster.forecast(card, budget, ram).trains:
        raise UserError(
            f"documents of {config.max_length:,} tokens take {gib(needed.locked_bytes)} of RAM beside {config.memory} "
            f"of the GPU, and {gib(forecaster.sharing * ram)} can be locked",
            rule="Layers' inputs and weights go to RAM where they don't fit the GPU beside the rest.",
            way_out="Free RAM, take a smaller --max-length, or allow more of the GPU: --memory",
        )
    return forecaster.names_in_ram(card, budget, ram)


def _fits_in_16_bits(config: Config, budget: int) -> bool:
    """Whether the base's files, where they are here, are smaller than the budget: in 4 bits most of it is left."""
    source = model_source(config.model)
    if Path(source).is_dir():
        files = Path(source).glob("*.safetensors")
    else:
        files = (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model") / "blobs").glob("*")
    return 0 < sum(file.stat().st_size for file in files) <= budget


def gib(nbytes: float) -> str:
    """Bytes as people read them."""
    return f"{nbytes / 2**30:.1f}GiB" if nbytes >= 2**30 else f"{math.ceil(nbytes / 2**20)}MiB"
