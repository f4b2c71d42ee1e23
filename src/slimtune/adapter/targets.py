"""Which of a model's weights an adapter is put on: from the config's words to the names that plain PEFT reads back.

A person names modules by the end of their names, or says one of :data:`WORDS`; both mean the text part alone. PEFT
matches ends of names too, but over the whole model, and takes some names of Transformers 4 for others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from re import escape, match
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn

from slimtune.config import TARGET_WORDS, Config, did_you_mean
from slimtune.errors import UserError
from slimtune.families import Family, read_family
from slimtune.families.read import is_linear
from slimtune.families.spec import CHOOSES, OTHER_SEQUENCE

__all__ = ["Targets", "default_targets", "find_targets"]

_MOST_NAMES = 16
"""Names in a config's list; a model whose projections need more is said by the word for them."""


@dataclass(frozen=True)
class Targets:
    """Where an adapter goes, in PEFT's words."""

    modules: tuple[str, ...]
    """``target_modules``: ends of the names of linear layers and embeddings."""
    parameters: tuple[str, ...]
    """``target_parameters``: ends of the names of weights that are adapted as tensors: expert stacks, and linear
    layers whose names PEFT takes for experts'."""
    exclude: str | None
    """``exclude_modules``: a pattern for what isn't the text part, where its modules' names end alike."""
    stacks: tuple[str, ...]
    """The expert stacks among them, by their full names."""
    layers: tuple[str, ...]
    """The model's decoder layers, by their full names."""
    left_out: dict[str, str]
    """Linear layers of the text part, by the end of their names, that can't carry an adapter, with the reason."""


def default_targets(model: nn.Module) -> tuple[tuple[str, ...], str]:
    """What ``targets: auto`` is for this model: names for the config, and the reason.

    Raises:
        UserError: Nothing that mixes tokens was found.
    """
    family = _read(model)
    wanted = _fit(family.names("attention"), family)
    if not wanted:
        _tell_unfit(family.names("attention"), model, family)
        raise UserError(
            f"no linear layers that mix tokens were found in {type(model).__name__}",
            rule="By default the projections of attention, or of what a family has in its place, are adapted.",
            way_out="Name modules by the end of their names: --targets NAME,NAME",
        )
    names = _ends(wanted, _paths(model, family))
    reason = f"the projections of what mixes tokens: {', '.join(family.mixers)}"
    return (names if len(names) <= _MOST_NAMES else ("attention",)), reason


def find_targets(config: Config, model: nn.Module) -> Targets:
    """Where the adapter that ``config`` asks for goes.

    Args:
        config: With ``targets`` resolved.
        model: The plain base.

    Raises:
        UserError: A name means nothing, or something that an adapter can't be put on; or a pattern of ranks or alphas
            means nothing that gets an adapter.
    """
    family = _read(model)
    wanted, stacks = _meant(config, model, family)
    _check_patterns(config, [*wanted, *stacks])
    ends = _ends(wanted, _paths(model, family))
    taken = _taken_for_experts(ends, model)
    weights = [f"{path}.weight" for path in wanted if _ends_in(path, taken)]
    if config.layers is not None:  # PEFT's own layers_to_transform counts for modules alone
        inside = tuple(f"{family.layers[index].path}." for index in config.layers if index < len(family.layers))
        stacks, weights = ([name for name in names if name.startswith(inside)] for names in (stacks, weights))
    modules = tuple(end for end in ends if end not in taken)
    return Targets(
        modules=modules,
        parameters=_ends([*stacks, *weights], [name for name, _ in model.named_parameters()]),
        exclude=_exclude(modules, model, family),
        stacks=tuple(stacks),
        layers=tuple(layer.path for layer in family.layers),
        left_out={
            ".".join(path.split(".")[-2:]): reason
            for path, reason in family.unfit.items()
            if reason not in (CHOOSES, OTHER_SEQUENCE)
        },
    )


def _read(model: nn.Module) -> Family:
    """The model's family, with what PEFT would lose among what is unfit."""
    family = read_family(model)
    paths = [path for part in TARGET_WORDS for path in family.names(part)]
    lost = dict.fromkeys(_lost(paths, model), "PEFT reads its adapter back under another name")
    return replace(family, unfit={**family.unfit, **lost})


def _lost(paths: Sequence[str], model: nn.Module) -> list[str]:
    """Of linear layers and stacks: those whose adapter PEFT looks for elsewhere when it reads the file.

    It renames an adapter's keys by the rules that Transformers has for a family's weight files, and some of these
    match more than they were written for (Laguna's ``mlp.shared_expert.`` matches ``mlp.shared_experts``).
    """
    keys = {path: f"base_model.model.{path}.lora_A.weight" for path in paths}
    tensors = {key: torch.empty(1, 1) for key in keys.values()}
    kept = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors)
    return [path for path, key in keys.items() if key not in kept]


def _fit(paths: Iterable[str], family: Family) -> list[str]:
    return [path for path in paths if path not in family.unfit]


def _meant(config: Config, model: nn.Module, family: Family) -> tuple[list[str], list[str]]:
    """(linear layers and embeddings, expert stacks) that the config's names and words mean, by their full names."""
    names = TARGET_WORDS if config.targets == "all-linear" else config.targets
    modules: list[str] = []
    stacks: list[str] = []
    for name in names:
        if name in TARGET_WORDS:
            (stacks if name == "experts" else modules).extend(_fit(family.names(name), family))
            continue
        found = [path for path in _adaptable(model, family) if _ends_in(path, [name])]
        found_stacks = [path for path in family.names("experts") if _ends_in(path, [name])]
        if not found and not found_stacks:
            raise _unknown(name, model, family)
        _tell_unfit(found, model, family)
        modules += found
        stacks += found_stacks
    if not modules and not stacks:
        _tell_unfit([path for name in names if name in TARGET_WORDS for path in family.names(name)], model, family)
        raise UserError(
            f"targets {', '.join(names)}: {type(model).__name__} has none of these",
            rule=_what_there_is(model, family),
            way_out="Name modules by the end of their names, or leave targets at auto.",
        )
    return list(dict.fromkeys(modules)), list(dict.fromkeys(stacks))


def _check_patterns(config: Config, adapted: Sequence[str]) -> None:
    """See that each pattern is of use; PEFT's own rule of matching (``get_pattern_key``)."""
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise UserError(
                    f"{option} {pattern!r} is the name of nothing that gets an adapter",
                    rule="PEFT would leave it out without a word.",
                    way_out=f"Name something like {adapted[0]}, by the end of its name.",
                )


def _tell_unfit(paths: Sequence[str], model: nn.Module, family: Family) -> None:
    """Refuse the first of ``paths`` that can't carry an adapter, with its reason."""
    for path in paths:
        if reason := family.unfit.get(path):
            raise UserError(
                f"targets: an adapter can't be put on {path} of {type(model).__name__}",
                rule=f"{reason[0].upper()}{reason[1:]}.",
                way_out="Leave it out, name other modules by the end of their names, or take another model.",
            )


def _unknown(name: str, model: nn.Module, family: Family) -> UserError:
    kind = type(model).__name__
    alike = [path for path, _ in model.named_modules() if _ends_in(path, [name])]
    if not alike:
        paths = [*(path for path, _ in model.named_modules()), *family.names("experts"), *TARGET_WORDS]
        endings = sorted({path.rsplit(".", 1)[-1] for path in paths})
        return UserError(
            f"targets {name!r} is the name of no module of {kind}",
            rule=did_you_mean(name, endings) or _what_there_is(model, family),
            way_out="Name modules by the end of their names, or take --targets all-linear.",
        )
    outside = not any(family.in_text(path) for path in alike)
    return UserError(
        f"targets {name!r}: an adapter can't be put on {alike[0]} of {kind}",
        rule="It is not in the part that reads text." if outside else "It is no linear layer.",
        way_out="Name other modules by the end of their names, or leave targets at auto.",
    )


def _what_there_is(model: nn.Module, family: Family) -> str:
    linear = sorted({path.rsplit(".", 1)[-1] for path in _adaptable(model, family)})
    stacks = sorted({".".join(path.split(".")[-2:]) for path in family.names("experts")})
    experts = f" Its experts lie in {', '.join(stacks)}." if stacks else ""
    return f"Its linear layers are {', '.join(linear)}.{experts}"


def _paths(model: nn.Module, family: Family) -> list[str]:
    return [path for path, _ in model.named_modules() if family.in_text(path)]


def _adaptable(model: nn.Module, family: Family) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if family.in_text(path) and (is_linear(module) or path in family.unfit or isinstance(module, nn.Embedding))
    ]


def _ends_in(path: str, ends: Iterable[str]) -> bool:
    """PEFT's rule (``check_target_module_exists``): the whole name, or its end from a dot on."""
    return any(path == end or path.endswith(f".{end}") for end in ends)


def _ends(wanted: Sequence[str], paths: Iterable[str]) -> tuple[str, ...]:
    """The shortest ends of names that are those of all ``wanted`` and of no other of ``paths``."""
    others = {end for path in set(paths) - set(wanted) for end in _all_ends(path)}
    chosen: dict[str, None] = {}
    for path in wanted:
        ends = _all_ends(path)
        if not any(end in chosen for end in ends):
            # A number alone says too little: ctrl's feed-forward is ffn.0 and ffn.2.
            chosen[next(end for end in ends if end not in others and not end.split(".")[0].isdigit())] = None
    return tuple(chosen)


def _all_ends(path: str) -> list[str]:
    """``a.b.c`` → ``c``, ``b.c``, ``a.b.c``."""
    parts = path.split(".")
    return [".".join(parts[at:]) for at in reversed(range(len(parts)))]


def _taken_for_experts(ends: Sequence[str], model: nn.Module) -> list[str]:
    """The ends that PEFT reads as a mixture's experts, as they were named before Transformers 5 stacked them.

    In such families PEFT drops every linear layer of these names, those of dense and shared feed-forwards too (0.21,
    ``_convert_peft_config_moe``). Named as weights, in ``target_parameters``, they are what they are: an adapter of
    the same two matrices under the same keys.
    """
    taken = []
    for end in ends:
        alone: Any = LoraConfig(target_modules=[end])
        try:
            convert_peft_config_for_transformers(alone, model=model, conversions=None)
        except ValueError:  # without its partner: gate_proj without up_proj
            taken.append(end)
            continue
        if end not in alone.target_modules:
            taken.append(end)
    return taken


def _exclude(ends: Sequence[str], model: nn.Module, family: Family) -> str | None:
    """A pattern for the parts beside the text part that hold modules with these ends."""
    beside: dict[str, None] = {}
    for path, _ in model.named_modules():
        if not family.in_text(path) and _ends_in(path, ends):
            beside[_part_beside(path, family)] = None
    return rf"({'|'.join(escape(part) for part in beside)})\..*" if beside else None


def _part_beside(path: str, family: Family) -> str:
    """The largest part around ``path`` that holds nothing of the text part: ``model.vision_tower``."""
    for tower in family.towers:
        if path.startswith(f"{tower}."):
            return tower
    parts = path.split(".")
    text = family.text.split(".")
    shared = next(at for at, part in enumerate(parts) if at >= len(text) or part != text[at])
    return ".".join(parts[: shared + 1])
