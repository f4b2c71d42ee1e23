"""Turns a memory budget into what each layer keeps, which weights stay dequantised, and how much is done at once.

All sizes are worked out from shapes before anything is allocated: blocks tell theirs, and layers may differ. A plan is
chosen by a cost model of the work that it adds: products computed again, weights dequantised again, and products too
small to fill the device. The model's rates are an H100's; only their ratios count.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from slimtune.engine.attention import Way
from slimtune.engine.blocks import Keep, Memory
from slimtune.engine.decoder import LayerComputation
from slimtune.engine.per_layer import PerLayerComputation
from slimtune.engine.structure import ScoresKind

__all__ = ["MemoryPlan", "plan_memory"]

_CHUNKS = (1 << 30, 8192, 4096, 2048, 1024, 512)
"""Tokens that the MLP may take at once."""
_HEAD_CHUNKS = (4096, 2048, 1024, 512, 256)
"""Supervised tokens that the head may take at once."""
_FLOPS = 700e12  # of a large 16-bit product
_ATTENDED = 500e12  # and of attention over long documents
_DEQUANTIZED = 1.5e12  # bytes of 16-bit weights written in a second, their 4 bits read
_ASIDE = 0.25
"""Of a layer's products, what its attention takes at most for the plan to have no eye on it: it is in ``extra``."""
_FILL = 160  # tokens at which a product runs at half its rate
_LINK = 25e9  # bytes that a bus brings to RAM or back in a second: PCIe 4.0 of 16 lanes
_LAUNCHES = 0.8e-3
"""Seconds in which a fast host launches a layer both ways without a graph. With what hosts take
(:mod:`slimtune.training.pace`) plans for few tokens would all cost the same, however much the device does."""
_STAGED = 2
"""Streamed layers' weights that the device has room for at once."""
_ROUGHLY = 1.05
"""Of a budget, for what is reserved where graphs are recorded: a card's budget leaves a tenth of it."""
_ROUNDED_UP = 0.02
"""Of weights, what an allocator may take beside those of FP8 that it doesn't beside bf16's, as it rounds up blocks."""
_ASIDES = (Keep.INPUT, Keep.ATTENDED)
"""What layers may have in RAM: the rest takes about as long over a bus as to be computed again."""
_SUMS = 512 << 20
"""Bytes that the memory-efficient kernel's sums may take, so that it takes documents of any lengths at once."""


@dataclass(frozen=True)
class MemoryPlan:
    """How the engine uses its memory."""

    keep: tuple[Keep, ...]
    """For each layer."""
    kept_weights: int
    """How many layers, from the first, hold their weights as they are multiplied."""
    part_tokens: int
    """A larger micro-batch is split into parts of whole documents, and their gradients are added up."""
    mlp_tokens: int
    """Tokens that the MLP takes at once."""
    head_tokens: int
    """Supervised tokens that the head takes at once."""
    padded_room: int
    """What :func:`slimtune.engine.attention.padded_tokens` may be in one call; a CUDA graph needs it."""
    nbytes: int
    """What all of this is predicted to take, besides the model itself; less what of the model is in RAM."""
    in_ram: tuple[int, ...] = ()
    """Layers of which what they keep waits in RAM for their backward. No graph is recorded then."""
    ram_sizes: tuple[int, ...] = ()
    """What each of those takes there."""
    spare_ram_bytes: int = 0
    """Of that, what only spares time: with less RAM the same layers compute more again."""
    sparing: bool = False
    """:attr:`slimtune.engine.blocks.Pass.sparing`."""
    kept_bytes: int = 0
    """Of ``nbytes``: what layers keep from forward to backward, and weights in the compute dtype."""
    streamed: tuple[int, ...] = ()
    """Layers whose frozen weights are in RAM, and come a layer ahead. No graph is recorded then."""
    streamed_bytes: int = 0
    """What those take there."""
    embedding_bytes: int = 0
    """Of the embedding, where it is in RAM: the device reads a row a token there."""
    spared_bytes: int = 0
    """What the device holds less for both: they, but for what the next two layers are brought to."""
    apart_bytes: int = 0
    """What a recorded step reserves besides ``nbytes``: its graphs' memory and the head's, which neither gives the
    other."""
    kept_turned: int = 0
    """Of the layers that hold their weights, how many, from the first, hold the transposes too that FP8 takes for the
    way back."""
    turned_head: int = 0
    """Bytes of the head's transpose in FP8; 0: its way back is in 16 bits."""

    @property
    def attended_in_ram(self) -> int:
        """Layers of which more than the input is there."""
        return sum(self.keep[index] > Keep.INPUT for index in self.in_ram)

    @property
    def ram_bytes(self) -> int:
        """What layers keep in RAM."""
        return sum(self.ram_sizes)

    @property
    def locked_bytes(self) -> int:
        """Of RAM, for all of it."""
        return self.ram_bytes + self.streamed_bytes + self.embedding_bytes


@dataclass(frozen=True)
class _Shape:
    """What the cost model knows of a model and a micro-batch."""

    layers: Sequence[LayerComputation]
    tokens: int
    vocabulary: int
    ways: Mapping[ScoresKind, Way]
    per_layer: PerLayerComputation | None = None
    stored: Sequence[int] = ()
    """Bytes of each layer's frozen weights as they lie; none: they stay where they are."""
    embedding: int = 0
    """Bytes of the embedding; 0: it stays where it is."""
    sharing: int = 1
    """Ranks that have weights in RAM in common."""
    lowest: int = 0
    """The first layer that has a backward; those below keep nothing."""
    longest: int = 0
    """Tokens in the longest document."""
    turned_head: int = 0
    """Bytes of the head's transpose, if its way back may be in FP8."""

    def part(self, nbytes: int) -> int:
        """Of weights' bytes in RAM this rank's part."""
        return -(-nbytes // self.sharing)

    @cached_property
    def kinds(self) -> list[tuple[LayerComputation, list[int]]]:
        """A layer of each kind, and the places of all of its kind."""
        found: dict[object, tuple[LayerComputation, list[int]]] = {}
        for index, layer in enumerate(self.layers):
            found.setdefault(layer.kind, (layer, []))[1].append(index)
        return list(found.values())

    @cached_property
    def weights(self) -> list[int]:
        """Bytes of each layer's weights as they are multiplied; in FP8 without their transposes."""
        return self._by_layer(lambda layer: sum(block.weight_bytes for block in layer.blocks))

    @cached_property
    def turned(self) -> list[int]:
        """Bytes of each layer's transposes."""
        return self._by_layer(lambda layer: sum(block.turned_bytes for block in layer.blocks))

    @cached_property
    def spared(self) -> int:
        """What all layers' weights in FP8 take less than in the compute dtype, without their transposes."""
        return sum(self._by_layer(lambda layer: sum(block.spared_bytes for block in layer.blocks)))

    @cached_property
    def spare(self) -> float:
        """Of that what transposes may take, so that all weights in FP8 take no more than in 16 bits.

        Those that are all held there need no buffer.
        """
        in_16_bits = sum(self.weights) + self.spared
        return self.spared - self.scratch(len(self.layers)) - _ROUNDED_UP * in_16_bits

    @cached_property
    def attended(self) -> list[float]:
        """Seconds of each layer's attention forward, for so much as a plan has an eye on it: of long documents."""
        return [self._attended(layer) for layer in self.layers]

    def _attended(self, layer: LayerComputation) -> float:
        part = layer.layer.attention
        if part is None:
            return 0.0
        window = min(part.window or self.longest, self.longest)
        keys = window - window * window / (2 * self.longest)  # that a query sees, on average
        seconds = 4.0 * part.heads * part.head_dim * keys / _ATTENDED
        aside = _ASIDE * 2.0 * sum(block.products for block in layer.blocks) / _FLOPS
        return self.tokens * max(0.0, seconds - aside)

    def scratch(self, kept_weights: int = 0) -> int:
        """Bytes of the buffers that weights are made anew in, one for each shape; the first layers' are kept."""
        shapes: dict[tuple[int, ...], int] = {}
        for layer, places in self.kinds:
            for block in layer.blocks:
                # What is multiplied in FP8 is evaluated in 16 bits.
                if places[-1] >= kept_weights or block.turned_bytes:
                    shapes |= block.scratch
        return sum(shapes.values())

    def _by_layer(self, size: Callable[[LayerComputation], int]) -> list[int]:
        sizes = [0] * len(self.layers)
        for layer, places in self.kinds:
            value = size(layer)
            for place in places:
                sizes[place] = value
        return sizes

    def memory(self, plan: MemoryPlan) -> Memory:
        """What blocks are asked about."""
        return Memory(plan.part_tokens, plan.mlp_tokens, self.ways, plan.padded_room, plan.sparing)

    def seconds(self, plan: MemoryPlan) -> float:
        """What plans are compared by: time that they add to a forward and a backward that keep everything."""
        again = (seconds for seconds, level in zip(self.attended, plan.keep, strict=True) if level < Keep.ATTENDED)
        added = self.added(plan)
        return added + self._waited(plan, added) + sum(again)

    def added(self, plan: MemoryPlan) -> float:
        """Of that time all but attention over long documents, copies and launches."""
        # Attention's own products and the elementwise passes are about an eighth of the projections' time.
        extra = {Keep.INPUT: 1.25, Keep.ATTENDED: 1.1, Keep.ATTENTION: 1.1, Keep.GATES: 1.0, Keep.ALL: 1.0}
        seconds = 2.0 * self.tokens / _FLOPS
        parts, memory = -(-self.tokens // plan.part_tokens), self.memory(plan)
        computed = unpacked = 0.0
        for layer, places in self.kinds:
            products = sum(block.products for block in layer.blocks)
            weights, turned = self.weights[places[0]], self.turned[places[0]]
            for level, count in Counter(plan.keep[place] for place in places).items():
                again = sum(block.products_again(level) for block in layer.blocks)
                computed += count * seconds * (again * extra[level] + products * 0.01 * (level < Keep.ALL))
            for place in places:
                uses = 2 + (plan.keep[place] < Keep.ATTENTION) + (plan.keep[place] < Keep.GATES)
                made = (uses * weights - turned) * (place >= plan.kept_weights) + turned * (place >= plan.kept_turned)
                unpacked += parts * made / _DEQUANTIZED / 1.5
            filling = sum(block.products / block.rows(memory) for block in layer.blocks)
            computed += 2 * seconds * len(places) * _FILL * filling
        head = self.vocabulary * self.layers[0].hidden
        computed += 2 * seconds * head * _FILL / min(plan.head_tokens, plan.part_tokens)
        computed += 0.5 * seconds * head * (self.turned_head > plan.turned_head)  # of one product, what FP8 spares
        return computed + unpacked

    def _waited(self, plan: MemoryPlan, added: float) -> float:
        """For copies from and to RAM that products don't hide, and for launches without a graph."""
        copied, parts = 0.0, -(-self.tokens // plan.part_tokens)
        device = 4.0 * self.tokens / _FLOPS * sum(block.products for layer in self.layers for block in layer.blocks)
        if plan.in_ram:
            # A copy runs beside the layer's own work.
            work = (device / 2 + sum(self.attended)) / parts / len(self.layers)
            copies = (size / _LINK for size in plan.ram_sizes)
            copied += parts * 2 * sum(max(0.02 * copy, copy - work) for copy in copies)
        if plan.streamed:
            # Both ways; the layers are spread, so that a copy has those before it to run beside.
            copy, work = plan.streamed_bytes / _LINK, device / 2 / parts
            copied += parts * 2 * max(0.02 * copy, copy - work)
        if plan.embedding_bytes:
            copied += self.tokens * self.layers[0].hidden * self.layers[0].dtype.itemsize / _LINK
        unrecorded = plan.in_ram or plan.streamed or ("efficient" in self.ways.values() and not plan.padded_room)
        if unrecorded:  # the device may wait for the host
            copied += max(0.0, parts * len(self.layers) * _LAUNCHES - device - added - copied)
        return copied

    def filled(
        self,
        part_tokens: int,
        mlp_tokens: int,
        head_tokens: int,
        padded_room: int,
        budget: float,
        *,
        sparing: bool = False,
        ram: int = 0,
        aside: Keep = Keep.INPUT,
        embedding: int = 0,
        streamed: int = 0,
    ) -> MemoryPlan:
        """The plan with these sizes that keeps what the budget has room for, and sends away what ``ram`` takes.

        Layers whose input is there may keep up to ``aside`` there. The embedding of so many bytes and the weights of
        ``streamed`` layers go there first, and no layer's are held in the compute dtype beside that.
        """
        stream_from, streamed_bytes, spared = self._streamed(streamed)
        spared += embedding
        budget, ram = budget + spared, ram - self.part(streamed_bytes + embedding)
        count, memory = len(self.layers), Memory(part_tokens, mlp_tokens, self.ways, padded_room, sparing)
        sizes = {
            level: self._by_layer(partial(LayerComputation.kept_bytes, memory=memory, keep=level)) for level in Keep
        }
        for each in sizes.values():
            each[: self.lowest] = [0] * self.lowest
        stream = part_tokens * self.layers[0].hidden * self.layers[0].dtype.itemsize
        away = self._aside(sizes, stream, ram, aside)
        work = max(layer.working_bytes(memory) for layer, _ in self.kinds)
        fixed = max(work, self._head_bytes(part_tokens, head_tokens)) + self.scratch()
        if self.per_layer is not None:
            fixed = max(fixed, self.per_layer.working_bytes(memory)) + self.per_layer.kept_bytes(memory)
        beside = {index: sizes[level][index] - sizes[Keep.INPUT][index] + stream for index, level in away.items()}
        fixed += max(beside.values(), default=0)  # on its way
        keep = [Keep.ALL if index < self.lowest else away.get(index, Keep.INPUT) for index in range(count)]
        held = [size - stream * (index in away) for index, size in enumerate(sizes[Keep.INPUT])]
        room = budget - fixed - sum(held)
        # A byte of it spares more time than one of anything else.
        turned_head = self.turned_head if self.turned_head <= min(room, self.spare) else 0
        room -= turned_head

        def raise_layers(level: Keep, least: Keep) -> None:
            nonlocal room
            # The last layers' backward comes first, so what they keep is given back soonest.
            for index in reversed(range(count)):
                cost = sizes[level][index] - held[index]
                pays = level > Keep.ATTENDED or self.attended[index] > 0
                if pays and least <= keep[index] < level and cost <= room:
                    keep[index], held[index] = level, sizes[level][index]
                    room -= cost
                    beside.pop(index, None)

        raise_layers(Keep.ATTENDED, Keep.INPUT)
        raise_layers(Keep.ATTENTION, Keep.INPUT)
        kept_weights = 0
        while not streamed and kept_weights < count and self.weights[kept_weights] <= max(0.0, room):
            room -= self.weights[kept_weights]
            kept_weights += 1
        raise_layers(Keep.GATES, Keep.ATTENTION)
        raise_layers(Keep.ALL, Keep.GATES)
        kept_turned = self._kept_turned(kept_weights, min(room, self.spare - turned_head))
        weights = sum(self.weights[:kept_weights]) + sum(self.turned[:kept_turned]) + turned_head
        head, scratch = self._head_bytes(part_tokens, head_tokens), self.scratch(kept_weights)
        # Below the lowest adapter nothing is kept, but what goes through there is.
        layers = self._peak(memory, sizes, keep, held, beside) + stream * (self.lowest > 0)
        nbytes = max(layers, sum(held) + head) + weights + scratch
        # Of what a graph has taken the head gets nothing, but for the pair that it reads there.
        apart = min(layers - sum(held), head) - 2 * stream
        if self.per_layer is not None:
            begun = self.per_layer.working_bytes(memory) + scratch + weights
            nbytes = max(nbytes, begun) + self.per_layer.kept_bytes(memory)
        return MemoryPlan(
            tuple(keep), kept_weights, part_tokens, mlp_tokens, head_tokens, padded_room, nbytes - spared,
            tuple(beside), tuple(beside.values()), sum(beside.values()) - len(beside) * stream, sparing,
            sum(held) + weights, stream_from, streamed_bytes, embedding, spared,
            apart_bytes=0 if beside or streamed else max(0, apart), kept_turned=kept_turned,
            turned_head=turned_head,
        )  # fmt: skip

    def _kept_turned(self, kept_weights: int, room: float) -> int:
        """Of so many layers that hold their weights, how many hold their transposes too, if they have any."""
        return sum(size <= room for size in itertools.accumulate(self.turned[:kept_weights]))

    def _aside(self, sizes: Mapping[Keep, list[int]], stream: int, ram: int, most: Keep) -> dict[int, Keep]:
        """The layers of which there is room in RAM for what they keep, each with how much that is."""
        # The last layer's backward comes at once. Those before it are needed the latest, the first of all.
        numbers = range(self.lowest, max(self.lowest, min(len(self.layers) - 1, self.lowest + ram // stream)))
        found, ram = dict.fromkeys(numbers, Keep.INPUT), ram - len(numbers) * stream
        for number in numbers:
            cost = sizes[most][number] - sizes[Keep.INPUT][number]
            if self.attended[number] and cost <= ram:
                found[number], ram = most, ram - cost
        return found

    def _streamed(self, count: int) -> tuple[tuple[int, ...], int, int]:
        """So many layers, spread evenly; the bytes of their weights; what the device holds less for them."""
        layers = len(self.stored)
        numbers = tuple(index for index in range(layers) if (index + 1) * count // layers > index * count // layers)
        sizes = [self.stored[number] for number in numbers]
        return numbers, sum(sizes), sum(sizes) - _STAGED * max(sizes, default=0)

    def fewest_streamed(self, lacking: float) -> int:
        """How many layers have to be streamed for so many bytes more; all, if that isn't enough."""
        counts = range(_STAGED + 1, len(self.stored) + 1)
        return next((count for count in counts if self._streamed(count)[2] >= lacking), len(self.stored))

    def streaming(
        self, sizes: Iterable[tuple[int, int, int, int]], budget: float, ram: int, levels: Sequence[Keep]
    ) -> list[MemoryPlan]:
        """Plans that stream as few layers as fit, and all of them: what is spared may keep more.

        Args:
            sizes: Of a part, and of the chunks within it.
            budget: As :func:`plan_memory` has it.
            ram: As :func:`plan_memory` has it.
            levels: What layers may keep in RAM.
        """
        plans: list[MemoryPlan] = []
        beside, counts = self.embedding, range(1, len(self.stored) + 1)
        fitting = {count for count in counts if self.part(self._streamed(count)[1] + beside) <= ram}
        for size in sizes if len(fitting) > _STAGED else ():
            for sparing, level in ((False, None), (True, None), *((True, level) for level in levels)):
                make = partial(self.filled, *size, sparing=sparing, embedding=beside, aside=level or Keep.INPUT)
                least = make(0.0, ram=self.part(beside) if level is None else ram)
                for count in {self.fewest_streamed(least.nbytes - budget), max(fitting)} & fitting:
                    most = self.part(self._streamed(count)[1] + beside) if level is None else ram
                    plans.append(make(budget, ram=most, streamed=count))
        return plans

    def _peak(
        self,
        memory: Memory,
        sizes: Mapping[Keep, Sequence[int]],
        keep: Sequence[Keep],
        held: Sequence[int],
        beside: Mapping[int, int],
    ) -> int:
        """The most that a step takes at once besides at the head: in a layer's backward, when later ones' is given
        back.
        """
        stream = memory.tokens * self.layers[0].hidden * self.layers[0].dtype.itemsize
        work = self._by_layer(partial(LayerComputation.working_bytes, memory=memory))
        below = most = sum(held)
        for index in range(len(self.layers) - 1, self.lowest - 1, -1):
            # What a layer has kept isn't made again; what comes from RAM is counted there.
            there = sizes[min(keep[index], Keep.ATTENTION)][index]
            if keep[index] < Keep.ATTENTION:
                there -= sizes[Keep.INPUT][index] - stream
            there *= index not in beside
            most = max(most, below + work[index] - there + beside.get(index - 1, 0))
            below -= held[index]
        return most

    def _head_bytes(self, tokens: int, head_tokens: int) -> int:
        # Logits; of their tokens the pair, its sum, and what is normalised; for all tokens the pair and its gradient.
        layer, chunk = self.layers[0], min(head_tokens, tokens)
        return (chunk * (self.vocabulary + 4 * layer.hidden) + 3 * tokens * layer.hidden) * layer.dtype.itemsize


def _sizes(tokens: int, longest: int, padded: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Parts of 1, 1/2, 1/4, … of the documents, and chunks within them: (part, MLP, head, attention's) tokens."""
    documents = max(1, tokens // longest)
    parts = {tokens} | {max(1, documents >> shift) * longest for shift in range(1, 12)}
    for part in parts:
        for chunk in _CHUNKS:
            for head in _HEAD_CHUNKS:
                for padded_room in padded:
                    yield min(part, tokens), min(chunk, part), head, padded_room


def plan_memory(
    layers: Sequence[LayerComputation],
    tokens: int,
    vocabulary: int,
    budget: float = math.inf,
    *,
    longest: int | None = None,
    ways: Mapping[ScoresKind, Way],
    per_layer: PerLayerComputation | None = None,
    ram: int = 0,
    stored: Sequence[int] = (),
    embedding: int = 0,
    sharing: int = 1,
    lowest: int = 0,
    lavish: bool = True,
    turned_head: int = 0,
) -> MemoryPlan:
    """The fastest plan within ``budget`` bytes, the model itself not counted; the smallest one if none fits.

    Args:
        layers: The fused layers.
        tokens: Tokens in a micro-batch.
        vocabulary: Rows of the head.
        budget: Bytes for everything but the model's own tensors.
        longest: Tokens in the longest document; a part can't be smaller.
        ways: How each kind of attention is computed.
        per_layer: What makes the layers' inputs beside the stream.
        ram: Bytes of RAM that layers' inputs and weights may take, where nothing fits without; of several ranks that
            have weights there in common, each rank's part.
        stored: Bytes of each layer's frozen weights as they lie on the device; none: they stay there.
        embedding: Bytes of the embedding, if that may go to RAM too: a tied one is the head.
        sharing: Ranks that have weights there in common.
        lowest: The first layer that has a backward.
        lavish: Whether RAM may be taken where that only spares time, too.
        turned_head: Bytes of the head's transpose in FP8; 0: its way back is to be in 16 bits.
    """
    longest = min(tokens, longest or tokens)
    embedding = embedding if -(-embedding // sharing) <= ram else 0
    shape = _Shape(
        layers, tokens, vocabulary, ways, per_layer, stored, embedding, sharing, lowest, longest, turned_head
    )
    attentions = [layer.layer.attention for layer in layers]
    widest = max((part.heads * part.head_dim for part in attentions if part is not None), default=1)
    padded = (_SUMS // (4 * widest), 0) if "efficient" in ways.values() else (0,)
    sizes = dict.fromkeys(_sizes(tokens, longest, padded))
    plans: list[MemoryPlan] = []
    long, spared = any(shape.attended), (True,)
    # What sparing leaves room for is worth more than it costs where attention is.
    means = (
        ((False, True) if long else (False,), 0, 0),
        (spared, 0, 0),
        (spared, 0, embedding),
        (spared, ram, embedding),
    )
    levels = _ASIDES if lavish and long else _ASIDES[:1]
    for sparing, room, beside in dict.fromkeys(means):
        most = max(room, shape.part(beside))
        plans = [
            shape.filled(*size, budget, sparing=way, ram=most, embedding=beside, aside=level)
            for way, level in itertools.product(sparing, levels if room else _ASIDES[:1])
            for size in sizes
        ]
        fitting = [plan for plan in plans if plan.nbytes <= budget]
        if fitting:
            break
    else:
        plans += shape.streaming(sizes, budget, ram, levels)
        fitting = [plan for plan in plans if plan.nbytes <= budget]
    # What graphs and head can't give each other has to be there too, within what allocators leave free anyway.
    apart = [plan for plan in fitting if plan.nbytes + plan.apart_bytes <= _ROUGHLY * budget]
    return min(apart or fitting, key=shape.seconds) if fitting else min(plans, key=lambda plan: plan.nbytes)
