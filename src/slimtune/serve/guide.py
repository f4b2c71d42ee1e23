"""Replies that can't be anything but JSON, or JSON of a schema (``response_format``), or calls (``tool_choice``), by
llguidance's grammars, and whether a call's arguments fit their schema (``strict``).

Before each token the grammar says which tokens may follow, and the others' scores become minus infinity. llguidance is
an extra (``slimtune[json]``); without it such requests are refused (decisions/0076).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from slimtune.data.calls import Frame
from slimtune.serve.call_grammar import CannotSpell, call_grammar
from slimtune.serve.refusal import Refusal
from slimtune.use.load import Opened

__all__ = ["Guide", "Guides"]

# As much white space as an indented object needs, or a model that knows nothing better would write it without an end.
_JSON = {"whitespace_pattern": r"[\x20\x0A]{1,32}", "lenient": False}

# References that lead to references.
_DEEPEST = 32


class Guides:
    """Makes guides for one model.

    Args:
        opened: The model.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._tokenizer: Any = None

    def make(self, schema: dict[str, Any]) -> Guide:
        """A guide for one reply. Takes a while: the first also reads the vocabulary.

        Args:
            schema: The JSON schema that the reply has to fit.

        Raises:
            Refusal: llguidance isn't installed, the tokenizer is of another kind, or the schema can't be kept to (400).
        """
        return Guide(self._matcher(self._of_schema(schema, "response_format"), "response_format"))

    def make_call(self, frame: Frame | None, tools: Mapping[str, dict[str, Any]], *, several: bool) -> Guide:
        """A guide for a reply that is a call, or several, in the template's own form.

        Args:
            frame: What stands around names and arguments.
            tools: By name, the schema of the tool's arguments.
            several: Whether there may be more than one.

        Raises:
            Refusal: As :meth:`make`; or the form has no arguments in JSON, or the schema of one can't be kept to (400).
        """
        if frame is None:
            raise _refused("no grammar is known for the form in which the model's template writes calls", "tool_choice")
        # llguidance takes more tokens for control tokens than the tokenizer does: all that look like <tool_call>.
        tokenizer, added = self._known("tool_choice"), self._opened.tokenizer.added_tokens_decoder
        control = {mark.content: token for token, mark in added.items() if tokenizer.is_special_token(token)}
        try:
            grammar = call_grammar(frame, tools, control, _JSON, several)
        except CannotSpell as error:
            raise _refused(f"the schema can't be kept to: {error}", "tool_choice") from None
        return Guide(self._matcher(grammar, "tool_choice"))

    def check(self, schema: dict[str, Any]) -> Callable[[Any], bool]:
        """What says whether a value fits a schema.

        Raises:
            Refusal: As :meth:`make`.
        """
        matcher = self._matcher(self._of_schema(schema, "tools"), "tools")

        def fits(value: Any) -> bool:
            # The grammar takes an object's keys in the schema's order alone; to a schema their order is nothing.
            text = json.dumps(_ordered(value, schema, schema), ensure_ascii=False)
            matcher.reset()
            taken = matcher.try_consume_tokens(tokens := self._tokenizer.tokenize_str(text))
            return bool(taken == len(tokens) and matcher.is_accepting())

        return fits

    def _of_schema(self, schema: dict[str, Any], param: str) -> str:
        try:
            return str(_library(param).LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON))
        except ValueError as error:
            raise _refused(str(error), param) from None

    def _known(self, param: str) -> Any:
        """The tokenizer, as llguidance has it."""
        llguidance = _library(param)
        if self._tokenizer is None:
            backend = getattr(self._opened.tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise _refused("the model's tokenizer is no fast one, and grammars take no other", param)
            rows = self._opened.model.get_input_embeddings().weight.shape[0]
            ends = list(self._opened.stop_ids)
            self._tokenizer = llguidance.LLTokenizer(backend.to_str(), n_vocab=rows, eos_token=ends)
        return self._tokenizer

    def _matcher(self, grammar: str, param: str) -> Any:
        llguidance, tokenizer = _library(param), self._known(param)
        failed, said = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
        if failed or said:  # a warning is a part of the schema that isn't kept to
            raise _refused(f"the schema can't be kept to: {said[0]:.300}", param)
        return llguidance.LLMatcher(tokenizer, grammar, log_level=0)


class Guide:
    """What one reply may go on with.

    Args:
        matcher: llguidance's ``LLMatcher``.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, scores: Tensor) -> Tensor:
        """``scores`` [vocabulary] with minus infinity for what can't follow.

        Raises:
            Refusal: The grammar is too much for its library.
        """
        bias = self._matcher.compute_logit_bias()
        self._check()
        may = torch.frombuffer(bytearray(bias), dtype=torch.uint8).to(scores.device) != 0
        return scores.masked_fill(~may[: len(scores)], -torch.inf)

    def take(self, token: int) -> None:
        """The reply goes on with ``token``.

        Raises:
            Refusal: It can't, by the grammar.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise Refusal(500, f"the grammar failed: {self._matcher.get_error():.200}", "grammar_failed")


def _library(param: str) -> Any:
    if find_spec("llguidance") is None:
        raise _refused("this server has no grammars: pip install 'slimtune[json]'", param)
    return import_module("llguidance")


def _ordered(value: Any, schema: Any, root: dict[str, Any], depth: int = 0) -> Any:
    """The value with the keys of its objects in the schema's order."""
    if isinstance(schema, dict) and str(schema.get("$ref", "")).startswith("#/$defs/") and depth < _DEEPEST:
        named = (root.get("$defs") or {}).get(schema["$ref"].removeprefix("#/$defs/"))
        return _ordered(value, named, root, depth + 1)
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        return [_ordered(each, schema.get("items"), root, depth) for each in value]
    if isinstance(value, dict):
        known = schema.get("properties") or {}
        keys = [*(key for key in known if key in value), *(key for key in value if key not in known)]
        return {key: _ordered(value[key], known.get(key), root, depth) for key in keys}
    return value


def _refused(words: str, param: str) -> Refusal:
    return Refusal(400, f"{param}: {words}", "unsupported_value", param=param)
