"""Several adapters on one base: the base's weights are held once, whatever the number of adapters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from slimtune.adapter.files import attach_adapter
from slimtune.adapter.vocabulary import base_rows
from slimtune.base.vocabulary import fit_rows
from slimtune.errors import UserError
from slimtune.use.load import Found, Opened, find, open_model, stop_ids

__all__ = ["Named", "base_name", "find_all", "open_all", "sharing"]


@dataclass(frozen=True)
class Named:
    """A model under the name that clients ask for."""

    name: str
    found: Found


def find_all(targets: Sequence[str], *, base: str | None = None, trust_remote_code: bool = False) -> list[Named]:
    """What each target stands for, and its name: NAME=RUN, or the run's folder name.

    Raises:
        UserError: One of them is missing, two have one name, or they don't share one base in one quantisation.
    """
    made = [_named(target, base, trust_remote_code) for target in targets]
    for one, other in itertools.combinations(made, 2):
        if one.name == other.name:
            raise UserError(
                f"{one.found.name} and {other.found.name} are both called {one.name}",
                way_out="Name them: slimtune serve first=RUN second=RUN",
            )
        if _base(one.found) != _base(other.found):
            raise UserError(
                f"{one.name} and {other.name} have different bases",
                rule="One server holds one base, in one quantisation.",
                way_out="Start a server for each base, on ports of their own.",
            )
    return made


def open_all(
    models: Sequence[Named], *, quantization: str | None = None, dtype: str | None = None
) -> dict[str, Opened]:
    """Load the base once and put each adapter on it; by name, the base last.

    Raises:
        UserError: As :func:`slimtune.use.load.open_model`; or an adapter doesn't fit the base.
    """
    first = models[0].found
    opened = open_model(
        first.name,
        base=str(first.base) if first.adapter else None,
        quantization=quantization,
        dtype=dtype,
        trust_remote_code=first.trust_remote_code,
    )
    base: Any = opened.model if first.adapter is None else opened.model.unload()
    if (rows := base_rows(first.base)) is not None:
        fit_rows(base, rows)  # each adapter's copy gets the vocabulary of its own
    made: dict[str, Opened] = {}
    for model in models:
        if model.found.adapter is None:
            made[model.name] = replace(opened, model=base)
            continue
        tuned: Any = attach_adapter(sharing(base), model.found.adapter)
        tuned.eval().requires_grad_(False)
        tokenizer = model.found.tokenizer()
        made[model.name] = Opened(
            model.found, tuned, tokenizer, stop_ids(tuned, tokenizer, model.found.manner), opened.format
        )
    name = base_name(first)
    if first.adapter is not None and name not in made:
        # With the passport: it says how the first run renders, and base and run are asked alike.
        bare = replace(first, name=name, adapter=None)
        made[name] = Opened(bare, base, opened.tokenizer, opened.stop_ids, opened.format)
    return made


def _named(target: str, base: str | None, trust_remote_code: bool) -> Named:
    name, is_named, path = target.partition("=")
    if not is_named or Path(target).exists():
        name, path = "", target
    found = find(path, base=base, trust_remote_code=trust_remote_code)
    if not name and found.adapter is None:
        name = base_name(found)
    elif not name:
        folder = Path(path).resolve()
        name = folder.parent.name if folder.name == "adapter" else folder.name
    return Named(name, found)


def base_name(found: Found) -> str:
    """The base as people know it."""
    if found.passport is None:
        return found.name if found.adapter is None else found.base.name
    return found.passport.base if not Path(found.passport.base).exists() else Path(found.passport.base).name


def _base(found: Found) -> tuple[Any, ...]:
    trained = found.passport.quantization if found.passport else {}
    return found.base.resolve(), trained.get("method", "nf4"), trained.get("double_quant", True)


def sharing(model: nn.Module) -> Any:
    """A copy of the modules whose parameters and buffers are the original's own."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
