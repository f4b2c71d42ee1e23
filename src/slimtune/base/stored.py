"""The format that a base's files hold its weights in, read from its config before any weight."""

from __future__ import annotations

from typing import Any, Literal

from slimtune.errors import UserError

__all__ = ["Stored", "stored_format"]

Stored = Literal["plain", "bitsandbytes", "mxfp4"]
"""16 or 32 bits; 4 bits by bitsandbytes; expert stacks in MXFP4 and the rest plain."""


def stored_format(model: str, config: Any) -> Stored:
    """How the weights lie in the files.

    Args:
        model: Its name, for messages.
        config: As Transformers reads it.

    Raises:
        UserError: They are quantised in a way that an adapter can't be trained on here.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        stored = getattr(config.get_text_config(), "quantization_config", None)
    if stored is None:
        return "plain"
    values: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(values.get("quant_method", "bitsandbytes" if "load_in_4bit" in values else "unknown"))
    if method == "mxfp4":
        return "mxfp4"
    if method == "bitsandbytes" and values.get("load_in_4bit"):
        return "bitsandbytes"
    name = "bitsandbytes' 8 bits" if method == "bitsandbytes" else method
    raise UserError(
        f"the weights of {model} are quantised already, as {name}",
        rule="slimtune trains on 16- or 32-bit weights, which it packs, on bitsandbytes' 4 bits, and on MXFP4.",
        way_out="Give the 16-bit original that it was made from.",
    )
