"""How a model's replies are computed: as fast as what its layers keep allows, and proven on the model itself.

What the layers keep says which way could be right (:mod:`slimtune.use.cache`). Whether it is, is tried once for each
model, on a few words: what comes out of the way must be what the whole text, computed at once and without any cache,
gives, up to rounding. Else the next slower way is taken, and the reason is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from slimtune.base.computes import CANT_TAKE
from slimtune.families.rotation import turns_anew
from slimtune.use.cache import Holds, what_it_holds
from slimtune.use.load import Opened
from slimtune.use.rows import AloneRow, KeptRows, Rows, TurningRow, UncachedRow

__all__ = ["FAULTS", "Way", "apart", "at_once", "is_rounding", "trial_prompts", "way_of"]

Begin = Callable[[Any, Sequence[list[int]], int], Rows]
_WORDS = (
    "A river rises in the hills, takes up brook after brook on its way down, turns the wheels of old mills, carries "
    "boats and timber past villages and towns, and is broad and slow before it comes to the sea."
)
# Tokens of the trial's two prompts, of their common beginning, and of a draft behind them.
_LENGTHS, _SHARED, _DRAFT = (34, 32), 10, 3
# How far the trial's logits may be from those without a cache, as a share of the logits' own spread. Rounding stays far
# below, a router of experts that tips over in 16 bits included, and a fault of the kinds known is far above.
_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.2}
# What code that doesn't know a model says of it.
FAULTS = (*CANT_TAKE, StopIteration)


@dataclass(frozen=True)
class Way:
    """One way of computing replies."""

    begin: Begin
    """(model, prompts, most tokens that follow) to the batch's rows."""
    rows: int | None
    """Most prompts in a batch; None: as memory allows."""
    drafts: bool
    """Whether tokens can be taken back, so that guesses are of use."""
    slow: str | None = None
    """What is slower than it could be, and why, in one line for people; None for the fastest way."""
    state_bytes: int = 0
    """Memory of a row, apart from its tokens."""
    token_bytes: int = 0
    """Memory of each token of a row."""


_TOGETHER = Way(lambda model, prompts, room: KeptRows(model, prompts, room, states=False), None, True)
_STATES = Way(lambda model, prompts, room: KeptRows(model, prompts, room, states=True), None, False)
_ALONE = Way(lambda model, prompts, room: AloneRow(model, prompts[0]), 1, False)
_UNCACHED = Way(lambda model, prompts, room: UncachedRow(model, prompts[0]), 1, True)

_known: WeakKeyDictionary[Any, Way] = WeakKeyDictionary()


def way_of(opened: Opened, longest: int = 0) -> Way:
    """The fastest way that is right for this model, tried at the first call, and for texts of so many tokens.

    Args:
        opened: The model.
        longest: Most tokens of a prompt and its reply.
    """
    if opened.model not in _known:
        _known[opened.model] = _find(opened)
    way = _known[opened.model]
    turns = turns_anew(opened.model.config.get_text_config(decoder=True))
    if turns is None or longest <= turns:
        return way
    if way.begin not in (_TOGETHER.begin, _STATES.begin):  # what is kept there isn't known
        return _UNCACHED
    states = way.begin is _STATES.begin

    def begin(model: Any, prompts: Sequence[list[int]], room: int) -> Rows:
        return TurningRow(model, prompts[0], room, turns, states=states)

    return replace(way, begin=begin, rows=1, drafts=False)


def _find(opened: Opened) -> Way:
    ids = _ids(opened)
    model = opened.model
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    reasons: list[str] = []
    for way, words in (
        (_by_layers(model), ""),
        (_ALONE, "one prompt is answered at a time"),
        (_UNCACHED, "every token computes the whole text again: slow"),
    ):
        slow = f"{name}: {words} ({reasons[-1]})" if reasons else None
        if way is None:
            reasons.append("its layers keep what slimtune doesn't know")
        elif way is _UNCACHED:
            return Way(way.begin, way.rows, way.drafts, slow)
        else:
            state, token, problem = _tried(model, way, ids)
            if problem is None:
                return Way(way.begin, way.rows, way.drafts, slow, state, token)
            reasons.append(problem)
    raise AssertionError


def _by_layers(model: Any) -> Way | None:
    holds = what_it_holds(model.config.get_text_config(decoder=True))
    return {Holds.KEYS: _TOGETHER, Holds.STATES: _STATES}.get(holds)


def trial_prompts(opened: Opened) -> list[list[int]]:
    """Prompts for a trial: short, of different lengths, and with a common beginning."""
    return _prompts(_ids(opened))


def _prompts(ids: list[int]) -> list[list[int]]:
    return [ids[:_SHARED] + ids[_SHARED:length][::-1] for length in _LENGTHS]


def _ids(opened: Opened) -> list[int]:
    """Enough tokens of plain text for the trial."""
    most = max(_LENGTHS) + 2 + _DRAFT
    ids: list[int] = opened.tokenizer(_WORDS, add_special_tokens=False)["input_ids"]
    return (ids * (1 + most // max(1, len(ids))))[:most]


@torch.inference_mode()
def _tried(model: Any, way: Way, ids: list[int]) -> tuple[int, int, str | None]:
    """Bytes of a row and of its tokens, and what is wrong with this way, if anything is."""
    prompts = _prompts(ids)[: way.rows]
    rest = ids[max(_LENGTHS) :]
    try:
        rows = way.begin(model, prompts, len(rest))
        following = torch.cat([rows.last, rows.last.new_tensor([rest] * len(prompts))], dim=1)
        one, two = (rows.step(following[:, at : at + 1]) for at in range(2))
        made = [torch.cat([one[row], two[row]]) for row in range(len(prompts))]
        rows.keep(torch.tensor([len(prompts) - 1]))
        # As a draft, if there are any.
        after = rows.step(following[-1:, 2 : 2 + (_DRAFT if way.drafts else 1)])[0]
        expected = [at_once(model, prompt, rest[: 1 + len(after)]) for prompt in prompts]
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        said = (str(error).splitlines() or [""])[0]
        return 0, 0, f"otherwise it fails: {type(error).__name__}: {said[:100]}"
    before = [apart(ours, theirs[:2]) for ours, theirs in zip(made, expected, strict=True)]
    wrong = max(*before, apart(after, expected[-1][2:]))
    if not is_rounding(wrong, model):
        return 0, 0, f"otherwise its scores are {wrong:.1%} of their spread off"
    state, token = rows.bytes_of_a_row if isinstance(rows, KeptRows) else (0, 0)
    return state, token, None


def at_once(model: Any, prompt: list[int], rest: list[int]) -> Tensor:
    """The logits of what follows the prompt and each token of ``rest``, [tokens, vocabulary]."""
    row = UncachedRow(model, prompt)
    return row.step(torch.tensor([prompt[-1:] + rest], device=row.last.device))[0]


def is_rounding(wrong: float, model: Any) -> bool:
    """Whether :func:`apart` is no more than what rounding in the model's dtype makes."""
    return wrong <= _TOLERANCE.get(model.dtype, _TOLERANCE[torch.bfloat16])


def apart(ours: Tensor, theirs: Tensor) -> float:
    """How far logits [tokens, vocabulary] are from others, as a share of the others' spread.

    The nearest token counts: a router of experts may tip over at one, but a fault of a cache is in all of them.
    """
    ours, theirs = ours.float(), theirs.float()
    return float(((ours - theirs).pow(2).mean(-1) / theirs.var(-1)).sqrt().min())
