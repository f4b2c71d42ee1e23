"""A vocabulary that grows: tokens that a person adds, and the rows that a model has for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedTokenizerBase

from slimtune.base.tokenizer import load_tokenizer
from slimtune.config import Config
from slimtune.errors import UserError

__all__ = ["NewTokens", "add_tokens", "fit_rows", "make_room", "rows_by_name", "tokenizer_of"]


_LONGEST = 128
"""Most characters of a token that is added: far more than a mark or a word has."""


@dataclass(frozen=True)
class NewTokens:
    """The tokens of a file, in a tokenizer that has them now."""

    ids: tuple[int, ...]
    """Their ids, in order."""
    known: int
    """Tokens that the tokenizer had before; those with a lower id keep their rows as the base has them."""


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that a run reads its data with: the model's, with the run's template and added tokens.

    Raises:
        UserError: The model or a file that the config names can't be read.
    """
    tokenizer = load_tokenizer(
        config.model,
        revision=config.revision,
        template=config.template,
        trust_remote_code=config.trust_remote_code,
    )
    if config.add_tokens is not None:
        add_tokens(tokenizer, config.add_tokens)
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> NewTokens:
    """Put a file's tokens, one a line, into the tokenizer: each is one token from here on, wherever it stands.

    One that is among the tokenizer's added tokens already, as a reserved one is, keeps its id.

    Raises:
        UserError: The file can't be read or names none, or a line is a word of the vocabulary or has space around it.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokens {file} can't be read: {error}") from None
    tokens = list(dict.fromkeys(line for line in lines if line))
    if not tokens:
        raise UserError(f"{file} names no token", rule="It holds one token a line.")
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    for token in tokens:
        if token != token.strip():
            raise UserError(f"the token {token!r} in {file} has space around it", rule="A line is a token, whole.")
        if len(token) > _LONGEST:
            raise UserError(
                f"the token {token[:20]!r}… in {file} has {len(token):,} characters",
                rule=f"A token has at most {_LONGEST}: what is longer is a text, of which one row learns nothing.",
                way_out="Is it the right file? It holds one token a line.",
            )
        if token in vocabulary and token not in added:
            raise UserError(
                f"{token!r} in {file} is in the vocabulary already",
                rule="As an added token it would cut words that hold it.",
                way_out="Leave it out, or write it with marks of its own, as <token>.",
            )
    known = max(vocabulary.values()) + 1
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens if token not in added])
    now = tokenizer.get_added_vocab()
    return NewTokens(tuple(sorted(now[token] for token in tokens)), known)


def make_room(model: Any, tokens: NewTokens) -> None:
    """Give each token a row of the model's embedding and head; those that no token had yet begin as the mean.

    Raises:
        UserError: The head has a bias; or as :func:`fit_rows`.
    """
    before = int(model.get_input_embeddings().weight.shape[0])
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            f"{type(model).__name__}'s head has a bias, and rows of such a head can't be trained alone",
            rule="PEFT computes a head with trained rows without its bias.",
            way_out="Train it whole: --modules-to-save lm_head, with a base that has the tokens already.",
        )
    fit_rows(model, max(before, tokens.ids[-1] + 1))
    _set_to_mean(model, [row for row in tokens.ids if row >= tokens.known], min(tokens.known, before))


def fit_rows(model: Any, rows: int) -> None:
    """Give the model's embedding and head ``rows`` rows; new ones are the mean of the others.

    Raises:
        UserError: The model has other tables of one row a token, or a head that can't be resized.
    """
    before = int(model.get_input_embeddings().weight.shape[0])
    if rows == before:
        return
    _check_resizable(model, before, rows)
    _own_parameters(model)
    # Transformers' own mean is drawn around, and a run is to begin the same each time.
    model.resize_token_embeddings(rows, mean_resizing=False)
    _set_to_mean(model, list(range(before, rows)), min(before, rows))


def _own_parameters(model: Any) -> None:
    """Transformers resizes a parameter in place, and another model may share it (serve's adapters on one base)."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for module in (embedding, head):
        if module is not None and not (tied and module is head):
            module.weight = nn.Parameter(module.weight.detach(), requires_grad=module.weight.requires_grad)
    if tied:
        head.weight = embedding.weight


def _set_to_mean(model: Any, rows: list[int], known: int) -> None:
    if not rows or model.get_input_embeddings().weight.is_meta:
        return
    with torch.no_grad():
        for _, module in _tables(model):
            at = torch.tensor(rows, device=module.weight.device)
            module.weight[at] = module.weight[:known].mean(0, dtype=torch.float32).to(module.weight.dtype)
            if getattr(module, "bias", None) is not None:
                module.bias[at] = module.bias[:known].mean()


def rows_by_name(model: Any, tokens: NewTokens | None) -> dict[str, list[int]]:
    """PEFT's ``trainable_token_indices`` for these tokens: the embedding's, and the head's where it has its own."""
    return {} if tokens is None else {name: list(tokens.ids) for name, _ in _tables(model)}


def _tables(model: Any) -> Iterator[tuple[str, Any]]:
    """The last part of the name, and the module, of the embedding, and of a head that isn't tied to it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in (embedding, head):
        if module is None or (module is head and head.weight is embedding.weight):
            continue
        name = next(name for name, found in model.named_modules() if found is module)
        yield name.rsplit(".", 1)[-1], module


def _check_resizable(model: Any, before: int, rows: int) -> None:
    what = f"{type(model).__name__}'s vocabulary of {before:,} rows can't become {rows:,}"
    tables = {id(model.get_input_embeddings())}
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == before and id(module) not in tables
    ]
    if others:
        raise UserError(what, rule=f"{others[0]} has a row for each token too, and Transformers doesn't resize it.")
    head = model.get_output_embeddings()
    if head is not None and type(head) is not nn.Linear:
        raise UserError(
            what,
            rule=f"Its head is a {type(head).__name__}.",
            way_out="Take a base whose head is in 16 bits, or --quantization none.",
        )
