"""The engine's backward, proven on the loaded model and on the machine that trains, before the first step.

A document goes through the engine, in a pack with others, and alone through the model as it is, whose gradients are
autograd's. Each B that begins at zero is given small numbers for the while, as its A has no gradient otherwise.
Compared are the adapters of the last layers, so many that each kind of layer is among them: what computes one computes
all of its kind, and autograd keeps little. A compiler that makes something else of a kernel's backward is found here,
whichever kernel it is; in a run the loss would only fall more slowly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.base.computes import CANT_TAKE
from slimtune.base.load import torch_dtype
from slimtune.config import Config
from slimtune.engine import Engine
from slimtune.engine.structure import CannotFuse
from slimtune.errors import UserError
from slimtune.training.plain import own_loss
from slimtune.training.proof import Tokens, beside_others, prove_loss, text_of
from slimtune.training.rng import rng_preserved

__all__ = ["prove_gradients", "prove_precision", "prove_step"]

_B = 0.05
"""Over a root of the rank: what B is filled with."""
_APART = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.6, torch.float16: 0.6}
"""How far the gradients of a kind of matrix may be from autograd's, over their size. Two ways to compute in 16 bits are
0.01 to 0.1 apart, and 0.4 where a router's choice turns; in 32 bits 1e-6 to 1e-4."""
_OFF = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}
"""How far they may be from autograd's size along its direction, where rounding cancels: 0.1 at most in 16 bits."""
_FP8_APART, _FP8_OFF = 1.0, 0.4
"""How far gradients with products in FP8 may be from those in bf16, and along their direction, where rounding cancels.
A rounding to e4m3 is sixteen times bf16's, and so is what all layers make of it: of SmolLM2-135M's size 0.06 to 0.54 on
sixteen documents, up to 0.22 along its direction, by the kernels' references, that is by rounding alone; more where a
short document is said over and over and little gradient is left. What is wrong by less is found in the products."""
_FP8_AGAIN = 0.1
"""How far gradients in FP8 may be from themselves where the MLP's kernels aren't fused: 0 by the same roundings."""
_PRODUCT_APART_FORWARD, _PRODUCT_APART, _PRODUCT_OFF = 0.03, 0.06, 0.01
"""The same of a single product of random numbers, where nothing adds up: two roundings to e4m3 are 0.037 of its size,
0.002 along its direction, and forward 0.003 to 0.017, as most of it is of the channels that are taken nearly exactly.
One that is 2 % too large is found here, and one whose further columns are other channels' (0.05), or none (0.036),
which gradients don't tell from rounding."""
_HEAD_APART, _HEAD_OFF = 0.06, 0.004
"""The same of the gradient through the head: 0.026 to 0.039 of its size, at most 0.002 along its direction. A product
that is 2 % too large is 0.004 to 0.012 along it. Farther off is a head whose rows have over three times as much in
common as of their own (decision 177): it stays in 16 bits."""
_NOISE = 3.0
"""Or so many times what a rounding of the embedding makes of the unfused model's own."""
_FLOOR = {torch.float32: 0.01, torch.float64: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Of the largest kind's size: smaller gradients, as those of decays, are sums that cancel, and are held to this."""


def prove_step(trainer: Any, texts: Sequence[Tokens], config: Config, say: Callable[[str, str], None]) -> str | None:
    """See that what trains is the model's own loss (:func:`slimtune.training.proof.prove_loss`) and gradient.

    Args:
        trainer: Ready to train, with an engine or without one.
        texts: A document, and others for a second and third look.
        config: The run's.
        say: Told what couldn't be had, under a word for it.

    Returns:
        Why the model's own head is used; None if it needn't be.

    Raises:
        UserError: The model can't compute a loss at all.
        CannotFuse: What the engine computes isn't the model's own.
    """
    how = torch_dtype(config.compute_dtype), config.batch_tokens, config.max_length
    for kernel, right in trainer.attention.items():
        if not right:
            say("attention", f"not by {kernel}, which computes something else on this GPU: another kernel is taken")
    own_head = prove_loss(trainer, texts, *how)
    if own_head is not None:
        say("loss", own_head)
    elif trainer.engine is not None and (why := prove_gradients(trainer, texts, *how)) is not None:
        say("gradients", why)
    if trainer.engine is not None and config.precision == "fp8":
        _, room, longest = how
        trainer.engine.choose_channels(trainer.data.batch(0))  # every rank's data begin with the same micro-batch
        trainer.fp8_pack = beside_others(text_of(texts[0], min(room, longest)), room)
        planned = trainer.engine.plan.turned_head
        say("fp8", prove_precision(trainer, trainer.fp8_pack))
        if trainer.engine.plan.turned_head:
            say("fp8", "the head's gradient is in FP8 too; its logits, and so the loss, are in bf16")
        elif planned:
            say("fp8", "the head's gradient stays in bf16, as in FP8 it is too far off")
        if trainer.engine.experts_in_16_bits:
            say("fp8", trainer.engine.experts_in_16_bits)
    return own_head


def prove_gradients(trainer: Any, texts: Sequence[Tokens], dtype: torch.dtype, room: int, longest: int) -> str | None:
    """Compare the engine's gradients with autograd's on one document.

    If they differ, on the next one: of a mixture, rounding may send a token to another expert now and then. A kernel
    that is wrong is so on all of them. Nothing of it shows afterwards: no random number is drawn, no gradient kept, and
    the adapter is what it was.

    Args:
        trainer: A :class:`slimtune.training.fused.FusedTrainer` with an engine, ready to train.
        texts: Documents; the first few tokens of each are taken, all supervised.
        dtype: The compute dtype.
        room: Tokens that a micro-batch may hold.
        longest: Tokens that a document may have.

    Returns:
        Why they weren't compared; None if they are the same.

    Raises:
        CannotFuse: The engine's are others.
    """
    model, training, wrong = trainer.model, trainer.model.training, ""
    model.eval()
    try:
        with rng_preserved(), _begun(trainer.engine):
            for tokens in texts:
                text = text_of(tokens, min(room, longest))
                wrong = _wrong(trainer, text, beside_others(text, room), dtype)
                if not wrong:
                    return None
    except _NoneToCompare as reason:
        return str(reason)
    finally:
        model.train(training)
    raise CannotFuse(
        f"the engine's gradient of {wrong} from the model's",
        rule="What trains must be the model as it is.",
        way_out="It trains unfused: engine: plain.",
    )


def prove_precision(trainer: Any, pack: dict[str, Any]) -> str:
    """Compare each product in FP8 with that in bf16, and gradients on one small pack; nothing of it shows after.

    Rows of numbers are scaled by their largest, so that none is too large for FP8; what is too small beside it becomes
    zero, and is counted in the gradients that flow back.

    Args:
        trainer: As :func:`prove_gradients` takes it; its engine multiplies in FP8.
        pack: What :func:`slimtune.batch.MicroBatch.of` reads.

    Returns:
        How much is in FP8, how far the gradients are apart, and how much of them is lost.

    Raises:
        UserError: They are far apart, or this device can't multiply so.
    """
    engine, model, training = trainer.engine, trainer.model, trainer.model.training
    if not engine.fp8_share:
        return "no product of this run is large enough for FP8: all are in bf16"
    model.eval()
    try:
        with rng_preserved(), _begun(engine):
            if (wrong := _wrong_product(engine) or _wrong_head(engine)) is not None:
                raise _unfit(wrong)
            with engine.in_16_bits():
                parameters, expected = zip(*engine.upper_gradients(pack), strict=True)
            _, found = zip(*engine.upper_gradients(pack), strict=True)
            with engine.counting_lost() as fp8:  # by way of 16 bits where gates otherwise go straight into FP8
                _, again = zip(*engine.upper_gradients(pack), strict=True)
                lost = fp8.lost()
    except torch.OutOfMemoryError:
        raise
    except CANT_TAKE as error:
        raise _unfit(f"this device can't ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})") from error
    finally:
        model.train(training)
    kinds, floor = _kinds(model, parameters), _FLOOR[torch.bfloat16]
    differences = _differences(kinds, found, expected, floor)
    for kind, (apart, off) in differences.items():
        if not (apart <= _FP8_APART and off <= _FP8_OFF):
            raise _unfit(
                f"the gradient of {kind} is {apart:.2g} of its size from bf16's, {off:.2g} along its direction"
            )
    for kind, (apart, _) in _differences(kinds, found, again, floor).items():
        if not apart <= _FP8_AGAIN:
            raise _unfit(f"the gradient of {kind} is {apart:.2g} of its size from itself with its products one by one")
    mean, share = sum(apart for apart, _ in differences.values()) / len(differences), lost.share
    return (
        f"an experiment: {engine.fp8_share:.0%} of the layers' products are in FP8; gradients are {mean:.2g} of their "
        f"size from bf16's, and {share:.2%} of what flows back is too small for it"
    )


def _wrong_product(engine: Engine) -> str | None:
    """The first of its projections whose product in FP8 isn't bf16's but for rounding, in words."""
    for name, *both in engine.products_in_both():
        (y, y_off), (dx, dx_off) = (_apart(found, expected) for found, expected in zip(*both, strict=True))
        if not (y <= _PRODUCT_APART_FORWARD and abs(y_off) <= _PRODUCT_OFF):
            return f"the product of {name} is {y:.2g} of its size from bf16's, {y_off:.2g} along its direction"
        if not (dx <= _PRODUCT_APART and abs(dx_off) <= _PRODUCT_OFF):
            return f"the gradient through {name} is {dx:.2g} of its size from bf16's, {dx_off:.2g} along its direction"
    return None


def _wrong_head(engine: Engine) -> str | None:
    """The same of the gradient through the head; one that is far off is left in 16 bits."""
    if (gradients := engine.head_in_both()) is None:
        return None
    dx, off = _apart(*gradients)
    if dx > _HEAD_APART:
        engine.leave_head_in_16_bits()
    elif not abs(off) <= _HEAD_OFF:
        return f"the gradient through the head is {dx:.2g} of its size from bf16's, {off:.2g} along its direction"
    return None


def _apart(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """How far a tensor is from what is expected, and how far along its direction, over its size."""
    own, difference = expected.double(), found.double() - expected.double()
    size = own.square().sum()
    return (difference.square().sum() / size).sqrt().item(), ((difference * own).sum() / size).item()


def _unfit(reason: str) -> UserError:
    return UserError(f"precision: fp8 can't be had: {reason}", way_out="Leave precision at auto: it trains in bf16.")


class _NoneToCompare(Exception):
    """The unfused model has no gradients here."""


def _wrong(trainer: Any, text: Tokens, pack: dict[str, Any], dtype: torch.dtype) -> str:
    """The first kind of matrix whose gradient is another one, in words; empty if there is none."""
    engine: Engine = trainer.engine
    with engine.in_16_bits():  # what FP8 is apart from that, prove_precision says
        parameters, found = zip(*engine.upper_gradients(pack), strict=True)
    try:
        expected = _autograd(trainer, parameters, torch.from_numpy(text)[None])
    except torch.OutOfMemoryError:
        raise _NoneToCompare("not compared with the unfused model's, which there is no room for") from None
    except CANT_TAKE as error:
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise _NoneToCompare(f"not compared with the unfused model's, which has none ({said})") from None
    kinds = _kinds(trainer.model, parameters)
    wrong = {
        kind: apart
        for kind, (apart, off) in _differences(kinds, found, expected, _FLOOR[dtype]).items()
        if not (apart <= _APART[dtype] and off <= _OFF[dtype])
    }
    if wrong:
        with _rounded(trainer.model, torch.finfo(dtype).eps):
            again = _autograd(trainer, parameters, torch.from_numpy(text)[None])
        own = _differences(kinds, again, expected, _FLOOR[dtype])
        wrong = {kind: apart for kind, apart in wrong.items() if not apart <= _NOISE * own.get(kind, (0.0, 0.0))[0]}
    return next((f"{kind} on a document in a pack is {apart:.2g} of its size" for kind, apart in wrong.items()), "")


@contextmanager
def _begun(engine: Engine) -> Iterator[None]:
    """While the body runs, no adapter's B is zero."""
    flat = engine.flat
    before, draw = flat.data.clone(), torch.Generator(flat.data.device).manual_seed(0)
    with torch.no_grad():
        for each in flat.views(flat.data):
            if not each.any():
                each.normal_(std=_B / each.shape[-1] ** 0.5, generator=draw)
    try:
        yield
    finally:
        flat.data.copy_(before)


@contextmanager
def _rounded(model: Any, share: float) -> Iterator[None]:
    """While the body runs, the embedding's numbers are off by this share of themselves, at random."""

    def off(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        draw = torch.Generator(output.device).manual_seed(0)
        by = torch.randn(output.shape, generator=draw, device=output.device, dtype=torch.float32)
        return (output.float() * (1 + share * by)).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(off)
    try:
        yield
    finally:
        handle.remove()


def _autograd(trainer: Any, parameters: Sequence[nn.Parameter], ids: Tensor) -> list[Tensor]:
    """The unfused model's gradients of the sum of a document's losses; ids: [1, S]."""
    mine = {id(each) for each in parameters}
    others = [each for each in trainer.model.parameters() if each.requires_grad and id(each) not in mine]
    inputs = trainer._prepare_inputs({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    try:
        for each in others:
            each.requires_grad_(False)  # so that nothing is kept of the layers below
        with torch.enable_grad(), trainer.compute_loss_context_manager():
            loss, _, _ = own_loss(trainer.model, inputs)
        made = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for each in others:
            each.requires_grad_(True)
    return [torch.zeros_like(each) if own is None else own for each, own in zip(parameters, made, strict=True)]


def _kinds(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    """The parameters' names without their layers' numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = (names[id(each)].removeprefix("base_model.model.").replace(".base_layer", "") for each in parameters)
    return [re.sub(r"(?<=\.)\d+(?=\.)", "*", name).removesuffix(".default.weight") for name in plain]


def _differences(
    kinds: Sequence[str], found: Sequence[Tensor], expected: Sequence[Tensor], floor: float
) -> dict[str, tuple[float, float]]:
    """Of each kind of matrix: how far what was found is from what is expected, and how far along its direction.

    Both over its size, which counts as ``floor`` of the largest kind's at least.
    """
    sums: dict[str, Tensor] = {}
    for kind, one, other in zip(kinds, found, expected, strict=True):
        own, difference = other.double(), one.double() - other.double()
        mine = torch.stack([difference.square().sum(), (difference * own).sum(), own.square().sum()]).cpu()
        sums[kind] = sums[kind] + mine if kind in sums else mine
    least = floor**2 * max(float(size) for _, _, size in sums.values())
    return {
        kind: ((apart / size.clamp(min=least)).sqrt().item(), (along / size.clamp(min=least)).abs().item())
        for kind, (apart, along, size) in sums.items()
        if apart != 0
    }
