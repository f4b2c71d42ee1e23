"""The step's proof: the loss that trains is the model's own, and every adapter gets a gradient.

Before the first step a short document goes through the loaded model twice, dropout off: by what training computes
(TRL's head; or the engine, with other documents beside it in a pack), and by the model's own logits (and, with the
engine, its backward too: :mod:`slimtune.training.proof_of_gradients`). TRL's head multiplies the last hidden state by
the head's weight and knows the scalings of some families; where the two losses differ, or what they say of single
tokens (a soft cap hardly moves the mean), or TRL's head can't take the model, the model's own logits train it. Where
the engine's differs, over several documents, it is refused (:class:`slimtune.engine.structure.CannotFuse`), and the
recipe begins again on the plain stack.

After the first accumulation window every adapter's B must have a gradient (A's is zero as long as B is). One that has
none does nothing: it sits where text doesn't pass, or in an expert that no token was sent to yet.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slimtune.base.computes import CANT_TAKE, cant_compute, check_computes
from slimtune.batch import IGNORED, MicroBatch
from slimtune.engine.structure import CannotFuse
from slimtune.errors import UserError
from slimtune.training.plain import own_loss
from slimtune.training.rng import rng_preserved

__all__ = ["LOOK_AGAIN", "Tokens", "beside_others", "is_expert", "named", "prove_loss", "text_of", "without_gradient"]

Tokens = npt.NDArray[np.integer[Any]]
"""[S]."""
LOOK_AGAIN = 20
"""Optimizer steps after which an adapter that had no gradient in the first one is reported: experts take turns."""
_TOKENS = 64
_ENGINES = 100
"""Tokens for the engine, which computes states by chunks of 64: a document that begins within one and crosses more."""
_BESIDE = (37, 1, 22)
"""Tokens of the documents in its pack, the last one behind it: 160 in all, as kernels that are compiled for a multiple
of 16 are those that packs get, and another count would have them compiled twice."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Nats, or share of the loss if that is over 1: what rounding leaves in a mean over 64 tokens, by the compute dtype."""
_HEAD_TOLERANCE = {torch.float32: 2**-16, torch.float64: 2**-16, torch.bfloat16: 2**-6, torch.float16: 2**-8}
"""Share of the largest logit that a token's log-probability may be off on average, by one head and another: a few
roundings of 16 bits, as autocast may be on for the one alone; in 32 bits the order of a few thousand terms."""


def prove_loss(trainer: Any, texts: Sequence[Tokens], dtype: torch.dtype, room: int, longest: int) -> str | None:
    """Compare the loss that trains with the model's own; if they differ, the model's own head trains.

    Without an engine one document is looked at. With one, others as long as the mean of all so far isn't the model's
    own: in 16 bits rounding moves a single document's loss, one way or the other, and a kernel that is wrong moves all.
    Nothing of it shows afterwards: no random number is drawn, no gradient made, no metric kept.

    Args:
        trainer: A :class:`slimtune.training.fused.FusedTrainer` that is ready to train; its ``own_head`` is set.
        texts: Documents; the first few tokens of each are taken, all supervised.
        dtype: The compute dtype.
        room: Tokens that a micro-batch may hold.
        longest: Tokens that a document may have.

    Returns:
        Why the model's own head is used; None if it needn't be.

    Raises:
        UserError: The model can't compute a loss at all, or has no auxiliary loss and is asked for it.
        CannotFuse: The engine's loss isn't the model's own, or it can't take the model.
    """
    first, model, training = texts[0], trainer.model, trainer.model.training
    model.eval()
    try:
        with rng_preserved(), torch.no_grad():
            text = text_of(first, min(_TOKENS, len(first)) if trainer.engine is None else min(room, longest))
            with model.disable_adapter():  # the base, as it is read back and used
                check_computes(model, torch.from_numpy(text)[None], dtype)
            if trainer.engine is None:
                return _prove_head(trainer, text, dtype)
            _prove_engine(trainer, [text_of(tokens, min(room, longest)) for tokens in texts], room, dtype)
            return None
    finally:
        trainer._metrics["eval"].clear()
        model.train(training)


def text_of(tokens: Tokens, most: int) -> npt.NDArray[np.int64]:
    """A document of ``most`` tokens, a hundred at most: the first of ``tokens``, over and over if there are fewer."""
    return np.resize(tokens, min(_ENGINES, most)).astype(np.int64)


def beside_others(ids: npt.NDArray[np.int64], room: int) -> dict[str, Any]:
    """The document in a pack with others before it and one behind, which supervise nothing.

    A loss or a gradient that is the document's own there says that the engine keeps documents apart.
    """
    left, parts = (room - len(ids)) // 2, []
    for length in _BESIDE:
        parts.append(np.resize(ids[::-1], max(0, min(length, left))))
        left -= len(parts[-1])
    before, between, behind = parts
    parts = [part for part in (before, between, ids, behind) if len(part)]
    supervised = np.concatenate([part if part is ids else np.full_like(part, IGNORED) for part in parts])
    supervised[len(before) + len(between)] = IGNORED
    return MicroBatch(np.concatenate(parts), supervised, tuple(map(len, parts)), padded=False).inputs()


def _prove_engine(trainer: Any, texts: Sequence[npt.NDArray[np.int64]], room: int, dtype: torch.dtype) -> None:
    pairs: list[tuple[float, float]] = []
    for text in texts:
        own = _own(trainer, _alone(text), dtype)
        try:
            total, supervised = trainer.evaluation_sum(trainer.model, beside_others(text, room))
        except torch.OutOfMemoryError:
            raise
        except CANT_TAKE as error:
            said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise _unfit(f"the engine can't compute a document in a pack ({said})") from error
        pairs.append((float(total) / supervised, own))
        trains, own = map(fmean, zip(*pairs, strict=True))
        if _same(trains, own, dtype):
            return
    raise _unfit(f"the engine's loss on a document in a pack is {trains:.4f}, and the model's own {own:.4f}")


def _prove_head(trainer: Any, text: npt.NDArray[np.int64], dtype: torch.dtype) -> str | None:
    batch = _alone(text)
    with _outputs(trainer.model) as outputs:
        own = _own(trainer, batch, dtype)
        if trainer.aux_loss_enabled:
            trainer.own_head = True
            return "the model's own head, which tells the routers' auxiliary loss too"
        try:
            total, supervised = trainer.evaluation_sum(trainer.model, dict(batch))
        except torch.OutOfMemoryError:
            raise
        except CANT_TAKE as error:
            trainer.own_head = True
            return (
                f"the model's own head, as TRL's can't take it ({type(error).__name__}: {str(error).splitlines()[0]})"
            )
    trains = float(total) / supervised
    off, allowed = _off(outputs[0].logits, outputs[-1].log_probs, batch["input_ids"], _HEAD_TOLERANCE[dtype])
    same = _same(trains, own, dtype)
    if same and off <= allowed:
        return None
    trainer.own_head = True
    return (
        f"the model's own head: TRL's gives a loss of {trains:.4g} on a document where the model's is {own:.4g}"
        if not same
        else f"the model's own head: the log-probability of a token is {off:.2g} off by TRL's"
    )


def _same(trains: float, own: float, dtype: torch.dtype) -> bool:
    return abs(trains - own) <= _TOLERANCE[dtype] * max(1.0, own)


def _alone(text: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    ids = torch.from_numpy(text)[None]
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Any]]:
    """What ``model`` gives back while the body runs."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def _off(logits: Tensor, log_probs: Tensor, ids: Tensor, share: float) -> tuple[float, float]:
    """How far log-probabilities are from those of ``logits`` on average, and how far they may be.

    Args:
        logits: [1, S, V].
        log_probs: [1, S - 1], of each token but the first.
        ids: [1, S].
        share: Of the largest logit.
    """
    own = logits[:, :-1].float()
    exact = own.log_softmax(-1).gather(-1, ids[:, 1:, None].to(own.device))[..., 0]
    return float((log_probs - exact).abs().mean()), share * max(1.0, float(own.abs().max()))


def _unfit(what: str) -> CannotFuse:
    return CannotFuse(what, rule="What trains must be the model as it is.", way_out="It trains unfused: engine: plain.")


def _own(trainer: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> float:
    """The mean loss by the model's own logits.

    Raises:
        UserError: It has none.
    """
    inputs = trainer._prepare_inputs(dict(batch))
    try:
        with trainer.compute_loss_context_manager():
            loss, supervised, aux = own_loss(trainer.model, inputs, with_router=trainer.aux_loss_enabled)
    except torch.OutOfMemoryError:
        raise
    except CANT_TAKE as error:
        raise cant_compute(trainer.model, error, dtype) from error
    if trainer.aux_loss_enabled and aux is None:
        raise UserError("router_aux_loss: this model tells no auxiliary loss", way_out="Leave router_aux_loss out.")
    return float(loss) / float(supervised)


def without_gradient(model: nn.Module, among: Collection[str] | None = None) -> tuple[list[str], int]:
    """The adapters that have no gradient after a backward pass. Waits for the device once.

    Args:
        model: Wrapped by PEFT. An adapter is judged by its B (an embedding's by its A, which begins at zero there), a
            module of ``modules_to_save`` by each of its parameters, and experts one by one (PEFT's ``ParamWrapper``
            holds B as [out, r x experts], the expert counting fastest).
        among: Look at these alone.

    Returns:
        (names: of modules, with " expert 3" after it for one of a stack; how many were looked at).
    """
    names: list[str] = []
    norms: list[Tensor] = []
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found = _JUDGED.match(f"{module_name}.{name}")
            if found is None or not parameter.requires_grad:
                continue
            owner = found["owner"].removeprefix("base_model.model.")
            experts = getattr(model.get_submodule(found["owner"]), "num_experts", 1) if found["b"] else 1
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if experts > 1:
                norms.append(gradient.reshape(-1, experts).abs().amax(0))
                names += [f"{owner} expert {expert}" for expert in range(experts)]
            else:
                norms.append(gradient.abs().amax().reshape(1))
                names.append(owner if found["b"] else f"{owner}.{name}")
    if not names:
        return [], 0
    largest = torch.cat([norm.to(norms[0]) for norm in norms]).tolist()
    looked_at = [(name, value) for name, value in zip(names, largest, strict=True) if among is None or name in among]
    return [name for name, value in looked_at if value == 0.0], len(looked_at)


def is_expert(name: str) -> bool:
    """Whether an adapter of :func:`without_gradient` is one of a stack of experts, which take turns."""
    return " expert " in name


_JUDGED = re.compile(r"(?P<owner>.+?)\.(?:(?P<b>lora_B|lora_embedding_A)\.|modules_to_save\.).+")


def named(adapters: Iterable[str]) -> str:
    """Adapters in one line: alike ones together, their numbers left out ("layers.*.mlp.experts expert * × 12")."""
    plain = (name.replace(".base_layer", "") for name in adapters)  # PEFT wraps two stacks of a module twice
    kinds = Counter(re.sub(r"(?<![^. ])\d+(?![^. ])", "*", name) for name in plain)
    told = [kind if count == 1 else f"{kind} × {count:,}" for kind, count in kinds.most_common(4)]
    return ", ".join(told) + (f" and {len(kinds) - 4} more kinds" if len(kinds) > 4 else "")
