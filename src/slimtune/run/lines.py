"""The lines by which a run says what it found and what it will do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimtune.config import Config
from slimtune.data.packing import FilledBatches, MicroBatches, PackedBatches
from slimtune.run.facts import AdapterFacts, BaseFacts
from slimtune.run.screen import size_text
from slimtune.run.statement import counted, first_names

__all__ = [
    "adapter_line",
    "base_line",
    "data_line",
    "embedding_line",
    "experts_line",
    "in_ram_line",
    "memory_line",
    "packs_line",
    "steps_line",
    "streamed_line",
]


def data_line(facts: Mapping[str, Any]) -> str:
    """What the data is, by the facts of its proof."""
    share = facts["supervised_tokens"] / max(1, facts["tokens"])
    dropped = f", {facts['rows_dropped']:,} dropped" if facts["rows_dropped"] else ""
    held = f", {facts['held_out']['documents']:,} documents held out" if facts.get("held_out") else ", none held out"
    if trained_on := facts.get("eval", {}).get("trained_on"):
        held += f" ({trained_on:,} more left out: trained on too)"
    unread = f"; columns not read: {first_names(facts['unread'])}" if facts.get("unread") else ""
    return f"{facts['rows']:,} rows{dropped}, {facts['tokens']:,} tokens ({share:.0%} supervised){held}{unread}"


def packs_line(data: MicroBatches, config: Config, unpacked: str | None) -> str:
    """How documents fill micro-batches; where they aren't packed, why."""
    together = f"{data.documents.rounds:,} epochs together" if data.documents.rounds > 1 else ""
    if isinstance(data, PackedBatches):
        filled = f"{data.per_epoch:,} of {data.tokens:,} tokens, {data.fill:.1%} full"
    else:
        how = "documents one at a time" if config.layout == "alone" else "padded rows"
        full = f" of up to {data.tokens:,} tokens, {data.fill:.1%} full" if isinstance(data, FilledBatches) else ""
        filled = f"off: {unpacked} → {how}, {counted(data.per_epoch, 'micro-batch', 'es')}{full}"
    return "; ".join(filter(None, (filled, together)))


def steps_line(steps: int, config: Config, *, evaluates: bool) -> str:
    """How long the run is, and how often it is saved and evaluated."""
    of = counted(config.accumulation, "micro-batch", "es")
    length = "" if config.max_steps is not None else f", {counted(config.passes, 'epoch')}"
    evaluation = f"; the held-out loss {_every(config.eval_steps)}" if evaluates else ""
    return f"{counted(steps, 'optimizer step')} of {of}{length}; a checkpoint {_every(config.save_steps)}{evaluation}"


def rehearsed_line(answers: int) -> str:
    """What is told of a rehearsal before its answers are there; of ``answers`` at most."""
    return f"{answers:,} general prompts at most, answered by the base first; steps with them, about"


def _every(steps: int | str) -> str:
    return "after every step" if steps == 1 else f"every {steps} steps"


def base_line(base: BaseFacts) -> str:
    """What the base takes, by its largest parts."""
    parts = ", ".join(f"{part['part']} {size_text(part['bytes_now'])} {part['format']}" for part in base.parts[:4])
    return (
        f"{base.parameters / 1e6:,.1f} M parameters, {size_text(base.bytes_16bit)} in 16 bits → "
        f"{size_text(base.bytes_now)} as loaded ({base.quantization}, {base.compute_dtype}): {parts}"
    )


def in_ram_line(away: int, attended: int, layers: int, nbytes: int) -> str:
    """What of the activations is in RAM, and what that costs: the inputs of some layers, and of some of these what
    attention gave."""
    held, copied = f"{nbytes / 2**30:.2f}", f"{2 * nbytes / 2**30:.2f}"
    if attended:
        return (
            f"the inputs of {away} of {layers} layers wait in RAM for their backward, and of {attended} what attention "
            f"gave ({held}GiB locked): {copied}GiB are copied in a micro-batch of full length, beside the layers' work"
        )
    return (
        f"the inputs of {away} of {layers} layers wait in RAM for their backward ({held}GiB locked): {copied}GiB are "
        "copied in a micro-batch of full length, beside the layers' work"
    )


def embedding_line(nbytes: int) -> str:
    """Where the embedding is."""
    return f"the embedding is in RAM ({nbytes / 2**30:.2f}GiB locked): the GPU reads a row a token there"


def streamed_line(streamed: int, layers: int, nbytes: int) -> str:
    """What of the weights is in RAM, and what that costs."""
    return (
        f"the weights of {streamed} of {layers} layers are in RAM ({nbytes / 2**30:.2f}GiB locked) and come a layer "
        f"ahead: {2 * nbytes / 2**30:.2f}GiB are copied in a micro-batch, beside the layers' work; no CUDA graphs"
    )


def memory_line(parts: Mapping[str, int], budget: str) -> str:
    """What the plan takes of the GPU's memory."""
    each = ", ".join(f"{part} {nbytes / 2**30:.2f}" for part, nbytes in parts.items())
    return f"{sum(parts.values()) / 2**30:.2f}GiB of {budget} planned: {each}"


def adapter_line(adapter: AdapterFacts) -> str:
    """What trains."""
    share = adapter.trainable_parameters / adapter.total_parameters
    weights = adapter.adapted_weights / (adapter.total_parameters - adapter.trainable_parameters)
    return (
        f"{adapter.trainable_parameters:,} parameters train ({share:.2%}) in {sum(adapter.modules.values())} modules: "
        f"{adapter.adapted_layers} of {adapter.layers} layers, {weights:.0%} of the weights"
    )


def experts_line(adapter: AdapterFacts, stacks: int) -> str:
    """What of that is for experts, in this many stacks."""
    return (
        f"{adapter.expert_parameters:,} of these parameters are for all experts, in {stacks} stacks, without dropout; "
        "--targets attention,mlp leaves them out"
    )
