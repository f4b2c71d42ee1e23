"""The proof, before the first step, that a model keeps the documents of a micro-batch apart; else they go unpacked.

A few short documents go through the model as training computes it. Then the same documents go through once more,
placed otherwise: those of one length change places, the others keep theirs and get other neighbours. A document's
logits must not change by more than they do when the same pack is computed twice. What that catches: attention over
other documents, states and convolutions that run on from one to the next (they show in documents of one, two and three
tokens), positions that count through the pack. What it doesn't mistake for it: all documents are the same ones, so a
mixture of experts has the same tokens to compute, and its routers are asked the same; against a document computed
alone, or beside other ones, rounding alone could send a token to another expert.

Then two of them go through the model alone, as in use: most of their tokens must say what they say in the pack.

Rows are proven likewise: the same rows in another order, and with other tokens in their padding. If rows touch each
other too, documents go through the model one at a time.

What a few short documents can't show is read off the config: a rotation that a long document of a micro-batch changes
for the short ones (:func:`slimtune.families.rotation.turns_anew`).

For a harness::

    found = find_layout(model)      # model: loaded, wrapped or not; nothing of it is changed
    found.layout.kind               # "packed", "padded" or "alone"; found.layout computes (slimtune.training.layout)
    found.reasons                   # {"packed": what was seen, …} for each kind that was tried and isn't right
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from slimtune.base.computes import ROUNDING, differ
from slimtune.base.load import torch_dtype
from slimtune.batch import MicroBatch
from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.families.rotation import turns_anew
from slimtune.plan import Choice
from slimtune.training.layout import Kind, Layout
from slimtune.training.packs import CannotPack, PackMask
from slimtune.training.rng import rng_preserved

__all__ = ["Isolation", "find_layout", "lay_out"]

MOVING, STAYING = 5, (1, 2, 3, 70)
"""Tokens of the documents that change places, and of those that keep theirs, one after each of the former."""
ROWS = (40, 1, 2, 3, 24)
"""Tokens of the documents that rows are proven by, the longest first."""
WIDER = 16
"""Tokens that the rows are padded by, once."""
SEEN_WHOLE = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "linear_attention", "mamba", "recurrent",
     "conv", "hybrid", "hybrid_sliding", "moe", "mlp", "dense", "sparse"}
)  # fmt: skip
"""Layer types whose mixing shows in a few dozen tokens. Others compress or choose among far more tokens than that."""
NOISE = 2.0
"""So many times what a repeat changes may be noise too."""
_FAILURES = (CannotPack, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError)
"""What a model may raise that wasn't written for packs; out of memory is none of it."""

Documents = list[Tensor]


@dataclass(frozen=True)
class Isolation:
    """What was found."""

    layout: Layout
    """How micro-batches go through the model."""
    reasons: dict[str, str] = field(default_factory=dict)
    """What was seen of each kind that isn't right for it, in words."""


def find_layout(
    model: nn.Module,
    kinds: Sequence[Kind] = ("packed", "padded", "alone"),
    *,
    dtype: torch.dtype = torch.float32,
    longest: int | None = None,
) -> Isolation:
    """The first of ``kinds`` that keeps documents apart in ``model``; ``alone`` needs no proof.

    A few hundred tokens go through the model in training mode, without gradients. Random generators, the model's mode
    and its parameters are afterwards what they were.

    Args:
        model: Loaded; wrapped by PEFT or not.
        kinds: What to try, in this order; the last one is taken if nothing is right, with its reason.
        dtype: What training computes in; on CUDA 16 bits mean autocast.
        longest: Most tokens of a document; any number unless given.
    """
    reasons: dict[str, str] = {}
    layout = Layout(model, kinds[-1])
    with rng_preserved(), torch.no_grad(), _in_training(model), _computing(model, dtype):
        for kind in kinds:
            layout, reason = _tried(model, kind, dtype, longest)
            if reason is None:
                break
            reasons[kind] = reason
    return Isolation(layout, reasons)


def lay_out(config: Config, model: nn.Module, *, fused: bool) -> tuple[Layout | None, list[Choice]]:
    """How this run's micro-batches go through ``model``, and the choice to record; None if the engine computes them.

    Args:
        config: ``layout`` may be auto; the compute dtype is decided.
        model: Loaded, before or after it is wrapped: adapters compute token by token.
        fused: The engine runs the steps.

    Raises:
        UserError: The layout that was asked for isn't right for this model.
    """
    asked = config.layout
    if fused:
        chosen = Choice("layout", "packed" if config.packing else "padded", "the engine computes documents by length")
        return None, [chosen] if asked == "auto" else []
    if asked != "auto":
        kinds: tuple[Kind, ...] = (asked,)
    elif config.packing:
        kinds = ("packed", "padded", "alone")
    else:
        kinds = ("padded", "alone") if config.micro_batch > 1 else ("alone",)
    found = find_layout(model, kinds, dtype=torch_dtype(config.compute_dtype), longest=config.max_length)
    if asked != "auto":
        if found.reasons:
            raise UserError(
                f"layout: {asked} is not right for this model: {found.reasons[asked]}",
                rule="Documents of a micro-batch must not see each other.",
                way_out="Leave layout at auto: it takes what is right.",
            )
        return found.layout, []
    why = "; ".join(dict.fromkeys(found.reasons.values()))
    if not why:
        why = "a document's logits don't change with what is beside it" if kinds[0] != "alone" else "one at a time"
    return found.layout, [Choice("layout", found.layout.kind, why)]


def _tried(model: Any, kind: Kind, dtype: torch.dtype, longest: int | None) -> tuple[Layout, str | None]:
    """The layout, and what speaks against it."""
    if kind == "alone":
        return Layout(model, kind), None
    turns = turns_anew(model.config.get_text_config())
    if turns is not None and (longest is None or longest > turns):
        return Layout(model, kind), f"a document of more than {turns:,} tokens changes the rotation of those beside it"
    prove = _packed if kind == "packed" else _padded
    ways = [Layout(model, kind), Layout(model, kind, boundaries=False)][: 2 if kind == "packed" else 1]
    reason = ""
    unseen = sorted(set(_layer_types(model)) - SEEN_WHOLE) if kind == "packed" else []
    if unseen:
        return ways[0], f"what layers of the type {unseen[0]} mix doesn't show in a few tokens"
    for layout in ways:
        try:
            found = prove(model, layout, dtype)
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            found = _said(error)
        if found is None:
            return layout, None
        reason = reason or found
    return ways[0], reason


def _layer_types(model: Any) -> list[str]:
    return list(getattr(model.config.get_text_config(), "layer_types", None) or [])


def _said(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
    return "its attention isn't called through Transformers' interface" if PackMask.__name__ in text else text


# -- packs ------------------------------------------------------------------------------------------------------------


def _packed(model: nn.Module, layout: Layout, dtype: torch.dtype) -> str | None:
    moving = _draw(model, [MOVING] * len(STAYING), 1)
    staying = _draw(model, STAYING, 2)

    def logits(order: list[int]) -> Documents:
        """The logits of the moving documents in their own order, then of the others."""
        documents = [one for at, other in zip(order, staying, strict=True) for one in (moving[at], other)]
        made = _logits(model, layout, _batch(documents, padded=False))[0]
        parts = torch.split(made, [len(document) for document in documents])
        return [parts[2 * order.index(at)] for at in range(len(moving))] + list(parts[1::2])

    first = list(range(len(moving)))
    one, moved = logits(first), logits([*first[1:], 0])
    seen = _compared(one, logits(first), moved, dtype, "a document's logits change with its neighbours in a pack")
    if seen is not None:
        return seen
    # Kept apart, and yet otherwise than alone: Kosmos-2.5 counts positions from 2, and takes the pack's as they are.
    rows = Layout(model, "padded")
    alone = [_logits(model, rows, _batch([document], padded=True))[0] for document in (moving[0], staying[-1])]
    if differ([one[0], one[-1]], alone, dtype, most=False):
        return "a document's logits in a pack are not those of the document alone"
    return None


# -- rows -------------------------------------------------------------------------------------------------------------


def _padded(model: nn.Module, layout: Layout, dtype: torch.dtype) -> str | None:
    documents = _draw(model, ROWS, 1)

    def logits(order: list[int], filling: Tensor) -> Documents:
        """The logits of the documents in their own order, whatever their rows'; rows are as long as the filling."""
        batch = _batch([documents[at] for at in order], padded=True)
        missing = (0, len(filling) - max(ROWS))
        batch["attention_mask"] = functional.pad(batch["attention_mask"], missing)
        padded = functional.pad(batch["input_ids"], missing)
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, filling, padded)
        made = _logits(model, layout, batch)
        return [made[order.index(at), : len(documents[at])] for at in range(len(documents))]

    first = list(range(len(documents)))
    some, others = (_draw(model, [length], seed)[0] for seed, length in ((3, max(ROWS)), (4, max(ROWS) + WIDER)))
    one, moved = logits(first, some), logits(first[::-1], some)
    seen = _compared(one, logits(first, some), moved, dtype, "a row's logits change with the other rows")
    if seen is not None:
        return seen
    return "a row's logits change with its padding" if differ(one, logits(first, others), dtype) else None


# -- both -------------------------------------------------------------------------------------------------------------


def _compared(one: Documents, again: Documents, moved: Documents, dtype: torch.dtype, what: str) -> str | None:
    """What was seen if documents change more from one order to another than from one time to the next."""
    scale = max(float(x.abs().max()) for x in one)
    noise, change = _change(one, again), _change(one, moved)
    if change <= NOISE * noise + ROUNDING[dtype] * scale:
        return None
    return f"{what} by {change / max(scale, 1e-30):.2g} of the largest"


def _change(some: Documents, others: Documents) -> float:
    """The largest; infinite if a logit is no number."""
    largest = max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))
    return largest if largest == largest else float("inf")


def _logits(model: nn.Module, layout: Layout, batch: dict[str, Any]) -> Tensor:
    """float32 on the host, [rows, tokens, vocabulary]."""
    device = next(model.parameters()).device
    torch.manual_seed(0)  # for what else is drawn, as some routers' jitter
    with layout.passed(batch) as passed, _NoDropout():
        inputs = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in passed.items()
            if key != "labels"
        }
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits.float().cpu()


def _batch(documents: Documents, *, padded: bool) -> dict[str, Any]:
    ids = torch.cat(documents).numpy()
    return MicroBatch(ids, ids.copy(), tuple(len(document) for document in documents), padded=padded).inputs()


def _draw(model: Any, lengths: Sequence[int], seed: int) -> Documents:
    """Documents of random tokens, none of them one that the config gives a meaning (an image's place)."""
    vocabulary = model.get_input_embeddings().num_embeddings
    special = set(_special(model.config.to_dict()))
    plain = torch.tensor([token for token in range(min(vocabulary, 4096)) if token not in special])
    draw = torch.Generator().manual_seed(seed)
    return [plain[torch.randint(len(plain), (length,), generator=draw)] for length in lengths]


def _special(config: dict[Any, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif str(key).endswith(("token_id", "token_index")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


class _NoDropout(TorchFunctionMode):
    """Dropout lets everything through, in a model that is in training mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.dropout:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        return func(*args, **kwargs)


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Training mode for the body; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _computing(model: nn.Module, dtype: torch.dtype) -> Any:
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype) if device == "cuda" and dtype != torch.float32 else nullcontext()
