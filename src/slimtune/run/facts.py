"""What a run measured of itself: the material of ``slimtune explain`` and of the report.

Every number here was counted or timed on the run. ``None`` means that it was not measured, and is said so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimtune.errors import UserError, shown

__all__ = [
    "AdapterFacts",
    "BaseFacts",
    "ChoiceFact",
    "Facts",
    "OptimizerFacts",
    "TrainingFacts",
    "VerdictFacts",
    "VerifiedFacts",
    "damage_told",
]


@contextmanager
def damage_told(file: Path) -> Iterator[None]:
    """The body computes from a run's own ``file`` and nothing else: what it fails on there, no run has written.

    Raises:
        UserError: It failed.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        told = shown(f"{type(error).__name__}: {error}", 200)
        raise UserError(
            f"{file} isn't as slimtune wrote it: {told}",
            rule="It is told from, and not repaired.",
            way_out="Copy the run's folder whole, or train again.",
        ) from error


@dataclass
class BaseFacts:
    """Part one of the notes: the base in 4 bits."""

    model: str
    """As the person named it."""
    source: str
    """The folder or hub id that was loaded."""
    class_name: str
    quantization: str
    """nf4, fp4, mxfp4, mxfp4+nf4, or none."""
    double_quant: bool
    compute_dtype: str
    parameters: int
    parts: list[dict[str, Any]]
    """One entry a part (experts, attention, MLP, embedding, …): part, parameters, bytes_16bit, bytes_now, format."""
    bytes_16bit: int
    bytes_now: int
    fingerprint_before: str
    """SHA-256 over the frozen base before training (:func:`slimtune.base.quantize.fingerprint`)."""
    fingerprint_after: str | None = None


@dataclass
class AdapterFacts:
    """Parts two and three: the adapter, and who wrapped the model in it."""

    r: int
    alpha: int
    dropout: float
    targets: list[str]
    class_before: str
    """Class of the model that SFTTrainer was given."""
    class_after: str
    """Class of the model that SFTTrainer made of it."""
    wrapped_by: str
    modules: dict[str, int]
    """Wrapped modules by name: {"q_proj": 30, …}."""
    trainable_parameters: int
    total_parameters: int
    layers: int
    """Decoder layers of the model."""
    adapted_layers: int
    adapted_weights: int
    """Weights of the base in the modules and stacks that carry an adapter."""
    expert_parameters: int
    """Parameters of the adapter that belong to expert stacks."""
    file_bytes: int | None = None
    """Bytes of adapter_model.safetensors."""
    folder_files: list[str] = field(default_factory=list)
    """Everything that was saved in adapter/."""


@dataclass
class OptimizerFacts:
    """Part four: the optimizer."""

    name: str
    """As the config has it."""
    class_name: str
    state_bytes: dict[str, int]
    """Bytes of the optimizer's state by dtype, without step counters."""
    parameters: int
    """Parameters that it updates; fp32 Adam would need 8 bytes for each."""


@dataclass
class TrainingFacts:
    """What the training did."""

    engine: str
    """fused or plain, with the reason if it fell back."""
    repeats: bool
    """Whether the same command gives the same bytes on this machine (:mod:`slimtune.training.determinism`)."""
    steps: int
    epochs: float
    first_loss: float
    last_loss: float
    """Mean of the last tenth of the logged steps."""
    seconds: float
    tokens: int
    """Tokens that went through the model, padding left out."""
    supervised_tokens: int
    tokens_per_second: float
    model_flops_per_second: float | None
    """The model's own work done in a second, forward and backward; nothing that was computed again counts. None where
    the model's modules don't say what its work is."""
    floor_share: float | None
    """The least time that this work can take on this machine, over the time that it took."""
    peak_memory_bytes: int
    memory_kind: str
    """"gpu peak allocated" or "process resident"."""
    ranks: int = 1
    """Processes that trained it together; what is told of memory is rank 0's."""
    ram_layers: int = 0
    """Layers of which what their backward needs waited in RAM for it."""
    ram_bytes: int = 0
    """Of RAM that were locked for them."""
    streamed_layers: int = 0
    """Layers whose weights were in RAM."""
    streamed_bytes: int = 0
    """Of RAM that were locked for them."""
    eval_loss: float | None = None
    own_head: str | None = None
    """Why the loss comes from the model's own head, where TRL's would be taken; None if it needn't."""
    attention: dict[str, bool] = field(default_factory=dict)
    """The engine's kernels for attention that were compared with plain products on the device that trained, and whether
    each was right; one that wasn't computed nothing."""
    without_gradient: list[str] | None = None
    """Adapters that got no gradient in the first steps; None: not looked at."""


@dataclass
class VerifiedFacts:
    """The adapter read back into a fresh base."""

    keys_match: bool
    all_finite: bool
    outputs_differ: bool
    largest_difference: float
    """Largest difference of a logit with the adapter on and off."""


@dataclass
class VerdictFacts:
    """What the run made of the model, on rows that it wasn't trained on (:mod:`slimtune.run.judge`)."""

    outcome: str
    """better, same, worse or unmeasured."""
    documents: int = 0
    """Held-out documents."""
    start: dict[str, float] | None = None
    """Loss of a supervised token before the first step, in nats: value, low, high (95 %)."""
    end: dict[str, float] | None = None
    """Of what was saved; None if it is no number."""
    change: dict[str, float] | None = None
    """End minus start, the same parts of the data resampled on both sides."""
    step: int | None = None
    """The optimizer step that was saved."""
    best_step: int | None = None
    """The one with the lowest held-out loss, of those that were evaluated."""
    best_loss: float | None = None
    advice: str = ""
    """longer, shorter, slower, or nothing."""
    suggestion: str = ""
    """The flag that follows it."""
    answered: int = 0
    """Held-out prompts that were answered before the first step and at the end."""
    stuck: int = 0
    """Replies at the end that are one piece of text over and over (:mod:`slimtune.run.repeats`)."""
    stuck_reply: str = ""
    """The first of them."""
    by_replies: bool = False
    """It is worse by these replies, and not by its loss."""
    general: dict[str, Any] | None = None
    """Of the general questions (:mod:`slimtune.use.forgetting`): questions, before, after (right ones), change of the
    share (value, low, high); None: not asked."""


@dataclass
class ChoiceFact:
    """One value that slimtune chose."""

    key: str
    value: Any
    reason: str


@dataclass
class Facts:
    """All of it."""

    run: str
    created: str
    base: BaseFacts
    adapter: AdapterFacts | None = None
    training: TrainingFacts | None = None
    optimizer: OptimizerFacts | None = None
    verified: VerifiedFacts | None = None
    verdict: VerdictFacts | None = None
    data: dict[str, Any] = field(default_factory=dict)
    """The data proof's summary: rows in, trained, dropped; tokens, supervised; packs and how full they are."""
    choices: list[ChoiceFact] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as ``facts.json`` holds it."""
        return asdict(self)
