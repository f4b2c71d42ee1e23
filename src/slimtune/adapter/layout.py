"""How a base's files hold the parameters of its modules: which tensors, under which names, in which form.

The two differ for most families: a checkpoint with images stores ``language_model.model.layers…`` for the module
``model.language_model.layers…``, experts lie in the files one by one and in the module as one 3-D parameter.
Transformers has the rules and applies them while it loads and saves (``conversion_mapping.py``,
``core_model_loading.py``); here the same rules are applied to a few tensors at a time, in both directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from slimtune.errors import UserError

__all__ = ["Layout", "Unit"]


@dataclass
class Unit:
    """Parameters, and the tensors in the files that hold just these: one of each, but for what is fused or split."""

    names: list[str] = field(default_factory=list)
    """The tensors in the files, in the order in which Transformers collects them."""
    parameters: list[str] = field(default_factory=list)
    converter: Any = None
    """Transformers' rule between the two; None where one tensor is one parameter."""
    patterns: list[str] = field(default_factory=list)
    """For each name, the part of the rule that it matches."""
    first: str = ""
    """The parameter by which the rule expands names."""


class Layout:
    """The units of one base.

    Args:
        model: The base's modules; weights aren't needed.
        names: The tensors in its files.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        self.model = model
        self.units: dict[str, Unit] = {}
        """By parameter."""
        self._known: dict[str, Any] = dict(model.state_dict())
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._between: dict[str, str] = {}  # a name as a rule's reverse gives it → the name in the files
        by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        units: dict[str, Unit] = {}
        for name in sorted(names, key=dot_natural_key):
            parameter, pattern = self._parameter(name)
            if parameter not in self._known:
                continue  # Transformers ignores it too
            unit = units.setdefault(parameter, Unit(first=parameter))
            unit.names.append(name)
            unit.patterns.append(name if pattern is None else pattern)
            unit.converter = None if pattern is None else by_pattern[pattern]
            self._between[self._renamed(name, parameter)] = name
        for unit in units.values():
            targets = [""] if unit.converter is None else unit.converter.target_patterns
            unit.parameters = [unit.first.replace(targets[0], target) for target in targets]
            self.units |= dict.fromkeys(unit.parameters, unit)

    def load(self, unit: Unit, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """The unit's parameters, from its tensors in the order of ``unit.names``."""
        if unit.converter is None:
            return dict(zip(unit.parameters, tensors, strict=True))
        rule = deepcopy(unit.converter)
        for name, pattern, tensor in zip(unit.names, unit.patterns, tensors, strict=True):
            rule.add_tensor(unit.first, name, pattern, tensor)
        return _single(rule.convert(unit.first, model=self.model, config=self.model.config))

    def store(self, unit: Unit, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The unit's tensors by their names in the files, from its parameters: the reverse of :meth:`load`."""
        if unit.converter is None:
            return dict(zip(unit.names, parameters.values(), strict=True))
        rule = unit.converter.reverse_transform()
        first = ""
        for parameter in unit.parameters:
            target, pattern = rename_source_key(parameter, [], [rule])
            first = first or target
            rule.add_tensor(target, parameter, pattern, parameters[parameter])
        made = _single(rule.convert(first, model=self.model, config=self.model.config))
        return {self._between[name]: tensor for name, tensor in made.items()}

    def check_reversible(self, unit: Unit, tensors: list[Tensor]) -> None:
        """See on a unit's own tensors that what is loaded is stored again bit by bit.

        Raises:
            UserError: Transformers knows no way back, or not all of it.
        """
        try:
            again = self.store(unit, self.load(unit, list(tensors)))
        except (NotImplementedError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
            raise _irreversible(unit, str(error)) from error
        if set(again) != set(unit.names) or not all(
            torch.equal(again[name], tensor) for name, tensor in zip(unit.names, tensors, strict=True)
        ):
            raise _irreversible(unit, "other tensors come back")

    def new_name(self, parameter: str) -> str:
        """The name under which a parameter that the files don't hold yet is found in them.

        Raises:
            UserError: There is none.
        """
        name = parameter
        for rule in reversed([rule for rule in self._renamings if rule.was_used()]):
            name, _ = rule.reverse_transform().rename_source_key(name)
        for candidate in (name, parameter):
            if self._parameter(candidate) == (parameter, None):
                return candidate
        raise UserError(f"the base's files have no name for {parameter}, which merging has to add to them")

    def _parameter(self, name: str) -> tuple[str, str | None]:
        """The parameter that a name in the files stands for, and the part of a rule it matches: as in
        ``convert_and_load_state_dict_in_model``.
        """
        prefix = self.model.base_model_prefix
        parameter, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._known)
        if parameter not in self._known and name in self._known:
            parameter, pattern = rename_source_key(name, [], [], prefix, self._known)
        return parameter, pattern

    def _renamed(self, name: str, parameter: str) -> str:
        """The name after all renamings and before its rule, with the parameter's prefix, as its reverse gives it."""
        before, _ = rename_source_key(name, self._renamings, [])
        after, _ = rename_source_key(name, self._renamings, self._converters)
        if len(parameter) > len(after):
            return parameter.removesuffix(after) + before
        return before.removeprefix(after.removesuffix(parameter))


def _single(made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _irreversible(unit: Unit, why: str) -> UserError:
    return UserError(
        f"{unit.first} can't be merged: {why}",
        rule=f"The base's files hold it as {unit.names[0]}, and what is merged must go back there exactly.",
        way_out="Use the adapter unmerged: chat, generate, eval and serve load it onto its base.",
    )
