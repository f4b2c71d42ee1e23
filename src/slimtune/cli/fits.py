"""Whether a model trains on this machine, by the plan that ``slimtune plan`` shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimtune.base.embedded import is_embedded
from slimtune.cli.hub import cached_models
from slimtune.cli.imports import fast_imports
from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.words import told

if TYPE_CHECKING:
    from slimtune.hardware import Card
    from slimtune.training.forecast import Forecaster

__all__ = ["Fit", "fit_here", "fit_of"]

_NO_LIMIT = 1 << 62
_PROCESS, _PROOFS = 1 << 30, 2
"""Of a training without a GPU: bytes of the process itself, and so many times what the engine takes, for the comparison
with the unfused model before the first step. By both SmolLM2-135M takes 3.6 GiB with 2,048 tokens; it took 3.7."""


@dataclass(frozen=True)
class Fit:
    """What the plan knows of a model on this machine."""

    trains: bool | None
    """None: it can't be known."""
    said: tuple[str, ...]
    """Sentences, in the language that is spoken."""
    max_length: int | None = None
    """Tokens that a document may have, where the usual number doesn't fit and fewer do."""


def fit_here(model: str) -> Fit:
    """Look whether ``model`` trains here by the defaults; its config and its files' headers are read, no weights."""
    with fast_imports():
        from slimtune.engine.ram import ram_to_lock
        from slimtune.hardware import detect
        from slimtune.plan import memory_budget, resolve_machine
        from slimtune.run.quiet import upstream_to_log
        from slimtune.training.forecast import Forecaster

    with upstream_to_log(None):
        config, _ = resolve_machine(Config.make(model=model), detect())
        try:
            forecaster = Forecaster(config)
        except UserError as error:
            # Of what isn't here yet it may be the network's fault.
            here = is_embedded(model) or Path(model).expanduser().is_dir() or model in cached_models()
            if here:
                return Fit(False, (told(f"It doesn't train here: {error.what}"),))
            return Fit(None, (told(f"Whether it trains here isn't known: {error.what}"),))
        return fit_of(forecaster, detect().card, memory_budget(config), ram_to_lock())


def fit_of(forecaster: Forecaster, card: Card, budget: int | None, ram: int) -> Fit:
    """What a forecaster's config comes to.

    Args:
        forecaster: Of the config.
        card: Where it is to train.
        budget: Bytes that training may take of it; None: it is no GPU, where nothing is planned and everything kept.
        ram: Bytes of RAM that may be locked beside a GPU.
    """
    from slimtune.training.forecast import gib

    room = gib(card.memory_bytes if budget is None else budget)
    where = told("RAM that is free") if budget is None else card.name
    if forecaster.unfused is not None:
        fits = forecaster.weights <= (budget or card.memory_bytes)
        weights = told(
            f"Its weights take {gib(forecaster.weights)} of {room} ({where}); what comes on top, nobody plans."
        )
        return Fit(None if fits else False, (weights,))
    usual = forecaster.config.max_length
    if budget is None:
        planned = forecaster.forecast(card, _NO_LIMIT)
        taken = _PROCESS + _PROOFS * planned.nbytes
        trains = taken <= card.memory_bytes
    else:
        planned = forecaster.with_longest(card, budget, ram)
        taken, trains = planned.nbytes, planned.trains
    takes = told(f"With documents of {usual:,} tokens it takes {gib(taken)} of {room} ({where}).")
    if trains:
        in_ram = (told(f"Of RAM it takes {gib(planned.locked_bytes)}."),) if planned.locked_bytes else ()
        longest = (told(f"The longest document may have {planned.longest:,} tokens."),) if planned.longest else ()
        return Fit(True, (told("It trains here."), takes, *in_ram, *longest))
    if planned.longest:
        return Fit(
            True, (told(f"It trains here with documents of up to {planned.longest:,} tokens."), takes), planned.longest
        )
    return Fit(False, (told("It doesn't train here."), takes))
