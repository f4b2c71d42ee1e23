"""Load the base's tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from slimtune.base.source import check_folder, from_pretrained, local_revision, model_source
from slimtune.errors import UserError

__all__ = ["load_tokenizer"]


def load_tokenizer(
    model: str, *, revision: str | None = None, template: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model``, with its own chat template or the one in ``template``.

    Raises:
        UserError: It can't be loaded, has no chat template, or the template file can't be read.
    """
    source = model_source(model)
    check_folder(source, trust_remote_code)
    tokenizer: PreTrainedTokenizerBase = from_pretrained(
        AutoTokenizer, source, revision=local_revision(source, revision), trust_remote_code=trust_remote_code
    )
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat template {template} can't be read: {error}") from None
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {model} has no chat template",
            rule="slimtune trains chat models: a template says how turns become tokens.",
            way_out="Give one: --template FILE.jinja",
        )
    if tokenizer.pad_token is None:
        # Padding is never supervised and never attended to, so any token that exists serves; the turn's end stays
        # supervised because labels come from the data's own mask, not from token ids.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
